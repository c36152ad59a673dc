"""QEMU: its command line, its monitor, its boot states."""
