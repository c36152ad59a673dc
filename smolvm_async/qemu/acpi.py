"""Read the ACPI registers of q35: they show from outside whether an operating system runs.

The register PM1_EN (ACPI specification 4.8.3.1.2) holds the fixed events that the operating system
has enabled. The register is 0 while firmware, shim and GRUB run. Linux sets GBL_EN as soon as its
ACPI starts, and PWRBTN_EN with its button driver; a reset clears both bits. QEMU's power button
works only while PWRBTN_EN is set. (SCI_EN in PM1_CNT is not evidence: OVMF with SMM sets it, too.)
"""

from __future__ import annotations

from smolvm_async.qemu.monitor import Monitor

PM1_EN = 0x602  # OVMF and SeaBIOS place the ICH9's ACPI registers at 0x600
PWRBTN_EN = 1 << 8
NOT_DECODED = 0xFFFF  # the value read before the firmware has placed the registers


async def os_in_control(monitor: Monitor) -> bool:
    """Return whether an operating system has enabled any fixed ACPI event."""
    return await _pm1_enable(monitor) != 0


async def power_button_enabled(monitor: Monitor) -> bool:
    """Return whether the guest has enabled the power button."""
    return bool(await _pm1_enable(monitor) & PWRBTN_EN)


async def _pm1_enable(monitor: Monitor) -> int:
    value = await monitor.read_port(f"i /h {PM1_EN:#x}")
    return 0 if value == NOT_DECODED else value
