"""The built-in Linux, as a newcomer uses it: commands, files, ports, and their errors."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    AsyncSmolVM,
    CommandFailedError,
    CommandTimeoutError,
    ConfigError,
    ConnectionLostError,
    FileTransferError,
    Status,
    UnsupportedError,
    VMCrashedError,
    VMNotRunningError,
)
from smolvm_async.controls.ssh import link
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Access
from smolvm_async.images.build.boot_files import ELF
from smolvm_async.images.build.debian import DebianImage, build_debian
from smolvm_async.qemu.pauses import Pauses
from tests.conftest import child_named, closed_since, descriptors, fill_up, run_of
from tests.integration.trees import digest_tree, make_tree

# A guest can set the chipset's sleep bits itself. It loses its memory, and boots when it is woken.
SLEEP_IN_S3 = """
cat >/tmp/sleep.py <<END
import ctypes, mmap, time
ctypes.CDLL(None).iopl(3)
time.sleep(0.5)
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("66ba0406 66b80024 66ef c3"))  # outw(SLP_TYP = 1, SLP_EN; PM1a_CNT); ret
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
END
python3 /tmp/sleep.py >/dev/null 2>&1 &
"""

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(100, func_only=True)]


@pytest.fixture
def linux(debian: DebianImage, data_dir: Path) -> Any:
    def make(**options: Any) -> AsyncSmolVM:
        return AsyncSmolVM(accel="tcg", data_dir=data_dir, **options)

    return make


@pytest.fixture(scope="module")
def shared_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
async def vm(shared_data_dir: Path) -> AsyncIterator[AsyncSmolVM]:
    """A guest for all tests that leave it as they found it: a boot takes longer than most tests."""
    await build_debian()
    vm = AsyncSmolVM(
        vm_id="shared",
        env={"FIRST": "1"},
        port_forwards=[8001],
        accel="tcg",
        data_dir=shared_data_dir,
    )
    await vm.start()
    await vm.run("true", check=True, timeout=240)  # the connection that they all use
    yield vm
    await vm.delete()


async def test_the_newcomers_line_answers(linux: Any, data_dir: Path) -> None:
    async with linux() as vm:
        result = await vm.run("uname -sm")
        assert result.stdout == "Linux x86_64\n"
        assert (result.exit_code, result.ok, result.stderr) == (0, True, "")
        assert 0 < result.duration < 30
        assert vm.boot_state == "ready"
        report = await vm.stop()
        assert (data_dir / vm.vm_id / "qemu.log").read_text() == ""
    assert report.graceful


async def test_the_userland_is_a_real_one(vm: AsyncSmolVM) -> None:
    programs = [
        "bash",
        "cat",
        "apt-get",
        "curl",
        "git",
        "python3",
        "ssh",
        "sshd",
        "ip",
        "ps",
        "sudo",
        "less",
        "xz",
        "unzip",
    ]
    found = await vm.run(f"command -v {' '.join(programs)}")
    assert len(found.stdout.split()) == len(programs)
    assert (await vm.run("dpkg --audit", check=True)).stdout == ""
    await vm.run("apt-get check", check=True)  # apt-get installs nothing while a package is missing
    assert (await vm.run("hostname")).stdout.strip() == vm.vm_id
    tls = "import ssl; print(len(ssl.create_default_context().get_ca_certs()))"
    assert int((await vm.run(f"python3 -c '{tls}'", check=True)).stdout) > 50
    assert (await vm.run("stat -c %a /root /usr/bin/sudo /tmp")).stdout.split() == [
        *("700", "4755", "1777")
    ]
    info = await vm.guest_info()
    assert (info.os_id, info.host_name, info.utc_offset) == ("debian", vm.vm_id, 0)
    assert info.addresses is not None
    assert "10.0.2.15" in info.addresses
    assert info.disks is not None
    assert [(disk.mount_point, disk.file_system) for disk in info.disks] == [("/", "ext4")]
    login = await vm.run("shopt -q login_shell && echo yes", shell="login")
    assert login.stdout == "yes\n"


async def test_many_commands_share_one_connection(vm: AsyncSmolVM) -> None:
    limit = asyncio.Semaphore(100)

    async def one(number: int) -> str:
        async with limit:
            return str((await vm.run(f"echo {number}", timeout=120)).stdout.strip())

    numbers = await asyncio.gather(*(one(number) for number in range(120)))
    assert numbers == [str(number) for number in range(120)]
    ports = (await vm.run("echo $SSH_CLIENT")).stdout.split()[1]
    assert (await vm.run("echo $SSH_CLIENT")).stdout.split()[1] == ports


async def test_output_of_any_size_and_kind_comes_whole(vm: AsyncSmolVM) -> None:
    big = await vm.run("head -c 20000000 /dev/zero", timeout=200, text=False)
    assert len(big.stdout) == 20_000_000
    odd = await vm.run(r"printf '\377\000\n'; printf 'e\314\201' >&2; exit 3", text=False)
    assert (odd.stdout, odd.exit_code) == (b"\xff\x00\n", 3)
    assert (await vm.run(r"printf '\377'")).stdout == "\ufffd"
    sent = os.urandom(3_000_000)
    echoed = await vm.run("cat", input=sent, text=False, timeout=200)
    assert echoed.stdout == sent
    assert (await vm.run("cat")).stdout == ""
    killed = await vm.run("kill -9 $$")
    assert killed.exit_code == -9
    with pytest.raises(CommandFailedError, match="no-such-thing") as caught:
        await vm.run("no-such-thing", check=True)
    assert caught.value.result.exit_code == 127


async def test_a_command_without_an_end_is_killed(vm: AsyncSmolVM) -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        await vm.run("echo begun; sleep 987 | cat", timeout=2)
    assert caught.value.stdout == "begun\n"
    waiting = asyncio.ensure_future(vm.run("sleep 986 | cat", timeout=None))
    while (await vm.run("pgrep -f 'sleep 98[6]'")).exit_code:
        await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with vm.run_stream("while sleep 0.01; do echo 985; done") as lines:
        async for line in lines:
            assert (line.text, line.stream) == ("985", "stdout")
            break
    assert (await vm.run("pgrep -f 'sleep [9]'; pgrep -f '[9]85'")).stdout == ""


async def test_lines_come_as_they_are_printed(vm: AsyncSmolVM) -> None:
    async with vm.run_stream("echo one; echo two >&2; read x; printf $x", input="end") as lines:
        seen = [(line.text, line.stream) async for line in lines]
    assert sorted(seen) == [("end", "stdout"), ("one", "stdout"), ("two", "stderr")]
    assert lines.exit_code == 0
    async with vm.run_stream("seq 200000") as lines:
        count = 0
        async for line in lines:
            count += 1
            assert line.text == str(count)
    assert count == 200_000


async def test_variables_are_on_no_command_line(vm: AsyncSmolVM) -> None:
    odd = 'it\'s "odd" $HOME `id` \\ \n é\n'
    assert await vm.list_env_vars() == {"FIRST": "1"}
    assert await vm.set_env_vars({"ODD": odd}) == ["FIRST", "ODD"]
    show = 'printf %s "$ODD"; printf %s "$FIRST" >&2'
    result = await vm.run(show)
    assert (result.stdout, result.stderr) == (odd, "1")
    see = "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'; cat; printf %s \"$SECRET\" | md5sum"
    result = await vm.run(see, env={"SECRET": f"s3cr3t{odd}"}, input="rest")
    assert "s3cr3t" not in result.stdout
    assert "rest" in result.stdout
    assert hashlib.md5(f"s3cr3t{odd}".encode()).hexdigest() in result.stdout
    assert await vm.unset_env_vars(["ODD", "NONE"]) == {"ODD": odd}
    assert (await vm.run("echo ${ODD-gone} $FIRST")).stdout == "gone 1\n"
    with pytest.raises(ConfigError, match="A-B"):
        await vm.set_env_vars({"A-B": "x"})


async def test_a_killed_ssh_server_and_a_reboot_are_told_and_survived(linux: Any) -> None:
    async with linux() as vm:
        with pytest.raises(ConnectionLostError):
            await vm.run("pkill -9 sshd; sleep 60")
        assert (await vm.run("echo again")).stdout == "again\n"
        waiting = asyncio.ensure_future(vm.run("sleep 100", timeout=None))
        before = (await vm.run("cat /proc/sys/kernel/random/boot_id")).stdout
        with pytest.raises(ConnectionLostError):
            await vm.run("reboot; sleep 60")
        with pytest.raises(ConnectionLostError):
            await waiting
        assert (await vm.run("cat /proc/sys/kernel/random/boot_id")).stdout != before
        waiting = asyncio.ensure_future(vm.run("sleep 100", timeout=None))
        await vm.run("true")
        await vm.run("(sleep 0.2; poweroff) >/dev/null 2>&1 &")
        with pytest.raises((ConnectionLostError, VMNotRunningError)):
            await waiting
        await vm.wait_stopped()
        with pytest.raises(VMNotRunningError):
            await vm.run("true")


async def test_files_and_trees_go_in_and_come_out_the_same(vm: AsyncSmolVM, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(20 << 20))
    make_tree(tmp_path / "tree", 300)
    steps: list[Any] = []
    assert await vm.upload_file(big, "/data/", on_progress=steps.append) == "/data/big"
    assert steps[-1].done == steps[-1].total == 20 << 20
    summed = (await vm.run("sha256sum /data/big", timeout=120)).stdout.split()[0]
    assert summed == hashlib.sha256(big.read_bytes()).hexdigest()
    back = await vm.download_file("/data/big", tmp_path / "back")
    assert back.read_bytes() == big.read_bytes()
    with pytest.raises(FileTransferError, match="max_bytes"):
        await vm.download_file("/data/big", tmp_path / "no", max_bytes=100)

    assert await vm.upload_file(tmp_path / "tree", "/data/tree") == "/data/tree"
    await vm.download_file("/data/tree", tmp_path / "came")
    assert digest_tree(tmp_path / "came") == digest_tree(tmp_path / "tree")
    (tmp_path / "tree" / "new").write_text("new")
    await vm.upload_file(tmp_path / "tree", "/data")  # is there: merged
    assert (await vm.run("cat /data/tree/new; ls -A /data")).stdout == "newbig\ntree\n"

    await vm.run("mkfifo /data/pipe; ln -s /data/big /data/l")
    with pytest.raises(FileTransferError, match="pipe"):
        await vm.download_file("/data", tmp_path / "all")
    assert not (tmp_path / "all").exists()
    with pytest.raises(FileTransferError, match="No such file"):
        await vm.download_file("/data/none", tmp_path / "none")
    with pytest.raises(ConfigError, match="guest_path"):
        await vm.upload_file(big, "relative")
    with pytest.raises(ConfigError, match="does not exist"):
        await vm.upload_file(tmp_path / "nothing", "/data/x")
    await vm.run("rm -r /data", check=True)


async def test_what_is_cancelled_or_does_not_fit_leaves_nothing(
    vm: AsyncSmolVM, tmp_path: Path, small_disk: Path
) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(20 << 20))
    await vm.run("mkdir /small && mount -t tmpfs -o size=1m tmpfs /small", check=True)
    with pytest.raises(FileTransferError, match="no space left on the guest's disk"):
        await vm.upload_file(big, "/small/big")
    assert (await vm.run("ls -A /small")).stdout == ""

    begun = asyncio.Event()
    upload = asyncio.ensure_future(
        vm.upload_file(big, "/root/big", on_progress=lambda _: begun.set())
    )
    await begun.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert "big" not in (await vm.run("ls -A /root")).stdout

    await vm.run("head -c 20000000 /dev/zero >/root/zeros", check=True, timeout=100)
    begun = asyncio.Event()
    download = asyncio.ensure_future(
        vm.download_file("/root/zeros", tmp_path / "zeros", on_progress=lambda _: begun.set())
    )
    await begun.wait()
    download.cancel()
    with pytest.raises(asyncio.CancelledError):
        await download
    assert not [path for path in tmp_path.iterdir() if "zeros" in path.name]
    fill_up(small_disk)
    with pytest.raises(FileTransferError, match="no space left on this host's disk"):
        await vm.download_file("/root/zeros", small_disk / "zeros")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    await vm.run("umount /small && rmdir /small && rm /root/zeros", check=True)


async def test_ports_are_forwarded_and_closed_again(vm: AsyncSmolVM) -> None:
    async def asked(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET /hostname HTTP/1.0\r\n\r\n")
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        (first,) = await vm.list_port_forwards()
        assert first.guest_port == 8001
        server = "cd /etc; setsid python3 -m http.server 8000 >/dev/null 2>&1 & "
        wait = "until ss -ltn | grep -q :8000; do sleep 0.1; done"
        await vm.run(server + wait, check=True, timeout=60)
        port = await vm.expose_local(8000)
        assert vm.vm_id.encode() in await asked(port)
        with pytest.raises(ConfigError, match=f"host_port={busy}"):
            await vm.expose_local(8000, busy)
        await vm.unexpose_local(port)
        with pytest.raises(OSError, match=str(port)):
            await asked(port)
        with pytest.raises(ConfigError, match="not forwarded"):
            await vm.unexpose_local(port)
        access = await vm.ssh_access()
        with pytest.raises(ConfigError, match="not forwarded"):
            await vm.unexpose_local(access.port)
        assert await vm.list_port_forwards() == [first]
        await vm.run("pkill -f [h]ttp.server", check=True)


async def test_a_paused_guest_goes_on_where_it_stood(vm: AsyncSmolVM) -> None:
    await vm.wait_for("ready")
    await vm.pause()
    assert str(vm.status) == Status.PAUSED
    with pytest.raises(
        CommandTimeoutError, match=r"(?s)not started within 0\.5 s.*guest is paused.*resume\(\)"
    ):
        await vm.run("true", timeout=0.5)
    with pytest.raises(CommandTimeoutError) as raised:
        async with vm.run_stream("true", timeout=0.5):
            pass
    assert raised.value.stdout == ""
    await vm.resume()
    assert str(vm.status) == Status.RUNNING
    assert (await vm.run("echo on")).stdout == "on\n"


@pytest.mark.timeout(300, func_only=True)
async def test_commands_and_transfers_of_all_processes_wait_for_the_end_of_a_pause(
    vm: AsyncSmolVM, shared_data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause is longer than the patience with a guest that does not answer."""
    patience = 1.0
    source = tmp_path / "source"
    source.write_bytes(os.urandom(4 << 20))
    before = descriptors()
    other, late = [await AsyncSmolVM.from_id("shared", data_dir=shared_data_dir) for _ in "12"]
    wait = "echo 1; until [ -e /root/go ]; do sleep 1; done; echo 2"
    started: list[asyncio.Event] = [asyncio.Event(), asyncio.Event()]

    async def lines(vm: AsyncSmolVM, first: asyncio.Event) -> str:
        text = ""
        async with vm.run_stream(wait) as stream:
            async for line in stream:
                text += line.text
                first.set()
        return text

    both = list(enumerate((vm, other)))
    begun: list[asyncio.Future[Any]] = [
        *(asyncio.ensure_future(lines(each, started[n])) for n, each in both),
        *(asyncio.ensure_future(each.run(wait, timeout=90)) for _, each in both),
        *(asyncio.ensure_future(each.upload_file(source, f"/root/{n}")) for n, each in both),
    ]
    for event in started:
        await event.wait()
    for name in ("PATIENCE", "KEEPALIVE"):  # asyncssh waits for three answers
        monkeypatch.setattr(link, name, patience)
    for each in (vm, other):
        run_of(each).link._keep_alive()
    await other.pause()
    begun += [asyncio.ensure_future(each.run("echo 3", timeout=90)) for each in (vm, other, late)]
    await asyncio.wait(begun, timeout=6 * patience)
    assert not any(task.done() for task in [*begun[:4], *begun[6:]])
    monkeypatch.undo()
    await other.resume()
    await vm.run("touch /root/go", check=True, timeout=90)
    results = await asyncio.gather(*begun)
    assert results[:2] == ["12", "12"]
    assert [result.stdout for result in (*results[2:4], *results[6:])] == [
        *("1\n2\n", "1\n2\n"),
        *("3\n", "3\n", "3\n"),
    ]
    for n, _ in both:
        await vm.download_file(f"/root/{n}", tmp_path / "target")
        assert digest_tree(tmp_path / "target") == digest_tree(source)
    await vm.run("rm /root/0 /root/1 /root/go", check=True)
    for each in (other, late):
        await each.detach()
    await closed_since(before)


