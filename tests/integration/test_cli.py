"""The command line, as its users have it: output, signals and exit codes.

A command without a VM of its own runs in the process of the test, since an interpreter takes half a
second to start. A real process runs where it matters: `run`, signals, terminals, pipes.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import Screenshot, VMInfo
from smolvm_async.cli.app import main
from smolvm_async.doctor import Report

CLI = [sys.executable, "-m", "smolvm_async"]
SCRIPT = Path(sys.executable).with_name("smolvm-async")
PATIENCE = 60  # seconds
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
UP = "tcg"  # is in the line, in words or as JSON, that says that the VM runs


def execute(
    *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Execute a command in this process, with stdout and stderr that are not terminals."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        for name, stream in (("stdin", nothing), ("stdout", output), ("stderr", errors)):
            patch.setattr(sys, name, stream)
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # the command replaces it
        for variable, value in (env or {}).items():
            patch.setenv(variable, value)
        if cwd is not None:
            patch.chdir(cwd)
        with pytest.raises(SystemExit) as ended:
            main()
    code = int(ended.value.code or 0)
    del ended
    gc.collect()  # frees what the traceback held; a process of its own would end here
    texts = [stream.buffer.getvalue().decode() for stream in (output, errors)]
    return subprocess.CompletedProcess(sys.argv, code, *texts)


def cli(*arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Execute a command that must end with this exit code."""
    done = execute(*arguments, **options)
    assert done.returncode == code, done
    assert "\x1b" not in done.stdout + done.stderr, "no colours in a pipe"
    return done


def document(*arguments: object, code: int = 0, **options: Any) -> Any:
    """Return the one JSON document that a command writes; its stderr is empty."""
    done = cli(*arguments, "--json", code=code, **options)
    assert done.stderr == ""
    return json.loads(done.stdout)


def as_usual() -> None:
    """Ignore no signal, as in a foreground command of a shell: children inherit ignored signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def as_nohup() -> None:
    as_usual()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Running:
    """`smolvm-async run`, with what it has written so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def until(self, word: str) -> str:
        """Read on to the line with that word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if word in line:
                return line
        raise AssertionError(f"no {word!r} in {self.lines}; {self.process.communicate()}")

    def end(self) -> tuple[str, str, int]:
        """Its whole output, stderr and exit code."""
        output, errors = self.process.communicate(timeout=PATIENCE)
        assert "Traceback" not in errors
        return "".join(self.lines) + output, errors, self.process.returncode

    def events(self) -> list[dict[str, Any]]:
        """Wait for its end, and return all that it has written with --json."""
        return [json.loads(line) for line in self.end()[0].splitlines()]

    def kill(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def child(self, name: str) -> int:
        """The process id of its QEMU or swtpm."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().startswith(name):
                    return int(pid)
        raise AssertionError(f"it has no {name}")


Run = Callable[..., contextlib.AbstractContextManager[Running]]


@pytest.fixture
def run(blank_image: Path, data_dir: Path) -> Run:
    """Starts `smolvm-async run` of a blank image; the VM is up."""

    @contextlib.contextmanager
    def start(*arguments: str, up: bool = True, preexec: Any = as_usual) -> Iterator[Running]:
        image = [] if "--id" in arguments and "again" in arguments else [str(blank_image)]
        machine = ["--os", "windows", "--accel", "tcg"] if image else []
        words = [word for word in arguments if word != "again"]
        command = ["run", *image, *machine, "--data-dir", str(data_dir), *words]
        with started(*command, preexec=preexec) as running:
            if up:
                running.until(UP)
            yield running

    return start


