"""This host: its programs, firmware, accelerator, memory, file systems and identity."""
