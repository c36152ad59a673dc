"""Files and variables over both ways: an OpenSSH server, and QEMU's own agent, on this host."""

from __future__ import annotations

import asyncio
import filecmp
import itertools
import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import ConfigError, FileTransferError
from smolvm_async.controls.agent import linux
from smolvm_async.controls.agent.contents import AgentAccess
from smolvm_async.controls.agent.execution import AgentTransport
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.agent.transfer import AgentFiles
from smolvm_async.controls.contents import MOST, Contents, FileAccess
from smolvm_async.controls.files.environment import Environment
from smolvm_async.controls.files.files import Files
from smolvm_async.controls.files.transport import GuestFiles
from smolvm_async.controls.ssh.contents import SFTPAccess
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.transfer import SFTPFiles
from smolvm_async.qemu.pauses import Pauses
from tests.agent import Host
from tests.conftest import fill_up
from tests.integration.ssh_server import link_with, ssh_servers
from tests.integration.trees import digest_tree, make_tree

pytestmark = pytest.mark.anyio

SESSIONS = 10
SOON = 30.0  # seconds


class Guest(Files, Contents, Environment):
    """The host, as if it were a guest that is reached over SSH, or through its agent."""

    def __init__(self, link: Link | None, session: Session | None) -> None:
        self.link = link
        self.session = session

    async def _files(self, feature: str) -> AbstractAsyncContextManager[GuestFiles]:
        if self.link is not None:
            return SFTPFiles.opened(self.link)
        assert self.session is not None
        return nullcontext(AgentFiles(self.session, AgentTransport(self.session)))

    async def _file_access(self, feature: str) -> FileAccess:
        if self.link is not None:
            return SFTPAccess(self.link)
        assert self.session is not None
        return AgentAccess(AgentFiles(self.session, AgentTransport(self.session)))

    def _require(self, feature: str) -> None:
        pass


