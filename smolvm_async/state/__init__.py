"""VMs on disk: the directory of a VM, its lock and record, the list of all VMs, and the logs."""
