"""Helpers for asyncio and the operating system, independent of VMs: tasks, processes, locks."""