@contextlib.contextmanager
def started(*arguments: str, preexec: Any = as_usual) -> Iterator[Running]:
    """Start a command that holds VMs."""
    with subprocess.Popen(
        [*CLI, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec,
    ) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


def terminal(*arguments: object, typed: str = "", **env: str) -> tuple[str, int]:
    """Run a command on a terminal, type on it, and return the output and the exit code."""
    pid, fd = pty.fork()
    if pid == 0:
        as_usual()
        command = [*CLI, *map(str, arguments)]
        os.execve(command[0], command, {**os.environ, "TERM": "xterm-256color", **env})
    os.write(fd, typed.encode())
    output = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal
        while data := os.read(fd, 65536):
            output += data
    os.close(fd)
    return output.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# run


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_stops_the_vm(run: Run, number: signal.Signals) -> None:
    with run("--id", "one") as running:
        running.kill(number)
        output, errors, code = running.end()
    assert code == 0
    assert errors == ""
    assert [line.split()[2] for line in output.splitlines() if " s  " in line] == [
        *("launching", "firmware"),
        *("stop", "stop", "stop"),
    ]
    assert "Stopping one. Another Ctrl-C kills the VM at once." in output
    assert "no operating system runs, so the guest cannot power down" in output
    assert "one has stopped: QEMU was told to quit (quit, 0." in output


def test_a_program_gets_all_of_it_as_json(run: Run) -> None:
    with run("--id", "one", "--json") as running:
        running.kill(signal.SIGINT)
        events = running.events()
    assert running.process.returncode == 0
    assert [event["event"] for event in events] == [
        *("starting", "boot_state", "boot_state", "started", "stopping"),
        *("progress", "progress", "progress", "ended"),
    ]
    assert [event["state"] for event in events[1:3]] == ["launching", "firmware"]
    assert events[2]["evidence"] == "QEMU runs the guest's processors (cont)"
    assert 0 < events[2]["elapsed"] < PATIENCE
    assert events[3]["accelerator"] == "tcg"
    assert events[4]["signal"] == "SIGINT"
    end = events[-1]
    assert (end["vm_id"], end["rung"], end["graceful"]) == ("one", "quit", False)
    assert [step["rung"] for step in end["steps"]] == ["powerdown", "quit"]


@pytest.mark.parametrize("keep", [False, True])
def test_the_second_signal_kills_the_vm(run: Run, data_dir: Path, keep: bool) -> None:
    with run("--id", "one", *["--keep"][: int(keep)]) as running:
        os.kill(running.child("qemu"), signal.SIGSTOP)  # it would climb the ladder for a minute
        running.kill(signal.SIGINT)
        running.until("Another Ctrl-C")
        running.kill(signal.SIGINT)
        output, errors, code = running.end()
    assert code == 128 + signal.SIGINT
    assert "one was killed." in output
    assert errors == "Error: interrupted by SIGINT\n"
    assert ("one is kept" in output) == keep
    if keep:
        cli("delete", "--yes", "one", "--data-dir", data_dir)


def test_a_terminal_that_closes_may_say_so_twice(run: Run) -> None:
    with run("--json") as running:
        running.kill(signal.SIGHUP)
        running.until("stopping")
        running.kill(signal.SIGHUP)
        assert running.events()[-1]["event"] == "ended"
    assert running.process.returncode == 0


def test_nohup_is_respected(run: Run) -> None:
    with run("--json", preexec=as_nohup) as running:
        running.kill(signal.SIGHUP)
        running.kill(signal.SIGTERM)
        assert json.loads(running.until("stopping"))["signal"] == "SIGTERM"
        running.end()
    assert running.process.returncode == 0


@pytest.mark.parametrize("keep", [False, True])
def test_a_crash_is_told_and_fails(run: Run, data_dir: Path, keep: bool) -> None:
    with run("--id", "one", *["--keep"][: int(keep)]) as running:
        os.kill(running.child("qemu"), signal.SIGKILL)
        output, errors, code = running.end()
    assert code == 1
    assert errors.startswith("Error: one crashed: QEMU ended: killed by SIGKILL.\n")
    assert ("one is kept" in output) == keep
    if keep:
        (info,) = document("list", "--data-dir", data_dir)
        assert info["status"] == "crashed"
        assert "already stopped" in cli("stop", "one", "--data-dir", data_dir).stdout
        cli("delete", "--yes", "one", "--data-dir", data_dir)


def test_a_crash_is_the_last_line_of_json(run: Run) -> None:
    with run("--json") as running:
        os.kill(running.child("swtpm"), signal.SIGKILL)
        error = running.events()[-1]["error"]
    assert running.process.returncode == 1
    assert error["type"] == "VMCrashedError"
    assert "swtpm ended: killed by SIGKILL" in error["message"]


def test_a_reader_that_goes_away_stops_the_vm(run: Run, data_dir: Path) -> None:
    with run("--id", "one") as running:
        assert running.process.stdout is not None
        running.process.stdout.close()
        cli("stop", "one", "--data-dir", data_dir)  # whose steps it cannot tell any more
        assert running.process.wait(PATIENCE) == 0
        assert running.process.stderr is not None
        assert running.process.stderr.read() == ""


def test_a_program_that_has_gone_before_is_noticed_too(blank_image: Path, data_dir: Path) -> None:
    command = [*CLI, "run", str(blank_image), "--os", "windows", "--accel", "tcg"]
    with subprocess.Popen(
        [*command, "--data-dir", str(data_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.qcow2", "--os", "beos"], "--os"),
        (["x.qcow2"], "--os is missing"),
        (["x.qcow2", "--os", "windows", "--memory", "100"], "--memory 100 is less than"),
        (["x.qcow2", "--os", "windows", "--boot", "warm"], "--boot warm is only for"),
        (["/nowhere/x.qcow2", "--os", "windows"], "/nowhere/x.qcow2"),
        (["x.qcow2", "--os", "windows", "--user", "me"], "pass --password-file or --key too"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], words: str) -> None:
    errors = cli("run", *arguments, code=2).stderr
    assert words in " ".join(errors.replace("│", " ").split())


def test_an_id_that_is_taken_is_told(run: Run, blank_image: Path, data_dir: Path) -> None:
    arguments = ["--os", "windows", "--accel", "tcg", "--id", "one", "--data-dir", str(data_dir)]
    with run("--id", "one") as running:
        told = cli("run", f"file://{blank_image}", *arguments, code=2)
        assert "--id one belongs to a VM that" in told.stderr
        running.kill(signal.SIGINT)
        running.end()


def test_what_the_host_lacks_has_an_exit_code(
    blank_image: Path, data_dir: Path, tmp_path: Path
) -> None:
    arguments = ["run", blank_image, "--os", "windows", "--data-dir", data_dir]
    env = {"PATH": str(tmp_path)}
    assert cli(*arguments, code=3, env=env).stderr.startswith("Error: ")
    error = document(*arguments, code=3, env=env)["error"]
    assert error["type"] == "HostError"
    assert "swtpm" in error["missing"]
    assert error["message"].endswith(error["hint"])


def test_the_missing_accelerator_is_one_line(blank_image: Path, data_dir: Path) -> None:
    with subprocess.Popen(
        [*CLI, "run", str(blank_image), "--os", "windows", "--data-dir", str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_usual,
    ) as process:
        running = Running(process)
        running.until("runs under")
        running.kill(signal.SIGINT)
        _, errors, _ = running.end()
    assert len(errors.splitlines()) <= 1  # none where KVM works
    assert all(line.startswith("Warning: KVM ") for line in errors.splitlines())


def test_verbose_shows_the_command_lines(blank_image: Path, data_dir: Path) -> None:
    arguments = ["--os", "windows", "--accel", "tcg", "--data-dir", str(data_dir), "--id", "one"]
    with subprocess.Popen(
        [*CLI, "-v", "run", str(blank_image), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_usual,
    ) as process:
        running = Running(process)
        running.until(UP)
        running.kill(signal.SIGINT)
        _, errors, _ = running.end()
    assert "one: QEMU: /" in errors
    assert " -nodefaults " in errors


# The other commands, beside a VM that runs


def test_a_running_vm_is_listed(run: Run, blank_image: Path, data_dir: Path) -> None:
    name = "a-name-of-sixty-three-characters-which-is-as-long-as-they-can-b"
    with run("--id", name, "--label", "task=42", "--label", "of=a=b") as running:
        (info,) = document("list", "--data-dir", data_dir, "--label", "task=42")
        assert document("list", "--data-dir", data_dir, "--label", "task=4") == []
        lines = cli("list", "--data-dir", data_dir).stdout.splitlines()
        used = document("stats", name, "--data-dir", data_dir)
        table = cli("stats", name, "--data-dir", data_dir).stdout.splitlines()
        running.kill(signal.SIGINT)
        running.end()
    owner = running.process.pid
    assert 0 <= info.pop("age") < PATIENCE
    assert info["resident"] > 0
    assert info["processors"] > 0
    assert (used["vm_id"], used["resident"] > 0, used["network_sent"]) == (name, True, None)
    assert table[0].split()[:2] == ["PROCESSORS", "RESIDENT"]
    assert float(table[1].split()[0]) > 0
    assert (
        info
        | {
            "vm_id": name,
            "os": "windows",
            "status": "running",
            "owner": owner,
            "memory": 4096,
            "keep": False,
            "image": str(blank_image),
            "labels": {"task": "42", "of": "a=b"},
        }
        == info
    )
    columns = [field.name.removeprefix("vm_").upper() for field in fields(VMInfo)]
    columns.remove("HOST")  # it would be empty
    assert lines[0].split() == columns
    words = lines[1].split()
    assert words[:4] == [name, "windows", "running", str(owner)]
    assert " ".join(("4096", "MiB", "no", str(blank_image))) in " ".join(words)


def test_it_ends_with_its_time(run: Run, data_dir: Path) -> None:
    with run("--id", "one", "--ttl", "1", "--keep") as running:
        output, _, code = running.end()
    assert "one has stopped: the VM's time was over (ttl, 0.00 s)." in output
    assert (code, document("list", "--data-dir", data_dir)) == (0, [])


def test_it_is_stopped_from_elsewhere(run: Run, data_dir: Path) -> None:
    with run("--id", "one") as running:
        output = cli("stop", "one", "--data-dir", data_dir).stdout
        assert output.startswith("one has stopped: QEMU was told to quit (quit, 0.")
        output, errors, code = running.end()
    assert (errors, code) == ("", 0)
    assert "one has stopped: QEMU was told to quit" in output


def test_it_is_stopped_from_elsewhere_by_a_program(run: Run, data_dir: Path) -> None:
    with run("--id", "one") as running:
        ended = document("stop", "one", "--timeout", "0", "--data-dir", data_dir)
        running.end()
    assert (ended["vm_id"], ended["rung"]) == ("one", "quit")
    assert [step["rung"] for step in ended["steps"]] == ["quit"]


@pytest.mark.parametrize("as_json", [False, True])
def test_it_is_deleted_from_elsewhere(run: Run, data_dir: Path, as_json: bool) -> None:
    with run("--id", "one") as running:
        if as_json:
            assert document("delete", "one", "--data-dir", data_dir) == {"deleted": ["one"]}
        else:
            assert cli("delete", "one", "--data-dir", data_dir).stdout == "one is deleted.\n"
        output, errors, code = running.end()
    assert (errors, code) == ("", 0)
    assert "one has stopped: QEMU was killed" in output


def test_its_console_and_logs_are_shown_and_followed(run: Run, data_dir: Path) -> None:
    with run("--id", "one") as running:
        deadline = time.monotonic() + PATIENCE
        text = ""
        while "\x1b[2J" not in text:  # what the firmware wrote, as it is
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
            text = execute("logs", "one", "--data-dir", data_dir).stdout
        told = document("logs", "one", "--data-dir", data_dir)
        assert (told["vm_id"], told["source"]) == ("one", "console")
        assert told["text"].startswith(text)
        for source in ("qemu", "swtpm"):
            told = document("logs", "one", "--source", source, "--data-dir", data_dir)
            assert told["source"] == source
        assert "Error" not in cli("logs", "one", "--source", "qemu", "--data-dir", data_dir).stdout
        log = data_dir / "one" / "qemu.log"
        log.write_text("x" * 100)
        with follow("console", data_dir) as console, follow("qemu", data_dir) as qemu:
            for source, follower in (("console", console), ("qemu", qemu)):
                assert follower.stdout is not None
                assert json.loads(follower.stdout.readline())["source"] == source
            log.write_text("anew")
            assert qemu.stdout is not None
            assert json.loads(qemu.stdout.readline())["text"] == "anew"
            running.kill(signal.SIGINT)
            running.end()
            for follower in (console, qemu):
                follower.communicate(timeout=PATIENCE)
                assert follower.returncode == 0  # it ends with the VM


def follow(source: str, data_dir: Path) -> subprocess.Popen[str]:
    command = [*CLI, "logs", "-f", "--json", "one", "--source", source, "--data-dir", str(data_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_another_program_owns_is_reached_as_well(blank_image: Path, data_dir: Path) -> None:
    owner = """
import asyncio, sys
from smolvm_async import AsyncSmolVM

async def main():
    arguments = {"image": sys.argv[1], "data_dir": sys.argv[2], "vm_id": "one", "accel": "tcg"}
    async with AsyncSmolVM(os="windows", **arguments) as vm:
        print("up", flush=True)
        await vm.wait_stopped()

asyncio.run(main())
"""
    command = [sys.executable, "-c", owner, str(blank_image), str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert "running" in cli("list", "--data-dir", data_dir).stdout
        assert document("stop", "one", "--data-dir", data_dir)["rung"] == "quit"
        assert process.wait(PATIENCE) == 0


# VMs at rest, and none at all


def test_a_kept_vm_is_booted_again_and_deleted(run: Run, data_dir: Path) -> None:
    place = ["--data-dir", str(data_dir)]
    with run("--id", "one", "--keep") as running:
        running.kill(signal.SIGINT)
        output, _, code = running.end()
    assert code == 0
    assert f"smolvm-async run --id one --data-dir {data_dir}\n" in output
    assert f"smolvm-async delete one --data-dir {data_dir}\n" in output
    assert cli("stop", "one", *place).stdout == "one is already stopped.\n"
    assert document("stop", "one", *place)["rung"] == "none"
    assert "only a running VM has a console" in cli("logs", "one", *place, code=1).stderr
    assert document("logs", "one", *place, code=1)["error"]["type"] == "VMNotRunningError"
    assert cli("prune", *place).stdout == "Nothing to remove.\n"
    with run("again", "--id", "one", "--json") as running:
        refused = document("run", "--id", "one", *place, code=2)
        assert "one is already running" in refused["error"]["message"]
        running.kill(signal.SIGINT)
        events = running.events()
    assert [event["event"] for event in events[-2:]] == ["ended", "kept"]
    assert "pass --yes" in cli("delete", "one", *place, code=2).stderr
    refused = document("delete", "one", *place, code=2)
    assert "pass --yes" in refused["error"]["message"]
    output, code = terminal("delete", "one", *place, typed="n\n")
    assert "Delete permanently: one? [y/N]" in output
    assert code == 1
    assert [info["status"] for info in document("list", *place)] == ["stopped"]
    output, code = terminal("delete", "one", *place, typed="y\n")
    assert "one is deleted." in output
    assert code == 0
    assert document("list", *place) == []


def test_a_log_is_the_readers_and_not_the_terminals(run: Run, data_dir: Path) -> None:
    with run("--id", "one", "--keep") as running:
        running.kill(signal.SIGINT)
        running.end()
    (data_dir / "one" / "qemu.log").write_text("clear \x1b[2Jthe screen\n")
    arguments = ["logs", "one", "--source", "qemu", "--data-dir", str(data_dir)]
    assert execute(*arguments).stdout == "clear \x1b[2Jthe screen\n"
    assert terminal(*arguments) == ("clear the screen\r\n", 0)
    cli("delete", "--yes", "one", "--data-dir", data_dir)


@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_killed_run_leaves_is_pruned(run: Run, data_dir: Path, as_json: bool) -> None:
    place = ["--data-dir", str(data_dir)]
    for vm_id, keep in (("gone", []), ("kept", ["--keep"])):
        with run("--id", vm_id, *keep) as running:
            running.kill(signal.SIGKILL)
            running.end()
    infos = document("list", *place)
    assert {(info["vm_id"], info["status"], info["owner"]) for info in infos} == {
        ("gone", "orphaned", None),
        ("kept", "orphaned", None),
    }
    assert "smolvm-async prune" in cli("stop", "gone", *place, code=1).stderr
    assert document("logs", "gone", "--source", "qemu", *place)["text"] == ""
    if as_json:
        pruned = document("prune", *place)
        assert {info["vm_id"] for info in pruned} == {"gone", "kept"}
    else:
        assert set(cli("prune", *place).stdout.splitlines()) == {
            "Removed gone.",
            "kept is kept; its status is now stopped.",
        }
    (info,) = document("list", *place)
    assert (info["vm_id"], info["status"]) == ("kept", "stopped")
    assert document("prune", *place) == []
    cli("delete", "--yes", "kept", *place)


# snapshot, fork


def test_a_vm_of_another_process_is_saved_restored_and_forked(run: Run, data_dir: Path) -> None:
    place = ["--data-dir", str(data_dir)]
    times = ["--label", "of=one", "--ttl", "9000", "--idle-timeout", "900"]
    with run("--id", "one", "--memory", "2048") as running:
        made = document("snapshot", "create", "one", "first", "--label", "a=b=c", *place)
        assert (made["name"], made["vm_id"], made["live"]) == ("first", "one", True)
        assert made["labels"] == {"a": "b=c"}
        taken = document("snapshot", "create", "one", "first", *place, code=2)["error"]
        assert taken["type"] == "SnapshotExistsError"
        with (
            started("snapshot", "restore", "first", "--id", "two", "--keep", *place) as restored,
            started("fork", "one", "-n", "2", "--json", *times, *place) as forked,
        ):
            assert "two runs under" in restored.until(UP)
            clones = {json.loads(forked.until('"started"'))["vm_id"] for _ in range(2)}
            infos = document("list", *place)
            assert {info["vm_id"] for info in infos} == {"one", "two", *clones}
            assert {info["status"] for info in infos} == {"running"}
            labelled = document("list", "--label", "of=one", *place)
            assert {info["vm_id"] for info in labelled} == clones
            for name in clones:
                config = json.loads((data_dir / name / "vm.json").read_text())["config"]
                assert (config["ttl"], config["idle_timeout"]) == (9000, 900)
            assert [info["name"] for info in document("snapshot", "list", *place)] == ["first"]
            for command in (restored, forked):
                command.kill(signal.SIGINT)
            ends = [event for event in forked.events() if event["event"] == "ended"]
            output, errors, code = restored.end()
        assert {end["vm_id"] for end in ends} == clones
        assert (errors, code, forked.process.returncode) == ("", 0, 0)
        assert "restored from a snapshot of one" in output
        assert "two is kept." in output
        running.kill(signal.SIGINT)
        running.end()
    said = cli("snapshot", "create", "two", "second", *place).stdout  # at rest
    assert said.startswith("Snapshot second of two takes ")
    lines = cli("snapshot", "list", *place).stdout.splitlines()
    assert lines[0].split()[:3] == ["NAME", "ID", "OS"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["first", "one", "windows"],
        ["second", "two", "windows"],
    ]
    cli("delete", "--yes", "two", *place)
    assert "'third'" in cli("snapshot", "delete", "first", "third", *place, code=4).stderr
    deleted = document("snapshot", "delete", "first", "second", "first", *place)
    assert deleted == {"deleted": ["first", "second"]}
    assert cli("snapshot", "list", *place).stdout == "There are no snapshots.\n"


def test_what_cannot_be_saved_restored_or_forked_is_told(data_dir: Path, tmp_path: Path) -> None:
    place = ("--data-dir", data_dir)
    for arguments in (["snapshot", "create", "one", "first"], ["fork", "one"]):
        assert "there is no VM 'one'" in cli(*arguments, *place, code=4).stderr
    assert (
        "there is no snapshot 'first'" in cli("snapshot", "restore", "first", *place, code=4).stderr
    )
    cli("snapshot", "create", "one", "first", "--label", "a", *place, code=2)
    cli("fork", "one", "-n", "0", *place, code=2)


def test_the_snapshots_of_ready_guests_are_removed(data_dir: Path, tmp_path: Path) -> None:
    cached = tmp_path / "smolvm-async" / "warm" / "ready-0123456789abcdef"
    cached.mkdir(0o700, parents=True)
    (cached / "snapshot.json").write_text("damaged, but a snapshot")
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    cli("prune", "--data-dir", data_dir, env=env)
    assert cached.exists()
    done = cli("prune", "--warm", "--data-dir", data_dir, env=env)
    assert done.stdout == "Removed the snapshots of ready guests.\n"
    assert not cached.exists()


# screenshot, vnc


def test_a_picture_of_the_screen_is_saved(run: Run, data_dir: Path, tmp_path: Path) -> None:
    place = ("--data-dir", data_dir)
    with run("--id", "one", "--resolution", "1024x768") as running:
        file = tmp_path / "picture.png"
        assert cli("screenshot", "one", "-o", file, *place).stdout == f"{file}: 640x480\n"
        assert Screenshot.from_png(file.read_bytes()).size == (640, 480)
        assert cli("screenshot", "one", *place, cwd=tmp_path).stdout == "one.png: 640x480\n"
        told = document("screenshot", "one", "-o", file.with_suffix(".ppm"), *place)
        assert (told["vm_id"], told["width"], told["height"]) == ("one", 640, 480)
        assert Screenshot.from_ppm(Path(told["path"]).read_bytes()).size == (640, 480)
        piped = subprocess.run(
            [*CLI, "screenshot", "one", "-o", "-", *place], capture_output=True, check=True
        )
        assert Screenshot.from_png(piped.stdout).size == (640, 480)
        for wrong in (
            ["-o", tmp_path / "nowhere" / "x.png"],
            ["-o", tmp_path / "x.what"],
            ["-o", "-", "--json"],
            ["--display", "second"],
        ):
            cli("screenshot", "one", *wrong, *place, code=2, cwd=tmp_path)
        running.kill(signal.SIGINT)
        running.end()


def test_a_terminal_is_spared_the_picture(run: Run, data_dir: Path) -> None:
    with run("--id", "one") as running:
        shown, code = terminal("screenshot", "one", "-o", "-", "--data-dir", data_dir)
        assert ("pass a file" in shown, code) == (True, 2)
        running.kill(signal.SIGINT)
        running.end()


def test_vnc_is_turned_on_and_off(run: Run, data_dir: Path) -> None:
    place = ("--data-dir", data_dir)
    with run("--id", "one") as running:
        url = document("vnc", "one", *place)["url"]
        assert re.fullmatch(r"vnc://:\w{8}@127\.0\.0\.1:\d+", url)
        shown = cli("vnc", "one", *place).stdout
        assert shown.startswith(f"{url}\nHere:           vncviewer 127.0.0.1::")
        socket = cli("vnc", "one", "--kind", "unix", *place).stdout
        assert f"vncviewer {data_dir}/one/vnc.sock\n" in socket
        assert f"ssh -L 5901:{data_dir}/one/vnc.sock " in socket
        assert cli("vnc", "one", "--off", *place).stdout == "The VNC server of one is off.\n"
        assert document("vnc", "one", "--off", *place) == {"vm_id": "one", "url": None}
        cli("vnc", "one", "--off", "--kind", "unix", *place, code=2)
        running.kill(signal.SIGINT)
        running.end()
    with run("--id", "two", "--vnc", "unix") as running:
        assert document("vnc", "two", *place)["url"].startswith("vnc+unix://:")
        running.kill(signal.SIGINT)
        running.end()


def test_a_vm_at_rest_has_no_screen(run: Run, data_dir: Path) -> None:
    with run("--id", "kept", "--keep") as running:
        running.kill(signal.SIGINT)
        running.end()
    for command in ("screenshot", "vnc"):
        error = document(command, "kept", "--data-dir", data_dir, code=1)["error"]
        assert error["type"] == "VMNotRunningError"
        assert f"smolvm-async run --id kept --data-dir {data_dir}" in error["message"]
    wrong = ["run", "--id", "kept", "--memory", "4096", "--data-dir", data_dir]
    assert "leave out --memory" in cli(*wrong, code=2).stderr
    cli("delete", "--yes", "kept", "--data-dir", data_dir)


# No VM


def test_settings_for_an_id_without_a_vm_say_how_to_make_one(data_dir: Path) -> None:
    made = ["run", "--id", "x", "--keep", "--memory", "4096", "--data-dir", data_dir]
    told = cli(*made, code=4).stderr
    assert "there is no VM 'x'" in told
    assert "pass an IMAGE, or --os linux" in told


@pytest.mark.parametrize("command", ["list", "run", "doctor", "image list", "image prune"])
def test_a_home_that_cannot_be_found_is_told(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("smolvm_async.foundation.paths._recorded_home", lambda: "")
    error = document(*command.split(), code=2, env={"HOME": "relative"})["error"]
    assert error["type"] == "ConfigError"
    assert "Set HOME or XDG_" in error["message"]


def test_no_vm_is_no_error_but_for_those_that_name_one(data_dir: Path) -> None:
    place = ["--data-dir", str(data_dir)]
    assert cli("list", *place).stdout == "There are no VMs.\n"
    assert document("list", *place) == []
    assert cli("prune", *place).stdout == "Nothing to remove.\n"
    assert document("prune", *place) == []
    known = (["stop"], ["delete"], ["logs"], ["logs", "--source=qemu"], ["run", "--id"])
    for command in (*known, ["screenshot"], ["vnc"]):
        assert "there is no VM 'none'" in cli(*command, "none", *place, code=4).stderr
        error = document(*command, "none", *place, code=4)["error"]
        assert error["type"] == "VMNotFoundError"


def test_nothing_is_deleted_if_one_id_is_wrong(run: Run, data_dir: Path) -> None:
    with run("--id", "one") as running:
        cli("delete", "one", "none", "--data-dir", data_dir, code=4)
        assert document("list", "--data-dir", data_dir)[0]["status"] == "running"
        running.kill(signal.SIGINT)
        running.end()


def test_a_data_directory_that_is_none_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert str(file) in cli("list", "--data-dir", file, code=2).stderr
    assert document("list", "--data-dir", "", code=2)["error"]["type"] == "ConfigError"


# doctor


def test_the_doctor_reports_as_a_table_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = document("doctor", "--accel", "tcg", "--data-dir", tmp_path / "state")
    assert report["ok"] is True
    assert {finding["guest"] for finding in report["findings"]} == {None, "linux", "windows"}

    async def examined(**_: object) -> Report:
        return Report.model_validate(report)

    monkeypatch.setattr("smolvm_async.doctor.examine", examined)
    lines = cli("doctor").stdout.splitlines()
    headings = ["this host", "windows guests", "linux guests"]
    assert [line for line in lines if not line.startswith(" ")] == headings
    assert any(line.startswith("  ✔ kernel ") for line in lines)


def test_a_host_without_qemu_is_told_and_fails(tmp_path: Path) -> None:
    arguments = ["doctor", "--data-dir", tmp_path / "state"]
    env = {"PATH": str(tmp_path)}
    lines = cli(*arguments, code=1, env=env).stdout.splitlines()
    failure = next(index for index, line in enumerate(lines) if line.startswith("  ✘ "))
    assert lines[failure + 1].startswith("      "), "the cure"
    assert document(*arguments, code=1, env=env)["ok"] is False


def test_the_doctor_is_interrupted(tmp_path: Path) -> None:
    command = [*CLI, "-v", "doctor", "--accel", "tcg", "--data-dir", str(tmp_path / "state")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_usual
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "qemu-system" in line:
                break
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert output == ""
    assert errors.splitlines()[-1] == "Error: interrupted by SIGTERM"


# Terminals, pipes, completion


def test_colours_and_signs_of_life_are_for_terminals(data_dir: Path) -> None:
    output, code = terminal("stop", "none", "--data-dir", data_dir)
    assert code == 4
    assert "\x1b[1;31mError: " in output
    output, _ = terminal("stop", "none", "--data-dir", data_dir, NO_COLOR="1")
    assert "\x1b[1mError: " in output, "bold is not a colour"


def test_a_closed_pipe_is_no_traceback(data_dir: Path) -> None:
    for command in (["list"], ["list", "--json"], ["--version"], ["--help"]):
        place = ["--data-dir", str(data_dir)] if "list" in command else []
        with subprocess.Popen(
            [*CLI, *command, *place], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(PATIENCE) == 1
            assert process.stderr is not None
            assert process.stderr.read() == ""


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_what_cannot_be_written_is_one_line_on_stderr(data_dir: Path, as_json: list[str]) -> None:
    command = [*CLI, "list", "--data-dir", str(data_dir), *as_json]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: stdout: No space left on device\n")
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE)
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_any_path_can_be_listed(run: Run, data_dir: Path, blank_image: Path) -> None:
    image = blank_image.with_name(b"[bold]\xff\n".decode(errors="surrogateescape"))
    image.symlink_to(blank_image)
    arguments = ["--os", "windows", "--accel", "tcg", "--data-dir", str(data_dir), "--keep"]
    with subprocess.Popen(
        [*CLI, "run", str(image), *arguments, "--id", "one"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=as_usual,
    ) as process:
        running = Running(process)
        running.until(UP)
        running.kill(signal.SIGINT)
        process.communicate()
    assert "/[bold]\\udcff " in cli("list", "--data-dir", data_dir).stdout
    assert document("list", "--data-dir", data_dir)[0]["image"] == str(image)
    cli("delete", "--yes", "one", "--data-dir", data_dir)


def test_help_tells_the_exit_codes_and_gives_examples() -> None:
    text = " ".join(cli("--help").stdout.split())
    assert "Exit codes: 0 success;" in text
    assert "smolvm-async run ~/win11.qcow2 --os windows" in cli("run", "--help").stdout
    assert subprocess.run([SCRIPT, "--version"], capture_output=True, check=True).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_completion_script(shell: str) -> None:
    env = {"_SMOLVM_ASYNC_COMPLETE": f"source_{shell}"}
    assert "_SMOLVM_ASYNC_COMPLETE=complete_" in cli(env=env).stdout


def test_ids_are_completed(run: Run, data_dir: Path) -> None:
    with run("--id", "one") as running:
        for command in ("stop", "delete", "logs", "run --id"):
            words = f"smolvm-async {command.split()[0]} --data-dir {data_dir} "
            words += " ".join(command.split()[1:])
            env = {
                "_SMOLVM_ASYNC_COMPLETE": "complete_bash",
                "COMP_WORDS": f"{words} o".replace("  ", " "),
                "COMP_CWORD": str(len(words.split())),
            }
            assert cli(env=env).stdout.split() == ["one"]
        running.kill(signal.SIGINT)
        running.end()


def test_the_library_does_not_import_the_command_line() -> None:
    code = "import smolvm_async, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "smolvm_async.vm.vm" in done
    assert not {"typer", "rich", "click", "smolvm_async.cli"} & set(done)


def test_a_command_imports_no_other_command(tmp_path: Path) -> None:
    call = f"app(['list', '--data-dir', {str(tmp_path)!r}], standalone_mode=False)"
    code = f"import sys; from smolvm_async.cli.app import app; {call}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {name.removeprefix("smolvm_async.cli.") for name in done if "smolvm_async.cli." in name}
    assert ours == {"app", "command", "output", "vms"}
    assert not {"rich.progress", "rich.logging", "asyncssh", "mcp"} & set(done)