@pytest.fixture(params=["ssh", "agent"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def guest(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guest]:
    """A guest; at the end of the test, nothing is left in its temporary directory."""
    if way == "ssh":
        with ssh_servers(tmp_path) as start:
            link = link_with(start(SESSIONS))
            yield Guest(link, None)
            link.close()
        return
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(linux, "DIRECTORY", str(files))
    async with Host.running(tmp_path) as host:
        session = Session(host.channel, Pauses())
        yield Guest(None, session)
        async with asyncio.timeout(SOON):
            while [*files.iterdir()]:
                await asyncio.sleep(0.01)
        await session.close()


# File names of every kind, and the target of a link: bytes that are neither UTF-8 nor harmless.
NAMES = [
    b"caf\xe9",
    b"\xff\n\x1b[31m",
    b"-rf *",
    b"'\"$(x) \\",
    b"\xe4\xb8\xad" * 85,  # 255 bytes
    b"\xff" * 255,
]
UTF8_NAMES = ["é\n\x1b[31m".encode(), *(name for name in NAMES if name.isascii()), NAMES[4]]


def odd_tree(root: Path, names: list[bytes]) -> None:
    for directory in map(os.fsdecode, names):
        (root / directory).mkdir(parents=True)
        for name in names:
            (root / directory / os.fsdecode(name)).write_bytes(name)
        (root / directory / "link").symlink_to(os.fsdecode(b"to/\xe9\n\\n\n"))


async def test_file_names_of_any_bytes_go_and_come_the_same(guest: Guest, tmp_path: Path) -> None:
    names = NAMES if guest.link is not None else UTF8_NAMES
    odd_tree(tmp_path / "tree", names)
    told: list[str] = []
    target = os.fsdecode(bytes(tmp_path) + b"/guest/" + names[0])
    await guest.upload_file(
        tmp_path / "tree", target, on_progress=lambda step: told.append(step.message)
    )
    back = await guest.download_file(
        target, tmp_path / "back", on_progress=lambda step: told.append(step.message)
    )
    assert digest_tree(tmp_path / "tree") == digest_tree(Path(target)) == digest_tree(back)
    for name in names:
        one = tmp_path / "tree" / os.fsdecode(name) / os.fsdecode(name)
        sent = await guest.upload_file(one, f"{target}/files/")
        assert os.fsencode(sent).endswith(b"/" + name)
        got = await guest.download_file(sent, f"{tmp_path}/one/")
        assert got.read_bytes() == name
        assert os.fsencode(got.name) == name
    "".join(told).encode()  # any terminal can show the progress
    missing = os.fsdecode(b"caf\xe9/missing")
    with pytest.raises(FileTransferError) as caught:
        await guest.download_file(f"{target}/{missing}", tmp_path / "none")
    assert "caf\\udce9/missing" in str(caught.value).encode().decode()
    with pytest.raises(ConfigError, match=r"guest_path='/\\ud800' is wrong"):
        await guest.upload_file(tmp_path / "tree", "/\ud800")


@pytest.mark.parametrize("way", ["agent"], indirect=True)
async def test_the_agent_tells_that_it_cannot_open_a_name(guest: Guest, tmp_path: Path) -> None:
    odd_tree(tmp_path / "tree", NAMES[:2])
    sent = await guest.upload_file(tmp_path / "tree", f"{tmp_path}/there")
    assert digest_tree(Path(sent)) == digest_tree(tmp_path / "tree")
    with pytest.raises(FileTransferError, match="not UTF-8"):
        await guest.download_file(sent, tmp_path / "back")
    assert not [path for path in tmp_path.iterdir() if "back" in path.name]


async def test_a_big_file_and_a_big_tree_go_and_come_the_same(guest: Guest, tmp_path: Path) -> None:
    size, count = (60, 1500) if guest.link is not None else (20, 300)  # MiB, files
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20) * size + b"end")
    make_tree(tmp_path / "tree", count)
    await guest.upload_file(big, f"{tmp_path}/there/")
    await guest.download_file(f"{tmp_path}/there/big", tmp_path / "back")
    assert filecmp.cmp(big, tmp_path / "there" / "big", shallow=False)
    assert filecmp.cmp(big, tmp_path / "back", shallow=False)
    await guest.upload_file(tmp_path / "tree", f"{tmp_path}/there/tree")
    await guest.download_file(f"{tmp_path}/there/tree", tmp_path / "came")
    wanted = digest_tree(tmp_path / "tree")
    assert digest_tree(tmp_path / "there" / "tree") == wanted
    assert digest_tree(tmp_path / "came") == wanted


async def test_a_file_that_does_not_tell_its_size_comes_whole(guest: Guest, tmp_path: Path) -> None:
    await guest.download_file("/proc/self/limits", tmp_path / "limits")
    assert "Max open files" in (tmp_path / "limits").read_text()


def growing() -> Iterator[int]:
    """Return numbers that grow by a fifth: the agent's replies need more time than steps."""
    steps = random.random()
    while True:
        yield int(steps)
        steps += 1 + steps / 5


