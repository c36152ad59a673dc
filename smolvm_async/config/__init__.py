"""The arguments of a VM, checked and frozen, and the image that the VM starts from."""
