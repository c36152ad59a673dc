"""The network policy, tested in network namespaces: a "host" with the VM, and "the internet"."""
