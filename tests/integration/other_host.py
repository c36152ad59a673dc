"""A process on another host, or in another PID namespace, that shares a data directory.

`python -m tests.integration.other_host [--blind]` calls a function below for each line of JSON on
stdin, and answers with a line. With `--blind`, the locks of other processes are not visible to it,
as on a file system whose locks are per host.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smolvm_async import AsyncSmolVM, SmolVMError

BOOT = "11111111-2222-3333-4444-555555555555"
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
# Another kernel has another boot id, and its host another name.
HOST = 'hostname "$1" && mount --bind "$2" /proc/sys/kernel/random/boot_id && shift 2 && exec "$@"'


class Other:
    """The test's side."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def call(self, function: str, *arguments: object) -> Any:
        """Call a function of this module there. An exception is returned as its JSON."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, *arguments], default=str).encode() + b"\n")
        line = await self._process.stdout.readline()
        assert line, "the other process died"
        return json.loads(line)

    async def kill(self) -> None:
        """Kill the whole PID namespace."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()


@contextlib.asynccontextmanager
async def in_namespace(
    *options: str, namespace: tuple[str, ...] = NAMESPACE
) -> AsyncIterator[Other]:
    """Run the other process in another PID namespace of this host."""
    process = await asyncio.create_subprocess_exec(
        *namespace,
        *(sys.executable, "-m", "tests.integration.other_host", *options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        limit=1 << 20,
    )
    other = Other(process)
    try:
        yield other
    finally:
        await other.kill()


def on_host(
    name: str, tmp_path: Path, *options: str
) -> contextlib.AbstractAsyncContextManager[Other]:
    """Run the other process on a host with its own name and boot."""
    boot = tmp_path / f"boot-{name}"
    boot.write_text(f"{BOOT}\n")
    host = ("sh", "-c", HOST, "sh", name, str(boot))
    return in_namespace(*options, namespace=(*NAMESPACE, "--uts", *host))


# The other side

vms: dict[str, AsyncSmolVM] = {}


async def start(image: str, data_dir: str, vm_id: str, keep: bool) -> str:
    """Start a new VM."""
    vms[vm_id] = AsyncSmolVM(
        os="linux",
        image=image,
        memory=128,
        accel="tcg",
        data_dir=data_dir,
        vm_id=vm_id,
        keep=keep,
    )
    await vms[vm_id].start()
    return vms[vm_id].status


async def find(data_dir: str, vm_id: str) -> str:
    """Find a VM."""
    vms[vm_id] = await AsyncSmolVM.from_id(vm_id, data_dir=data_dir)
    return vms[vm_id].status


async def boot(data_dir: str, vm_id: str) -> str:
    """Find a kept VM and start it."""
    await find(data_dir, vm_id)
    await vms[vm_id].start()
    return vms[vm_id].status


async def stop(vm_id: str) -> str:
    """Stop a VM that was started or found."""
    return (await vms[vm_id].stop(timeout=0)).rung


async def delete(vm_id: str) -> None:
    """Delete a VM that was started or found."""
    await vms[vm_id].delete()


async def show(data_dir: str) -> list[Any]:
    """List the VMs."""
    return [asdict(info) for info in await AsyncSmolVM.list(data_dir=data_dir)]


async def prune(data_dir: str, gone_host: str | None = None) -> list[str]:
    """Prune, and return the ids."""
    return [info.vm_id for info in await AsyncSmolVM.prune(data_dir=data_dir, gone_host=gone_host)]


async def serve() -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        function, *arguments = json.loads(line)
        try:
            answer = await globals()[function](*arguments)
        except SmolVMError as error:
            answer = error.to_json()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if "--blind" in sys.argv:
        fcntl.flock = lambda fd, operation: None
    asyncio.run(serve())
