"""The ACPI registers of q35: evidence, from outside the guest, that an operating system runs.

The register PM1_EN (ACPI specification 4.8.3.1.2) holds the fixed events that the operating system
has enabled. It reads 0 while firmware, shim and GRUB run. Linux sets GBL_EN as soon as its ACPI
starts, and PWRBTN_EN with its button driver; a reset clears both. QEMU acts on its power button
only while PWRBTN_EN is set. (SCI_EN in PM1_CNT shows nothing: OVMF with SMM sets it itself.)
"""

from __future__ import annotations

from smolvm_async.qemu.monitor import Monitor

PM1_EN = 0x602  # OVMF and SeaBIOS place the ICH9's ACPI registers at 0x600
PWRBTN_EN = 1 << 8
NOT_DECODED = 0xFFFF  # the firmware has not placed the registers yet


async def os_in_control(monitor: Monitor) -> bool:
    """Return whether an operating system has enabled any of ACPI's fixed events."""
    return await _pm1_enable(monitor) != 0


async def power_button_enabled(monitor: Monitor) -> bool:
    """Return whether the guest has enabled the power button."""
    return bool(await _pm1_enable(monitor) & PWRBTN_EN)


async def _pm1_enable(monitor: Monitor) -> int:
    value = await monitor.read_port(f"i /h {PM1_EN:#x}")
    return 0 if value == NOT_DECODED else value
