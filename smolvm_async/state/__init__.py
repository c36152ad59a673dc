"""VMs on disk: a VM's directory with its lock, record and logs, and the list of all VMs."""
