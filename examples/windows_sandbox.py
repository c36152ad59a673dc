"""Boot a sandbox with Secure Boot and a TPM, inspect it, and power it down.

Without --image, the script builds and boots the stand-in for Windows, a small signed Linux disk,
and prints the guest's report about its machine.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from pathlib import Path

from smolvm_async import AsyncSmolVM, Progress, SmolVMError
from stand_in import build_stand_in


def show(progress: Progress) -> None:
    """Print one step of the progress, with the seconds since the beginning."""
    amount = ""
    if progress.done is not None and progress.total:
        amount = f" ({100 * progress.done // progress.total} %)"
    print(f"{progress.elapsed:7.2f} s  {progress.stage:<6} {progress.message}{amount}", flush=True)


async def read_report(vm: AsyncSmolVM) -> dict[str, str]:
    """Return the stand-in's report: lines `STAND-IN: key=value` on its slow serial console."""
    async with asyncio.timeout(60):
        while "STAND-IN: ready" not in vm.console_log():
            await asyncio.sleep(0.1)
    return dict(re.findall(r"STAND-IN: (\w+)=(\S+)", vm.console_log()))


def print_report(reported: dict[str, str]) -> bool:
    """Print the guest's report; return whether the machine meets Windows 11's requirements."""
    secure_boot = reported.get("secure_boot") == "1"
    tpm = reported.get("tpm_version") == "2" and bool(reported.get("tpm_random"))
    disk = reported.get("root_driver") == "virtio_scsi"
    print("\nThe guest reports:")
    print(f"  Secure Boot  {'on' if secure_boot else 'OFF'}")
    print(f"  TPM          {reported.get('tpm_version')}.0, random: {reported.get('tpm_random')}")
    print(f"  root disk    {reported.get('root_device')} on {reported.get('root_driver')}\n")
    return secure_boot and tpm and disk


async def main(image: Path | None, memory: int) -> int:
    """Run the sandbox, and return the exit status."""
    good = True
    disk = image or await build_stand_in(on_progress=show)
    async with AsyncSmolVM(os="windows", image=disk, memory=memory, on_progress=show) as vm:
        await vm.wait_for("ready")
        if image is None:
            good = print_report(await read_report(vm))
        report = await vm.stop()
    how = "the guest powered down" if report.graceful else f"ended by {report.rung}"
    print(f"\nShutdown: {how}, in {report.seconds:.2f} s.")
    return 0 if good and report.graceful else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", type=Path, help="a qcow2 with Windows 11 installed")
    parser.add_argument("--memory", type=int, default=4096, help="MiB (default 4096)")
    arguments = parser.parse_args()
    try:
        sys.exit(asyncio.run(main(arguments.image, arguments.memory)))
    except SmolVMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
