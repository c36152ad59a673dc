"""The doctor on this host, and on hosts that lack something."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from smolvm_async import ConfigError, Progress
from smolvm_async.doctor import Finding, Outcome, Report, checks, examine, probe
from smolvm_async.guests import GUESTS
from smolvm_async.host.tools import find_tools
from smolvm_async.qemu.sidecars import SIDECARS, swtpm
from tests.conftest import FakeProgram, child_named, children

pytestmark = pytest.mark.anyio

KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)
BOOTED = {"boot", "smm", "virtio-scsi", "secure-boot", "user-network", "tpm"}
NO_KEYS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    """Let a user's firmware descriptor claim everything of a pair."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    directory = tmp_path / "config" / "qemu" / "firmware"

    def describe(code: Path, variables: Path) -> None:
        directory.mkdir(parents=True)
        descriptor = {
            "interface-types": ["uefi"],
            "mapping": {
                "device": "flash",
                "executable": {"filename": str(code), "format": "raw"},
                "nvram-template": {"filename": str(variables), "format": "raw"},
            },
            "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
            "features": sorted(GUESTS["windows"].firmware_features),
        }
        (directory / "00-own.json").write_text(json.dumps(descriptor))

    return describe


def by_check(report: Report) -> dict[str, Finding]:
    found = {finding.check: finding for finding in report.findings}
    assert len(found) == len(report.findings), "one finding for each check and guest"
    for finding in report.findings:
        needs_cure = finding.status in (Outcome.WARNING, Outcome.FAILED)
        assert bool(finding.cure) == needs_cure, finding
        assert finding.detail
    return found


def statuses(found: dict[str, Finding], names: set[str]) -> dict[str, str]:
    return {name: str(found[name].status) for name in names}


async def test_this_host_runs_guests(data_dir: Path) -> None:
    steps: list[Progress] = []
    report = await examine(data_dir=data_dir, on_progress=steps.append)
    found = by_check(report)
    may_warn = {"kvm", "accelerator", "disk", "memory", "qemu"}
    others = found.keys() - may_warn
    assert statuses(found, others) == dict.fromkeys(others, "ok")
    assert found.keys() >= BOOTED
    assert all(step.stage == "doctor" for step in steps)
    assert {step.message for step in steps} >= {"kernel", "boot (windows)"}
    assert not list(data_dir.iterdir())
    kvm = found["kvm"]
    under_kvm = "under KVM" in found["boot"].detail
    if kvm.status is Outcome.OK:
        assert under_kvm
        assert found["accelerator"].status is Outcome.OK
    elif KVM and not under_kvm:  # it opens and does not run guests
        assert "KVM can be opened but does not run guests: " in kvm.detail
    if not under_kvm:
        assert found["accelerator"].status in (Outcome.WARNING, Outcome.FAILED)
    assert json.loads(report.model_dump_json())["ok"] == report.ok


async def test_firmware_without_keys_is_found_out(
    data_dir: Path, firmware: Callable[[Path, Path], None]
) -> None:
    pair = find_tools(GUESTS["windows"], []).firmware
    assert pair is not None
    firmware(pair.code, NO_KEYS)
    report = await examine(data_dir=data_dir, accel="tcg")
    found = by_check(report)
    assert str(NO_KEYS) in found["firmware"].detail
    assert found["secure-boot"].status is Outcome.FAILED
    assert "not enforced" in found["secure-boot"].detail
    assert not report.ok
    others = BOOTED - {"secure-boot"}
    assert statuses(found, others) == dict.fromkeys(others, "ok")


