"""What the guest has done to q35's power management registers: host-side evidence of an OS.

An operating system that takes over switches the chipset to ACPI mode: SCI_EN in PM1_CNT (ACPI
specification 4.8.3.2.1). QEMU acts on its power button only when the guest has also enabled
that button's event: PWRBTN_EN in PM1_EN (4.8.3.1.2). Both read as 0 through firmware and
boot loader, and a reset clears them.
"""

from __future__ import annotations

import re

from smolvm_async.qemu.monitor import Monitor

PM_BASE = 0x600  # where OVMF and SeaBIOS put the ICH9's ACPI registers
PM1_EN, PM1_CNT = PM_BASE + 2, PM_BASE + 4
PWRBTN_EN, SCI_EN = 1 << 8, 1 << 0
NOT_DECODED = 0xFFFF  # firmware has not placed the registers yet


async def os_in_control(monitor: Monitor) -> bool:
    """Whether an operating system has switched the machine to ACPI mode."""
    return bool(await _read(monitor, PM1_CNT) & SCI_EN)


async def power_button_enabled(monitor: Monitor) -> bool:
    """Whether the guest listens to the power button."""
    return bool(await _read(monitor, PM1_EN) & PWRBTN_EN)


async def _read(monitor: Monitor, port: int) -> int:
    """Read a 16-bit I/O port; QMP itself has no command for it."""
    answer = await monitor.execute("human-monitor-command", {"command-line": f"i /h {port:#x}"})
    match = re.search(r"= 0x([0-9a-fA-F]+)", str(answer))
    value = int(match[1], 16) if match else NOT_DECODED
    return 0 if value == NOT_DECODED else value