async def guest_time(vm: AsyncSmolVM) -> float:
    return float((await vm.run("date +%s.%N", timeout=60, check=True)).stdout)


@pytest.mark.parametrize("ended_by", ["resume()", "another process", "a QMP client"])
async def test_after_a_pause_the_guest_has_the_hosts_time(
    vm: AsyncSmolVM, shared_data_dir: Path, ended_by: str
) -> None:
    files = descriptors()
    other = await AsyncSmolVM.from_id("shared", data_dir=shared_data_dir)
    await vm.run("date -s @$(($(date +%s) - 3600))", check=True)  # as after a long pause
    await vm.pause()
    waiting = [asyncio.ensure_future(guest_time(each)) for each in (vm, other)]
    await asyncio.sleep(0)
    before = time.time()
    if ended_by == "a QMP client":
        await run_of(vm)._monitor.execute("cont")
    else:
        await (vm if ended_by == "resume()" else other).resume()
    for known in await asyncio.gather(*waiting, guest_time(vm)):
        assert before - 2 <= known <= time.time() + 2
    await other.detach()
    await closed_since(files)


async def test_a_clock_that_cannot_be_set_is_told_and_fails_nothing(
    vm: AsyncSmolVM, shared_data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = descriptors()
    other = await AsyncSmolVM.from_id("shared", data_dir=shared_data_dir)
    await vm.run("mv /bin/date /bin/no-date", check=True)
    for each in (vm, other):
        await each.pause()
        await each.resume()
    await vm.run("mv /bin/no-date /bin/date", check=True)
    assert caplog.text.count("is late by the pause, and could not be set") == 3  # 2 by the owner
    assert "date: not found" in caplog.text
    await other.detach()
    await closed_since(files)


@pytest.mark.timeout(300, func_only=True)
async def test_a_guest_has_no_sleep_state_from_which_nothing_wakes_it(linux: Any) -> None:
    async with linux() as vm:
        states = await vm.run("dmesg | grep -o 'ACPI: PM: (supports.*'", timeout=240)
        assert states.stdout == "ACPI: PM: (supports S0 S5)\n"
        await vm.run("(sleep 0.1; echo mem >/sys/power/state) >/dev/null 2>&1 &", check=True)
        with pytest.raises(CommandTimeoutError):
            while True:
                await vm.run("true", timeout=5)
        await vm.keyboard.press("space")
        await vm.run("true", check=True)

        events = vm.events()
        await vm.run(SLEEP_IN_S3, check=True)
        async for event in events:
            if event.name == "SUSPEND":
                break
        assert vm.status is Status.PAUSED
        with pytest.raises(CommandTimeoutError, match="The guest has suspended itself"):
            await vm.run("true", timeout=0.5)
        await vm.resume()
        async for event in events:  # the firmware finds nothing to go on with
            if event.name == "RESET":
                break
        await vm.run("true", check=True, timeout=60)
        assert (await vm.stop()).graceful


async def test_another_handle_of_the_vm_does_the_same(
    vm: AsyncSmolVM, shared_data_dir: Path
) -> None:
    before = descriptors()
    other = await AsyncSmolVM.from_id(vm.vm_id, data_dir=shared_data_dir)
    async with other:
        assert (await other.run("hostname")).stdout == "shared\n"
        port = await other.expose_local(80)
        assert port in [forward.host_port for forward in await vm.list_port_forwards()]
        await other.unexpose_local(port)
    await closed_since(before)


async def test_a_kept_vm_has_its_disk_and_its_keys_which_no_other_has(
    linux: Any, data_dir: Path, vm: AsyncSmolVM
) -> None:
    of_another = await vm.ssh_access()
    async with linux(vm_id="kept", keep=True) as vm:
        await vm.run("echo precious >/root/note; sync", check=True)
        before = await vm.ssh_access()
        assert before.host_key != of_another.host_key
    vm = await AsyncSmolVM.from_id("kept", data_dir=data_dir)
    async with vm:
        assert (await vm.run("cat /root/note")).stdout == "precious\n"
        after = await vm.ssh_access()
        assert (after.user, after.host_key) == (before.user, before.host_key)
    await vm.delete()


async def test_a_disk_with_a_kernel_of_its_own_boots(debian: DebianImage, data_dir: Path) -> None:
    assert debian.kernel.read_bytes().startswith(ELF), "the kernel was not decompressed"
    vm = AsyncSmolVM(
        os="linux",
        image=debian.disk,
        kernel=debian.kernel,
        initrd=debian.initrd,
        boot_args=debian.boot_args,
        cpus=2,
        accel="tcg",
        data_dir=data_dir,
    )
    async with vm:
        assert (await vm.run("id -un; nproc", timeout=240)).stdout == "root\n2\n"
        await vm.stop(timeout=0)


async def test_what_windows_lacks_is_said_at_once(blank_image: Path, data_dir: Path) -> None:
    vm = AsyncSmolVM(os="windows", image=blank_image, accel="tcg", data_dir=data_dir)
    with pytest.raises(UnsupportedError, match="not available for Windows guests"):
        await vm.open_terminal()


async def test_a_port_that_never_speaks_costs_a_moment(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        async def access() -> Access:
            return Access(silent.getsockname()[1], "root", "", "")

        began = time.monotonic()
        assert await Link("silent", access, Pauses()).connect() is False
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("stage", ["firmware", "operating_system", "ready", "a command runs"])
async def test_what_is_cancelled_at_any_stage_leaves_nothing(
    linux: Any, data_dir: Path, stage: str
) -> None:
    begun = asyncio.Event()

    async def use() -> None:
        async with linux(env={"A": "1"}) as vm:
            if stage != "a command runs":
                await vm.wait_for(stage)
                begun.set()
            async with vm.run_stream("echo begun; sleep 1000") as lines:
                async for _ in lines:
                    begun.set()

    using = asyncio.ensure_future(use())
    await begun.wait()
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert not [*data_dir.iterdir()]


async def test_a_qemu_that_dies_ends_what_goes_on_in_its_guest(linux: Any, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(30 << 20))
    with pytest.raises(VMCrashedError):
        async with linux() as vm:
            work = [
                asyncio.ensure_future(vm.run("sleep 1000", timeout=None)),
                asyncio.ensure_future(vm.upload_file(tmp_path / "big", "/root/big")),
            ]
            await vm.run("true")
            os.kill(child_named("qemu", vm.vm_id), signal.SIGKILL)
            await asyncio.gather(*work)  # the body may see the lost connection before the crash
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    wanted = (ConnectionLostError, VMCrashedError)
    assert [outcome for outcome in outcomes if not isinstance(outcome, wanted)] == []
