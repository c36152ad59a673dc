"""`AsyncSmolVM` and its life: from the arguments to the end of its last process."""
