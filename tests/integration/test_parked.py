"""The parked process in a real guest: it sets the guest right, again and again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import asyncssh
import pytest

from smolvm_async import AsyncSmolVM
from smolvm_async.controls.ssh.login import KeyPair, make_key_pair
from smolvm_async.images.build.debian import DebianImage
from tests.conftest import run_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(100, func_only=True)]

ANSWER = 60.0  # seconds; an answer takes less than one
SWITCHES = "grep voluntary /proc/$(pgrep -x parked)/status"


async def answer_of(port: int, key: KeyPair, host_key: KeyPair, command: str) -> str:
    async with asyncssh.connect(
        "127.0.0.1",
        port,
        username="root",
        client_keys=[asyncssh.import_private_key(key.private)],
        known_hosts=([asyncssh.import_public_key(host_key.public)], [], []),
        config=None,
        agent_path=None,
    ) as connection:
        return str((await connection.run(command, check=True)).stdout)


async def test_a_guest_is_set_right_while_it_runs(debian: DebianImage, data_dir: Path) -> None:
    async with AsyncSmolVM(boot="cold", accel="tcg", data_dir=data_dir) as vm:
        parked = run_of(vm).parked
        assert await parked.wait_parked(ANSWER) == ""
        access = await vm.ssh_access()
        login = run_of(vm)._login

        async def set_right(name: str, key: KeyPair, host_key: KeyPair) -> str:
            keys = (host_key.private, f"{key.public}\n".encode())
            problem, done = await parked.set_right(name, *keys, timeout=ANSWER)
            assert done
            return str(problem)

        before = await vm.run(f"date -s 2020-01-01 >/dev/null && {SWITCHES}", check=True)
        new = make_key_pair(), make_key_pair()
        assert await set_right("clone-1", *new) == ""

        # The new keys are those to log in with, and the name and the clock are right.
        told = await answer_of(access.port, *new, "hostname; cat /etc/hostname; date +%s.%N")
        assert told.split()[:2] == ["clone-1", "clone-1"]
        assert abs(float(told.split()[2]) - time.time()) < 30
        with pytest.raises(asyncssh.PermissionDenied):
            await answer_of(access.port, login.key, new[1], "true")
        with pytest.raises(asyncssh.HostKeyNotVerifiable):
            await answer_of(access.port, new[0], login.host_key, "true")

        # The connection from before lasts, and the process waits again, without any work.
        name = "getent hosts clone-1 && ! grep smolvm /etc/hosts"
        assert (await vm.run(name, check=True)).stdout.split() == ["127.0.1.1", "clone-1"]
        idle = await vm.run(f"{SWITCHES}; sleep 0.5; {SWITCHES}", check=True)
        assert idle.stdout != 2 * before.stdout
        assert idle.stdout[: len(idle.stdout) // 2] * 2 == idle.stdout

        # If it is killed, another one takes its place; the guest gets its own keys back.
        await vm.run("pkill -KILL -x parked", check=True)
        assert await parked.wait_parked(ANSWER) == ""
        # The SSH server looks like one that has read its old key, and does not listen yet.
        starting = (await vm.run("cat /run/sshd.pid && rm /run/sshd.pid", check=True)).stdout
        setting = asyncio.ensure_future(set_right(vm.vm_id, login.key, login.host_key))
        await vm.run(f"sleep 0.2; echo {starting.strip()} >/run/sshd.pid", check=True)
        assert await setting == ""
        assert (
            await answer_of(access.port, login.key, login.host_key, "hostname") == f"{vm.vm_id}\n"
        )
        report = await vm.stop()
    assert report.graceful