async def test_firmware_that_hangs(
    tmp_path: Path,
    data_dir: Path,
    firmware: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(probe.BOOT, "tcg", 0.5)
    code = tmp_path / "code"
    code.write_bytes(b"\xf4" * (1 << 20))  # hlt, wherever the processor begins
    firmware(code, NO_KEYS)
    found = by_check(await examine(data_dir=data_dir, accel="tcg"))
    assert found["boot"].status is Outcome.FAILED
    others = BOOTED - {"boot"}
    assert statuses(found, others) == dict.fromkeys(others, "skipped")


REFUSE_NETWORK = """
case "$*" in *" -netdev user,"*)
    echo "-netdev user: network backend 'user' is not compiled into this QEMU" >&2; exit 1;; esac
"""
REFUSE_TPM = """
case "$*" in *" -tpmdev "*) echo "-tpmdev emulator: no such backend" >&2; exit 1;; esac
"""


async def test_a_qemu_without_slirp(data_dir: Path, fake: FakeProgram) -> None:
    fake("qemu-system-x86_64", f'{REFUSE_NETWORK}exec $REAL "$@"')
    found = by_check(await examine(data_dir=data_dir, accel="tcg"))
    assert found["user-network"].status is Outcome.FAILED
    assert "not compiled into this QEMU" in found["user-network"].detail
    others = BOOTED - {"user-network"}
    assert statuses(found, others) == dict.fromkeys(others, "ok")


async def test_a_qemu_without_slirp_and_tpm(data_dir: Path, fake: FakeProgram) -> None:
    fake("qemu-system-x86_64", f'{REFUSE_NETWORK}{REFUSE_TPM}exec $REAL "$@"')
    found = by_check(await examine(data_dir=data_dir, accel="tcg"))
    assert "not compiled into this QEMU" in found["user-network"].detail
    assert "no such backend" in found["tpm"].detail
    bad = {"user-network", "tpm"}
    assert statuses(found, bad) == dict.fromkeys(bad, "failed")
    assert statuses(found, BOOTED - bad) == dict.fromkeys(BOOTED - bad, "ok")


async def test_a_qemu_that_refuses_everything(data_dir: Path, fake: FakeProgram) -> None:
    fake("qemu-system-x86_64", 'case "$*" in *-S*) echo "no such CPU"; exit 3;; esac; $REAL "$@"')
    found = by_check(await examine(data_dir=data_dir, accel="tcg"))
    assert "QEMU ended (exit status 3): no such CPU" in found["boot"].detail
    assert found["boot"].status is Outcome.FAILED


async def test_a_qemu_that_hangs(
    data_dir: Path, fake: FakeProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LAUNCH", 0.3)
    fake("qemu-system-x86_64", 'case "$*" in *-S*) exec sleep 3600;; esac; $REAL "$@"')
    found = by_check(await examine(data_dir=data_dir, accel="tcg"))
    assert found["boot"].status is Outcome.FAILED
    assert "did not answer within 0.3 s" in found["boot"].detail


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo broken >&2; exit 7", "exit status 7"),
        ('case $1 in socket) echo "no libtpms"; exit 1;; esac; $REAL "$@"', "no libtpms"),
        ('case $1 in socket) exec sleep 3600;; esac; $REAL "$@"', "did not answer within 0.2 s"),
        # It echoes what it is asked.
        ('case $1 in socket) exec cat <&$5 >&$5;; esac; $REAL "$@"', "does not work as a TPM 2.0"),
    ],
)
async def test_a_broken_swtpm(
    data_dir: Path, fake: FakeProgram, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    monkeypatch.setattr(swtpm, "ANSWER", 0.2)
    fake("swtpm", script.replace("$5", "${6}"))
    verdict = await checks.check_sidecar(SIDECARS["swtpm"], data_dir)
    assert verdict.status is Outcome.FAILED
    assert words in verdict.detail
    assert "swtpm" in verdict.detail
    assert verdict.cure


async def test_a_broken_swtpm_leaves_the_rest_to_be_probed(
    data_dir: Path, fake: FakeProgram
) -> None:
    fake("swtpm", "exit 1")
    found = by_check(await examine(data_dir=data_dir, accel="tcg"))
    assert found["swtpm"].status is Outcome.FAILED
    assert found["tpm"].status is Outcome.SKIPPED
    assert statuses(found, BOOTED - {"tpm"}) == dict.fromkeys(BOOTED - {"tpm"}, "ok")


async def test_a_qemu_img_that_writes_nothing(data_dir: Path, fake: FakeProgram) -> None:
    fake("qemu-img", "exit 0")
    verdict = await checks.check_qemu_img(data_dir)
    assert verdict.status is Outcome.FAILED
    assert "did not make a qcow2" in verdict.detail


async def test_an_old_qemu_is_told(fake: FakeProgram) -> None:
    fake("qemu-system-x86_64", "echo QEMU emulator version 6.2.0")
    verdict = await checks.check_qemu()
    assert verdict.status is Outcome.WARNING
    assert "6.2.0" in verdict.detail


async def test_a_setpriv_without_effect(fake: FakeProgram) -> None:
    fake("setpriv", 'shift 3; exec "$@"')
    verdict = await checks.check_setpriv()
    assert verdict.status is Outcome.FAILED
    assert "shows '0'" in verdict.detail


async def test_a_host_with_nothing(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = await examine(data_dir=data_dir)
    found = by_check(report)
    assert not report.ok
    assert found["built-in-image"].status is Outcome.WARNING
    assert "cannot be built: This host lacks apt-get" in found["built-in-image"].detail
    assert "qemu-utils" in found["built-in-image"].cure
    assert found["setpriv"].status is Outcome.FAILED
    assert "not found in PATH" in found["setpriv"].detail
    assert statuses(found, BOOTED) == dict.fromkeys(BOOTED, "skipped")


async def test_a_data_dir_that_others_can_write_to(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    found = by_check(await examine(data_dir=shared))
    assert found["data-dir"].status is Outcome.FAILED
    assert "Other users of this machine can write to" in found["data-dir"].detail
    skipped = {"disk", *BOOTED}
    assert statuses(found, skipped) == dict.fromkeys(skipped, "skipped")
    assert not list(shared.iterdir())


@pytest.mark.parametrize("arguments", [{"accel": "hvf"}, {"data_dir": 5}, {"data_dir": "~nobody9"}])
async def test_wrong_arguments_are_no_findings(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        await examine(**arguments)  # type: ignore[arg-type]


# Cancelled, or hit


async def until_qemu_runs(data_dir: Path) -> None:
    """Wait until the probe's QEMU has built the machine: then its capture exists."""
    while not list(data_dir.glob("doctor-*/network.pcap")):
        await asyncio.sleep(0.01)


async def test_cancelled_while_the_firmware_runs(data_dir: Path) -> None:
    task = asyncio.ensure_future(examine(data_dir=data_dir, accel="tcg"))
    await until_qemu_runs(data_dir)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not children()
    assert not list(data_dir.iterdir())


async def test_cancelled_at_ten_moments_before(data_dir: Path) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    task = asyncio.ensure_future(examine(data_dir=data_dir, accel="tcg"))
    await until_qemu_runs(data_dir)
    before = loop.time() - began
    task.cancel()
    await asyncio.wait([task])
    for moment in range(10):
        task = asyncio.ensure_future(examine(data_dir=data_dir, accel="tcg"))
        await asyncio.sleep(before * (moment + random.random()) / 10)
        task.cancel()
        await asyncio.sleep(0.002 * (moment % 3))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task  # `nothing_left` looks for processes: asyncio reaps what it has killed
        assert not data_dir.exists() or not list(data_dir.iterdir())


async def test_a_qemu_that_is_killed_is_told(data_dir: Path) -> None:
    task = asyncio.ensure_future(examine(data_dir=data_dir, accel="tcg"))
    await until_qemu_runs(data_dir)
    os.kill(child_named("qemu"), signal.SIGKILL)
    found = by_check(await task)
    assert found["boot"].status is Outcome.FAILED
    assert "killed by SIGKILL" in found["boot"].detail
