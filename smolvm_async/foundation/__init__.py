"""asyncio and the operating system: tasks, processes, locks, files, logs. None of it knows a VM."""
