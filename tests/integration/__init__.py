"""Tests on the real parts: QEMU, swtpm, OVMF, and a guest that really boots."""
