"""`AsyncSmolVM`: a VM's life from its arguments to the end of its last process."""