@pytest.mark.parametrize("down", [False, True])
async def test_a_transfer_cancelled_anywhere_leaves_nothing(
    guest: Guest, tmp_path: Path, down: bool
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    make_tree(source / "tree", 40)
    (source / "big").write_bytes(os.urandom(3 << 20))
    target.mkdir()
    await guest.upload_file(source / "big", f"{tmp_path}/connected")
    transfer = guest.download_file if down else guest.upload_file
    for steps in itertools.count(random.randrange(23), 23) if guest.link else growing():
        copying = asyncio.ensure_future(transfer(str(source), f"{target}/copy"))
        for _ in range(steps):
            await asyncio.sleep(0)
        copying.cancel()
        with suppress(asyncio.CancelledError):
            await copying
        left = [path.name for path in target.iterdir()]
        assert left in ([], ["copy"]), left
        if left:
            assert digest_tree(target / "copy") == digest_tree(source)
            shutil.rmtree(target / "copy")
        if not copying.cancelled():
            break  # it was faster
    assert steps > 100


async def test_a_full_disk_on_either_side_is_told_and_nothing_is_left(
    guest: Guest, tmp_path: Path, small_disk: Path
) -> None:
    filler = fill_up(small_disk)
    source = tmp_path / "source"
    make_tree(source, 30)
    (source / "big").write_bytes(os.urandom(1 << 20))
    for path in (source, source / "big"):
        with pytest.raises(FileTransferError, match="on the guest's disk"):
            await guest.upload_file(path, f"{small_disk}/copy")
        with pytest.raises(FileTransferError, match="on this host's disk"):
            await guest.download_file(str(path), small_disk / "copy")
        assert [*small_disk.iterdir()] == [filler]


async def test_a_copy_is_merged_and_never_replaces_another_kind(
    guest: Guest, tmp_path: Path
) -> None:
    source, target = tmp_path / "tree", tmp_path / "guest" / "tree"
    make_tree(source, 10)
    (target / "d1").mkdir(parents=True)
    (target / "d1" / "own").write_text("own")
    (target / "d1" / "file 1").write_text("old")
    (target / "link").symlink_to(tmp_path)
    assert await guest.upload_file(source, str(target.parent)) == str(target)
    left = digest_tree(target)
    assert left.pop("d1/own") is not None
    assert left == digest_tree(source)
    (target / "d2" / "file 2").unlink()
    (target / "d2" / "file 2").mkdir()
    with pytest.raises(FileTransferError, match="file 2' exists, but the source and the target"):
        await guest.upload_file(source, f"{target.parent}/")
    with pytest.raises(FileTransferError, match=r"tree/d1/file 1/x"):
        await guest.upload_file(source, f"{target}/d1/file 1/x")
    (source / "d1" / "back\\slash").touch()
    with pytest.raises(FileTransferError, match="d1/own' exists, but the source and the target"):
        await guest.upload_file(source, f"{target}/d1/own")
    assert not [path for path in target.parent.rglob("*") if "smolvm" in path.name]
    with pytest.raises(FileTransferError, match="max_bytes=5"):
        await guest.download_file(f"{source}/d3/file 3", tmp_path / "short", max_bytes=5)


async def test_variables_are_set_listed_and_removed(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"A": "'\"$x`\n é", "B": os.fsdecode(b"\xff")}
    monkeypatch.setattr("smolvm_async.controls.files.environment.ENV_FILE", f"{tmp_path.name}.sh")
    kept = Path.home() / f"{tmp_path.name}.sh"
    try:
        assert await guest.list_env_vars() == {}
        assert await guest.set_env_vars(values) == ["A", "B"]
        assert await guest.set_env_vars({"C": "c"}) == ["A", "B", "C"]
        assert await guest.list_env_vars() == {**values, "C": "c"}
        assert kept.stat().st_mode & 0o777 == 0o600
        assert await guest.unset_env_vars(["A", "none"]) == {"A": values["A"]}
        assert await guest.set_env_vars({"D": ""}, merge=False) == ["D"]
        kept.write_text("'")
        with pytest.raises(FileTransferError, match="changed by another program"):
            await guest.list_env_vars()
    finally:
        kept.unlink()
    assert not [*Path.home().glob(f"{tmp_path.name}*")]


async def test_text_and_bytes_are_read_and_written(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / ("file \udce9" if guest.link is not None else "file é")
    content = os.urandom(1 << 20) + b"end"
    await guest.write_file(str(path), content)
    assert path.read_bytes() == content
    assert await guest.read_file(str(path), text=False) == content
    assert await guest.read_file(str(path), text=False, offset=1 << 20) == b"end"
    assert await guest.read_file(str(path), text=False, offset=9, length=2) == content[9:11]
    assert await guest.read_file(str(path), text=False, offset=2 << 20) == b""
    await guest.write_file(str(path), "tea caf\xe9")
    assert await guest.read_file(str(path)) == "tea caf\xe9"
    await guest.write_file(str(path), b"")
    assert await guest.read_file(str(path)) == ""
    assert "Max open files" in await guest.read_file("/proc/self/limits")
    assert await guest.read_file("/proc/self/limits", offset=0, length=5) == "Limit"
    assert [each.name for each in path.parent.iterdir()] == [path.name], "no temporary file"


async def test_a_file_that_is_written_keeps_its_mode_its_owner_and_its_link(
    guest: Guest, tmp_path: Path
) -> None:
    file, link, secret = (tmp_path / name for name in ("file", "link", "secret"))
    file.touch(0o640)
    os.chown(file, 4711, 4712)
    link.symlink_to("file")
    await guest.write_file(str(link), "through the link")
    assert link.is_symlink()
    assert file.read_text() == "through the link"
    status = file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (4711, 4712, 0o640)
    await guest.write_file(str(secret), "", mode=0o4600)
    assert secret.stat().st_mode & 0o7777 == 0o4600


async def test_what_cannot_be_read_or_written_is_told(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"ab\xff")
    os.truncate(tmp_path / "binary", 3)
    (tmp_path / "big").touch()
    os.truncate(tmp_path / "big", MOST + 1)
    os.mkfifo(tmp_path / "fifo")
    for name, words in {
        "binary": "not UTF-8 text: invalid start byte at byte 2.*text=False",
        "big": "longer than the 64 MiB.*length=",
        "fifo": "not a file",
        "missing": "No such file",
        "": "not a file",
    }.items():
        with pytest.raises(FileTransferError, match=words):
            await guest.read_file(str(tmp_path / name))
    with pytest.raises(FileTransferError, match="No such file"):
        await guest.write_file(f"{tmp_path}/no/file", "", make_dirs=False)
    with pytest.raises(FileTransferError, match="not both files"):
        await guest.write_file(str(tmp_path), "")
    with pytest.raises(FileTransferError, match="not a directory"):
        await guest.list_files(f"{tmp_path}/big")
    wrong: Any
    for wrong in ("relative", b"/bytes", "/nul\0", "/ends/"):
        with pytest.raises(ConfigError, match="path="):
            await guest.write_file(wrong, "")
    with pytest.raises(ConfigError, match="content="):
        await guest.write_file("/x", "\ud800")


async def test_directories_are_made_listed_and_removed(guest: Guest, tmp_path: Path) -> None:
    top = f"{tmp_path}/top"
    with pytest.raises(FileTransferError, match="No such file"):
        await guest.make_directory(f"{top}/below", parents=False)
    for _ in range(2):
        await guest.make_directory(f"{top}/below")
    with pytest.raises(FileTransferError, match="exists already"):
        await guest.make_directory(f"{top}/below", parents=False)
    await guest.write_file(f"{top}/odd \\ name", "12345", mode=0o600)
    os.symlink("nowhere", f"{top}/link")
    os.mkfifo(f"{top}/fifo")
    infos = await guest.list_files(f"{top}/")
    known = [(info.name, info.kind, info.path) for info in infos]
    names = {"below": "directory", "fifo": "other", "link": "link", "odd \\ name": "file"}
    assert known == [(name, kind, f"{top}/{name}") for name, kind in names.items()]
    assert (infos[3].size, infos[3].mode) == (5, 0o600)
    assert infos[3].modified == int(os.stat(infos[3].path).st_mtime)
    assert [await guest.exists(info.path) for info in infos] == [True, True, False, True]
    with pytest.raises(FileTransferError, match=r"not empty.*recursive=True"):
        await guest.remove(top)
    await guest.remove(f"{top}/link")
    await guest.remove(f"{top}/below")
    await guest.remove(f"{top}/", recursive=True)
    assert not await guest.exists(top)
    with pytest.raises(FileTransferError, match="No such file"):
        await guest.remove(top, recursive=True)
