"""Disks that VMs boot from: local files, published images, and images that the library builds."""
