"""asyncio and the operating system: tasks, processes, locks, logs. Nothing here knows a VM."""
