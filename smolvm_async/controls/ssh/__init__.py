"""Commands and files in a guest, over SSH. This code does not know how the guest was started."""
