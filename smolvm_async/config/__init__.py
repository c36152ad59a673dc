"""The validated, immutable arguments of a VM, and the image that the VM starts from."""
