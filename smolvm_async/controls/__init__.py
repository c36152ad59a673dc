"""The controls of a running VM, one file for each."""
