"""The pauses of a guest: the waits and the deadlines of callers, and the guest's clock."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from smolvm_async.controls.ssh.clock import script
from smolvm_async.qemu import boot
from smolvm_async.qemu.boot import BootTracker
from smolvm_async.qemu.events import BootState, EventHub, parse_event
from smolvm_async.qemu.pauses import Pauses

pytestmark = pytest.mark.anyio

SHORT, LONG = 0.02, 0.1  # seconds of two deadlines that run at the same time


class Guest:
    """The pauses of a guest whose events a test sends."""

    def __init__(self) -> None:
        self.pauses = Pauses()

    def sees(self, *names: str, **data: object) -> None:
        for name in names:
            self.pauses.on_event(parse_event({"event": name, "data": data}))

    def sees_a_full_disk(self) -> None:
        self.sees("BLOCK_IO_ERROR", action="stop", operation="write", reason="No space left")
        self.sees("STOP")


@pytest.fixture
def guest() -> Guest:
    return Guest()


async def never(seconds: float) -> None:
    """Wait until `seconds` have passed."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()


async def test_a_deadline_stands_still_during_a_pause(guest: Guest) -> None:
    with pytest.raises(TimeoutError):
        async with guest.pauses.timeout(SHORT):
            for _ in range(3):
                guest.sees("STOP")
                await never(LONG)
                guest.sees("RESUME")
            await asyncio.Event().wait()


async def test_a_deadline_that_is_set_during_a_pause_begins_with_its_end(guest: Guest) -> None:
    guest.sees("STOP")
    with pytest.raises(TimeoutError):
        async with guest.pauses.timeout(None) as bound:
            bound.restart(SHORT)
            await never(LONG)
            guest.sees("RESUME")
            await asyncio.Event().wait()
    assert not guest.pauses.watchers


@pytest.mark.parametrize("how", ["full disk", "suspended"])
async def test_a_deadline_goes_on_if_no_caller_paused_the_guest(guest: Guest, how: str) -> None:
    with pytest.raises(TimeoutError):
        async with guest.pauses.timeout(SHORT):
            guest.sees_a_full_disk() if how == "full disk" else guest.sees("SUSPEND")
            await asyncio.Event().wait()
    assert guest.pauses.fault
    guest.sees("RESUME" if how == "full disk" else "WAKEUP", "STOP")
    assert guest.pauses.active
    assert not guest.pauses.fault  # the next pause is a caller's


async def test_callers_wait_for_the_guest_and_for_its_clock(guest: Guest) -> None:
    guest.sees("STOP")
    waiting = [
        asyncio.ensure_future(wait())
        for wait in (guest.pauses.until_running, guest.pauses.until_open)
    ]
    await never(SHORT)
    assert [task.done() for task in waiting] == [False, False]
    guest.pauses.hold(True)
    guest.sees("RESUME")
    await never(SHORT)
    assert [task.done() for task in waiting] == [True, False]
    guest.pauses.hold(False)
    await waiting[1]


async def test_the_end_of_the_run_ends_every_wait(guest: Guest) -> None:
    guest.sees("STOP")
    waiting = asyncio.ensure_future(guest.pauses.until_open())
    await asyncio.sleep(0)
    guest.pauses.close()
    await waiting
    guest.sees("STOP")  # QEMU's last words
    assert not guest.pauses.active


async def test_a_paused_guest_with_an_idle_disk_is_not_ready(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "IDLE", SHORT)
    monkeypatch.setattr(boot, "POLL", 0.001)
    monkeypatch.setattr(boot, "_idle_seconds", lambda _: LONG)

    class Monitor:
        async def execute(self, _: str) -> None: ...

    async def silent() -> None: ...

    monitor: Any = Monitor()
    tracker = BootTracker(EventHub(), guest.pauses, None)
    tracker.enter(BootState.OPERATING_SYSTEM, "a test")
    guest.sees("STOP")
    watching = asyncio.ensure_future(tracker.watch(monitor, silent, guess=True))
    await never(LONG)
    assert tracker.last.state is BootState.OPERATING_SYSTEM
    guest.sees("RESUME")
    assert await tracker.wait_for(BootState.READY)
    watching.cancel()
    await asyncio.wait([watching])


DATE = """#!/bin/sh
case "$1" in
    +%s) echo $NOW;;
    *) case "$FRACTIONS$2" in no*.*) exit 1;; esac; echo "$@" >>set; echo noise;;
esac
"""
SUDO = """#!/bin/sh
echo "sudo $1" >>set
[ "$SUDO" = yes ] && shift && exec "$@"
echo asks >&2
exit 1
"""


@pytest.mark.parametrize(
    ("guest_time", "settings", "done", "exit_code"),
    [
        (100, {}, ["-s @200.750"], 0),
        (100, {"FRACTIONS": "no"}, ["-s @200"], 0),
        (200, {}, [], 0),  # the clock is right to a second
        (300, {}, [], 0),  # the guest may have set its clock by itself; time never runs back
        (100, {"USER_ID": "1000", "SUDO": "yes"}, ["sudo -n", "-s @200.750"], 0),
        (100, {"USER_ID": "1000"}, ["sudo -n"], 1),
    ],
)
async def test_the_script_sets_a_late_clock_as_root(
    tmp_path: Path, guest_time: int, settings: dict[str, str], done: list[str], exit_code: int
) -> None:
    for name, text in {"date": DATE, "sudo": SUDO, "id": "#!/bin/sh\necho $USER_ID"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOW": str(guest_time), "USER_ID": "0"}
    ran = subprocess.run(
        ["sh", "-c", script(200.75)], cwd=tmp_path, env={**env, **settings}, capture_output=True
    )
    assert (ran.returncode, ran.stdout) == (exit_code, b"")
    log = tmp_path / "set"
    assert (log.read_text().splitlines() if log.exists() else []) == done
    assert exit_code == 0 or b"asks" in ran.stderr
