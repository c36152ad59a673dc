"""What the guest has done to q35's power management: host-side evidence of an operating system.

PM1_EN (ACPI specification 4.8.3.1.2) says of which fixed events an operating system wants to
hear. It reads 0 through firmware, shim and GRUB; Linux sets GBL_EN as soon as its ACPI starts and
PWRBTN_EN with its button driver; a reset clears it. (SCI_EN in PM1_CNT tells nothing here: OVMF
with SMM sets it itself.) QEMU acts on its power button only while PWRBTN_EN is set.
"""

from __future__ import annotations

import re

from smolvm_async.qemu.monitor import Monitor

PM1_EN = 0x602  # OVMF and SeaBIOS place the ICH9's ACPI registers at 0x600
PWRBTN_EN = 1 << 8
NOT_DECODED = 0xFFFF  # firmware has not placed the registers yet


async def os_in_control(monitor: Monitor) -> bool:
    """Whether an operating system listens to any of ACPI's fixed events."""
    return await _pm1_enable(monitor) != 0


async def power_button_enabled(monitor: Monitor) -> bool:
    """Whether the guest listens to the power button."""
    return bool(await _pm1_enable(monitor) & PWRBTN_EN)


async def _pm1_enable(monitor: Monitor) -> int:
    """Read PM1_EN; QMP itself has no command for an I/O port."""
    command = {"command-line": f"i /h {PM1_EN:#x}"}
    answer = await monitor.execute("human-monitor-command", command)
    match = re.search(r"= 0x([0-9a-fA-F]+)", str(answer))
    value = int(match[1], 16) if match else NOT_DECODED
    return 0 if value == NOT_DECODED else value
