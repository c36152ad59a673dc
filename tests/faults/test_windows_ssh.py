"""A fault at the awaits of commands and transfers of a Windows guest over SSH: nothing is left.

OpenSSH of this host is the guest's server, with the stand-in's `powershell.exe`. After each fault,
the next command has its own output and no other. Then there is no process and no file of a
command, no temporary file of a transfer, and no session of the server. No Windows was run.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from smolvm_async.controls.ssh.login import Access
from tests.agent import windows_programs
from tests.conftest import children
from tests.faults.commands import (
    GONE,
    Story,
    World,
    check_faults,
    command,
    download_tree,
    killed,
    stream,
    upload_tree,
)
from tests.faults.stage import kill
from tests.integration.ssh_server import link_with, ssh_servers
from tests.integration.test_agent_windows import contents
from tests.integration.test_ssh_windows import Guest

FEW = 2  # faults in each story, which has some 15 to 150 awaits
TOLD = [command, killed, stream, upload_tree, download_tree]


class SSHWorld(World):
    """A Windows guest behind its SSH server. Its drive C: is a directory."""

    guest: Guest

    def __init__(self, here: Path) -> None:
        self.here, self.drive = here, here / "C:"
        self.drive.mkdir(parents=True)
        super().__init__(self.drive)
        (self.source / "tree" / "link").unlink()  # Windows has links only for administrators
        self.access: Access
        self.server: int  # the process that accepts connections

    def at(self, path: Path) -> str:
        return f"C:/{path.relative_to(self.drive)}"

    def content(self, path: Path) -> object:
        return contents(path) if path.is_dir() else path.read_bytes()

    @asynccontextmanager
    async def reached(self) -> AsyncIterator[None]:
        self.guest, self.over = Guest(link_with(self.access), self.here, "cmd"), False
        try:
            yield
        finally:
            await self._until_clean()
            self.guest.link.close()
            self.over = True

    async def _until_clean(self) -> None:
        """Wait for the cleanup, which goes on while the VM runs."""
        deadline = time.monotonic() + GONE
        while time.monotonic() < deadline:
            with suppress(OSError):  # a fault may leave no descriptors for some time
                if not self.all_left():
                    return
            await asyncio.sleep(0.005)

    def lose(self) -> None:
        for pid in self._sessions():
            kill(pid)

    def leftovers(self) -> list[str]:
        files = [str(path) for path in self.here.iterdir() if path != self.drive]
        return [*files, *(f"session {pid}" for pid in self._sessions() if self.over)]

    def _sessions(self) -> list[int]:
        """Return the server's children, of which each connection has one."""
        path = Path(f"/proc/{self.server}/task/{self.server}/children")
        return [int(pid) for pid in path.read_text().split()]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[SSHWorld]:
    programs, here = windows_programs(tmp_path), tmp_path / "here"
    world = SSHWorld(here)
    more = f"SetEnv PATH={programs}:{os.environ['PATH']} SMOLVM_HERE={here} HOME={here}\n"
    before = children()
    with ssh_servers(tmp_path, f"-d {here}", more) as start:
        world.access = start(10)
        (world.server,) = children() - before
        yield world


@pytest.mark.parametrize("story", TOLD)
def test_a_fault_leaves_nothing_in_the_guest(
    world: SSHWorld, story: Story, record_property: Callable[[str, object], None]
) -> None:
    check_faults(world, story, FEW, record_property)
