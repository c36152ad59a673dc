"""One QEMU process: command line, launch, sidecars, monitor, events, peripherals, shutdown."""
