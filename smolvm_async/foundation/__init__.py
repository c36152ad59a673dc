"""Helpers for tasks, processes, locks, files and logs. No helper depends on the code for VMs."""
