"""What a caller asked for: the arguments of a VM, checked and frozen, and what a VM starts from."""
