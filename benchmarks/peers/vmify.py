"""`vmify`, which has no image of its own: with the built-in Debian of `smolvm_async`.

The kernel and its disk are in `extra_args`: QEMU's loader for kernels takes the boot index that
vmify gives its first disk.

    vmify.py KERNEL INITRD DISK ARGUMENTS
"""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.pop(0)  # this directory, which has a file of its name
began = time.perf_counter()
import structlog  # type: ignore[import-not-found] # noqa: E402
from vmify import Accelerator, Firmware, VMSpec  # type: ignore[import-not-found] # noqa: E402
from vmify.models.spec import GuestSpec, NetworkSpec  # type: ignore[import-not-found] # noqa: E402
from vmify.providers.qemu.driver import (  # type: ignore[import-not-found] # noqa: E402
    QemuDirectDriver,
)

imported = time.perf_counter() - began
COMMANDS = 10
BOOT = 120  # seconds


async def main(directory: Path, kernel: str, initrd: str, disk: str, arguments: str) -> None:
    """Launch, run commands, stop."""
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(command, check=True)  # noqa: ASYNC221 (nothing else runs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overlay = directory / "overlay.qcow2"
    began = time.perf_counter()
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", disk, str(overlay)]
    subprocess.run(create, check=True)  # noqa: ASYNC221
    spec = VMSpec(
        name="benchmark",
        cpus=1,
        memory_mb=512,
        accelerator=Accelerator.TCG,
        firmware=Firmware.BIOS,
        networks=[NetworkSpec(hostfwd=[f"tcp:127.0.0.1:{port}-:22"])],
        guest=GuestSpec(ssh_user="root", ssh_password=None, ssh_key_path=directory / "key"),
        extra_args=[
            *("-kernel", kernel, "-initrd", initrd, "-append", arguments),
            *("-drive", f"file={overlay},format=qcow2,if=none,id=root,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci"),
            *("-fw_cfg", f"name=opt/smolvm/authorized_keys,file={directory / 'key.pub'}"),
            *("-fw_cfg", f"name=opt/smolvm/ssh_host_ed25519_key,file={directory / 'host_key'}"),
            *("-fw_cfg", "name=opt/smolvm/hostname,string=vmify"),
        ],
    )
    driver = QemuDirectDriver()
    vm = await driver.create(spec)
    try:
        await vm.start()
        await vm.wait_for_ssh(timeout=BOOT)
        await vm.ssh_exec("true")
        first = time.perf_counter() - began
        commands = []
        for _ in range(COMMANDS):
            began = time.perf_counter()
            await vm.ssh_exec("true")
            commands.append(time.perf_counter() - began)
        began = time.perf_counter()
        await vm.stop()
        stopped = time.perf_counter() - began
    except BaseException:
        await vm.stop(force=True)  # driver.destroy() fails: it looks for vm.process
        raise
    found = {"import": imported, "first": first, "commands": commands, "stop": stopped}
    print(json.dumps(found))


structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
with tempfile.TemporaryDirectory() as name:
    asyncio.run(main(Path(name), *sys.argv[1:5]))
