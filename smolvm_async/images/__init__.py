"""Disks that VMs start from: local files, published images, images built here."""
