"""Transfers through the agent: what a hostile guest lists, archives, and the clock."""

from __future__ import annotations

import io
import os
import re
import tarfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFREG, S_ISLNK
from typing import Any, cast

import pytest

from smolvm_async import FileTransferError
from smolvm_async.controls.agent import transfer
from smolvm_async.controls.agent.clock import advance_clock
from smolvm_async.controls.agent.transfer import archive, parse, parts
from smolvm_async.controls.files.copying import TransferMeter
from smolvm_async.controls.files.tree import Entry, local_tree
from smolvm_async.errors import ConnectionLostError, GuestAgentError
from smolvm_async.qemu.guest_agent import GuestAgent

pytestmark = pytest.mark.anyio

ROOT = "41ed 0 7 ."


def listed(*records: str) -> bytes:
    return "".join(f"W {record}\n" for record in records).encode()


def test_a_listing_has_files_directories_and_links() -> None:
    output = listed(
        *(ROOT, "81a4 5 -9 ./a\nb", "41c0 9 8 ./d", "a1ff 1 2 ./d/l", "81ed 0 0 ./d/ W"),
        *("link 0 0 ./d/l", "to 0 0 ../x\n\n."),
    )
    assert parse(output, "W", "/s") == (
        [
            Entry("", S_IFDIR | 0o755, 0, 7),
            Entry("a\nb", S_IFREG | 0o644, 5, -9),
            Entry("d", S_IFDIR | 0o700, 9, 8),
            Entry("d/l", S_IFLNK | 0o777, 1, 2),
            Entry("d/ W", S_IFREG | 0o755, 0, 0),
        ],
        {"d/l": "../x\n"},
    )
    assert parse(listed("81a4 5 1 ."), "W", "/s") == ([Entry("", S_IFREG | 0o644, 5, 1)], {})


@pytest.mark.parametrize(
    "records",
    [
        [],
        ["81a4 5 1 ./a"],
        [ROOT, ROOT],
        [ROOT, "81a4 5 1 ./a", "41ed 5 1 ./a"],
        [ROOT, "81a4 -5 1 ./a"],
        [ROOT, "-81a4 5 1 ./a"],
        [ROOT, "81a4 5 1"],
        [ROOT, f"81a4 {1 << 70} 1 ./a"],
        [ROOT, f"81a4 1 -{1 << 70} ./a"],
        [ROOT, f"81a4 {'9' * 5000} 1 ./a"],
        [ROOT, "81a4 5 1 ./../a"],
        [ROOT, "81a4 5 1 ./a/../../b"],
        [ROOT, "81a4 5 1 .//a"],
        [ROOT, "81a4 5 1 ./a/"],
        [ROOT, "81a4 5 1 /etc/passwd"],
        [ROOT, "81a4 5 1 ./a\0b"],
        [ROOT, "1180 5 1 ./fifo"],
        [ROOT, "a1ff 5 1 ./l"],
        [ROOT, "a1ff 5 1 ./l", "to 0 0 x\n."],
        [ROOT, "a1ff 5 1 ./l", "link 0 0 ./other", "to 0 0 x\n."],
    ],
)
def test_a_listing_that_makes_no_sense_or_leads_out_is_an_error(records: list[str]) -> None:
    with pytest.raises(FileTransferError, match=r"makes no sense|unsafe|cannot be copied"):
        parse(listed(*records), "W", "/s")


@pytest.mark.parametrize("windows", [False, True])
async def test_the_archives_of_a_tree_are_the_tree(
    tmp_path: Path, windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PART", 3000)
    source, target = tmp_path / "source", tmp_path / "target"
    names = ["a", "d\u00e9/b", f"{'n' * 120}/{'m' * 140}", "d\u00e9/big", "empty"]
    for number, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(os.urandom(number * 1000))
        os.utime(source / name, (number, number))
    (source / "empty").write_bytes(b"")
    (source / "link").symlink_to("x" * 150)
    (source / "d\u00e9").chmod(0o700 if windows else 0o500)
    tree = local_tree(source)
    meter = TransferMeter(None, "", 0)
    count = 0
    for part in parts(tree):
        chunks = [chunk async for chunk in archive(source, part, meter, windows=windows)]
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as unpacked:
            unpacked.extractall(target, filter="fully_trusted")
        count += 1
    assert count > 2
    assert facts(local_tree(target)) == facts(tree)
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def facts(tree: Sequence[Entry]) -> list[tuple[str, int, int]]:
    """Return path, mode and time of each entry; tar gives a link the time of its extraction."""
    return [
        (entry.path, entry.mode, 0 if S_ISLNK(entry.mode) else int(entry.mtime)) for entry in tree
    ]


def test_the_scripts_for_linux_and_windows_have_the_same_steps() -> None:
    scripts = files("smolvm_async.controls.agent")
    linux = re.findall(r"^(\w+)\(\) \{", scripts.joinpath("files.sh").read_text(), re.M)
    windows = re.findall(r"^function (\w+)", scripts.joinpath("files.ps1").read_text(), re.M)
    steps = {"place", "unpack", "attributes", "publish", "discard", "list", "read_own", "write_own"}
    steps |= {"place_content", "content_attributes", "entries", "info", "exists", "remove"}
    steps |= {"make_directory"}
    assert steps <= {*linux} & {*windows}


class Clock:
    """The clock of a guest, `late` seconds behind, whose agent may refuse to set it."""

    def __init__(self, late: float, refusal: Exception | None = None, sets: bool = True) -> None:
        self.offset = -int(late * 1e9)
        self._refusal, self._sets = refusal, sets

    async def execute(self, command: str, arguments: Any = None) -> Any:
        if command == "guest-get-time":
            return time.time_ns() + self.offset
        assert command == "guest-set-time"
        if self._sets:
            self.offset = arguments["time"] - time.time_ns()
        if self._refusal is not None:
            raise self._refusal
        return {}


REFUSAL = GuestAgentError("hwclock failed to set hardware clock to system time")


@pytest.mark.parametrize(
    ("clock", "problem", "late"),
    [
        (Clock(100), "", False),
        (Clock(-100), "", False),  # never turned back
        (Clock(100, REFUSAL), "", False),
        (Clock(100, REFUSAL, sets=False), REFUSAL.message, True),
        (Clock(100, ConnectionLostError("the agent ended"), sets=False), "the agent ended", True),
    ],
)
async def test_the_clock_is_set_unless_it_is_right(clock: Clock, problem: str, late: bool) -> None:
    before = clock.offset
    assert await advance_clock(cast(GuestAgent, clock)) == problem
    assert (clock.offset < -50e9) == late
    assert clock.offset >= before
