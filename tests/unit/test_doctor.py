"""The doctor's conclusions, from what a probe has shown; its disk; its notebook."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvm_async import HostError, Progress
from smolvm_async.doctor import Finding, Outcome, Report, verdicts
from smolvm_async.doctor.findings import Check, Notebook, Verdict, failed, ok, warning
from smolvm_async.doctor.probe import _failure, _subsets
from smolvm_async.doctor.unsigned import MARKER, unsigned_application, unsigned_disk
from smolvm_async.doctor.verdicts import NETWORK, Sighting, offered_address
from smolvm_async.guests import GUESTS
from smolvm_async.host.accelerator import KVM, TCG, Accelerator, Problem, trusts_tsc
from smolvm_async.host.firmware import Firmware
from smolvm_async.qemu.sidecars import SIDECARS
from smolvm_async.qemu.sidecars.swtpm import random_bytes

WINDOWS = GUESTS["windows"]
SWTPM = SIDECARS["swtpm"]
PLAIN = WINDOWS._replace(firmware_features=frozenset())
FIRMWARE = Firmware(Path("/f/code"), "raw", Path("/f/vars"), "raw")

# What OVMF 2022.11 wrote.
CLEAR = "\x1b[2J\x1b[01;01H\x1b[=3h"
DISK = 'Boot0001 "UEFI QEMU QEMU HARDDISK " from PciRoot(0x0)/Pci(0x1,0x0)/Scsi(0x0,0x0)'
LOADING = f"{CLEAR}BdsDxe: loading {DISK}\r\n"
REFUSED = f"{LOADING}BdsDxe: failed to load {DISK}: Access Denied\r\n"
RAN = (
    f"{LOADING}BdsDxe: starting {DISK}\r\n{MARKER}\r\nBdsDxe: failed to start {DISK}: Not Found\r\n"
)
NO_DISK = "BdsDxe: No bootable option or device was found.\r\n"
PXE = "\r\n>>Start PXE over IPv4."


def seen(console: str = "", **more: Any) -> Sighting:
    return Sighting("tcg", console, **more)


# What the console tells


def test_a_good_boot() -> None:
    good = seen(REFUSED + PXE, offered="10.0.2.15", seconds=4.0)
    found = [
        verdicts.boot(good),
        verdicts.smm(good, WINDOWS),
        verdicts.disk(good),
        verdicts.secure_boot(good, WINDOWS, FIRMWARE),
        verdicts.network(good),
        verdicts.sidecar(good, SWTPM),
    ]
    assert all(verdict.status is Outcome.OK and not verdict.cure for verdict in found)
    assert found[0].detail == "the firmware booted under TCG in 4.0 s"
    assert "Access Denied" in found[3].detail
    assert "10.0.2.15" in found[4].detail


def test_an_unsigned_program_that_runs_is_found_out() -> None:
    verdict = verdicts.secure_boot(seen(RAN), WINDOWS, FIRMWARE)
    assert verdict.status is Outcome.FAILED
    assert "not enforced" in verdict.detail
    assert "/f/vars" in verdict.detail
    assert "firmware descriptor" in verdict.cure
    assert verdicts.disk(seen(RAN)).status is Outcome.OK


@pytest.mark.parametrize(
    "console", [LOADING, NO_DISK, REFUSED.replace("Access Denied", "Not Found")]
)
def test_a_disk_that_was_not_read_is_no_proof(console: str) -> None:
    assert verdicts.disk(seen(console)).status is Outcome.FAILED
    assert verdicts.secure_boot(seen(console), WINDOWS, FIRMWARE).status is Outcome.SKIPPED


@pytest.mark.parametrize("status", ["Access Denied", "Security Violation"])
@pytest.mark.parametrize("verb", ["load", "start"])
def test_both_ways_to_refuse(status: str, verb: str) -> None:
    console = f"{LOADING}BdsDxe: failed to {verb} {DISK}: {status}\r\n"
    assert verdicts.secure_boot(seen(console), WINDOWS, FIRMWARE).status is Outcome.OK


def test_the_refusal_of_something_else_is_none() -> None:
    shell = REFUSED.replace("Scsi(0x0,0x0)", "FvFile(7C04A583)")
    assert not seen(shell).disk_tried


def test_a_boot_that_failed_says_why_and_leaves_the_rest_open() -> None:
    for failed_boot, why in [
        (seen(failure="QEMU ended (exit status 1): no such CPU"), "no such CPU"),
        (seen(seconds=90), "within 90 s; its serial console stayed empty"),
        (seen("\x1b[2Jhello", seconds=20), "its console ends with 'hello'"),
    ]:
        verdict = verdicts.boot(failed_boot)
        assert verdict.status is Outcome.FAILED
        assert why in verdict.detail
        assert verdict.cure
        for other in (
            verdicts.smm(failed_boot, WINDOWS),
            verdicts.disk(failed_boot),
            verdicts.secure_boot(failed_boot, WINDOWS, FIRMWARE),
            verdicts.network(failed_boot),
            verdicts.sidecar(failed_boot, SWTPM),
        ):
            assert other.status is Outcome.SKIPPED


def test_what_a_guest_does_not_need_is_skipped() -> None:
    assert verdicts.smm(seen(REFUSED), PLAIN).status is Outcome.SKIPPED
    assert verdicts.secure_boot(seen(RAN), PLAIN, FIRMWARE).status is Outcome.SKIPPED


def test_the_network_in_each_case() -> None:
    assert verdicts.network(seen(REFUSED + PXE)).status is Outcome.FAILED
    assert verdicts.network(seen(REFUSED)).status is Outcome.WARNING
    lacking = verdicts.network(seen(REFUSED, refused={NETWORK: "not compiled in"}))
    assert lacking.status is Outcome.FAILED
    assert "not compiled in" in lacking.detail
    lacking = verdicts.sidecar(seen(REFUSED, refused={"swtpm": "no tpm-crb"}), SWTPM)
    assert lacking.status is Outcome.FAILED
    assert "no tpm-crb" in lacking.detail


# What the capture tells


def dhcp(operation: int = 2, address: str = "10.0.2.15", port: int = 67, options: int = 0) -> bytes:
    """A frame with a BOOTP message."""
    bootp = bytes([operation]) + bytes(15) + socket.inet_aton(address) + bytes(220)
    udp = struct.pack(">HHHH", port, 68, 8 + len(bootp), 0) + bootp
    ip = bytes([0x45 + options]) + bytes(8) + b"\x11" + bytes(10 + 4 * options)
    return bytes(12) + b"\x08\x00" + ip + udp


def capture(*frames: bytes) -> bytes:
    records = (struct.pack("=4I", 1, 2, len(frame), len(frame)) + frame for frame in frames)
    return bytes(24) + b"".join(records)


def test_an_offer_is_found_among_other_packets() -> None:
    request = dhcp(operation=1, address="0.0.0.0", port=68)
    noise = bytes(12) + b"\x86\xdd" + bytes(60)
    assert offered_address(capture(noise, request, dhcp())) == "10.0.2.15"
    assert offered_address(capture(dhcp(options=2))) == "10.0.2.15"
    for other in (noise, request, dhcp(operation=1), dhcp(port=68), dhcp(address="0.0.0.0")):
        assert offered_address(capture(other)) == ""


def test_a_capture_that_is_being_written() -> None:
    whole = capture(dhcp(1, "0.0.0.0", 68), dhcp())
    found = [offered_address(whole[:length]) for length in range(len(whole) + 1)]
    assert sorted(set(found)) == ["", "10.0.2.15"]
    assert found == sorted(found)


@given(st.binary(max_size=200))
def test_any_capture_will_do(data: bytes) -> None:
    offered_address(data)
    offered_address(capture(data))


# The TPM's answer


def test_random_bytes() -> None:
    good = struct.pack(">HIIH", 0x8001, 20, 0, 8) + b"12345678"
    assert random_bytes(good) == b"12345678"
    error = struct.pack(">HII", 0x8001, 10, 0x101)
    for bad in (b"", good[:-1], error, good[:2] + bytes(4) + good[6:], b"hello, I am not a TPM"):
        assert random_bytes(bad) == b""


# KVM and the accelerator

NO_FLAGS = Problem("no vmx", "Enable it.")
GOOD, BAD = Sighting("kvm", REFUSED), Sighting("kvm", failure="failed to set MSR 0x10a")


@pytest.mark.parametrize(
    ("accel", "sighting", "problem", "status"),
    [
        ("auto", GOOD, None, Outcome.OK),
        ("auto", BAD, None, Outcome.FAILED),
        ("auto", BAD, NO_FLAGS, Outcome.WARNING),
        ("auto", None, NO_FLAGS, Outcome.WARNING),
        ("auto", GOOD, NO_FLAGS, Outcome.WARNING),
        ("kvm", BAD, NO_FLAGS, Outcome.FAILED),
        ("kvm", None, NO_FLAGS, Outcome.FAILED),
        ("kvm", GOOD, None, Outcome.OK),
        ("tcg", None, None, Outcome.SKIPPED),
    ],
)
def test_kvm(
    accel: str, sighting: Sighting | None, problem: Problem | None, status: Outcome
) -> None:
    verdict = verdicts.kvm(accel, sighting, problem)
    assert verdict.status is status
    assert bool(verdict.cure) == (status in (Outcome.WARNING, Outcome.FAILED))
    if sighting is BAD:
        assert "failed to set MSR 0x10a" in verdict.detail
    if problem is not None and status is not Outcome.SKIPPED:
        assert "no vmx" in verdict.detail


def test_kvm_whose_host_does_not_trust_its_tsc() -> None:
    verdict = verdicts.kvm("auto", GOOD, None, tsc=False)
    assert verdict.status is Outcome.WARNING
    assert "stands still" in verdict.detail
    assert "tsc=reliable" in verdict.cure


def test_a_kernel_that_does_not_trust_its_tsc_does_not_list_it(tmp_path: Path) -> None:
    (tmp_path / "available_clocksource").write_text("acpi_pm hpet \n")
    assert not trusts_tsc(tmp_path)
    (tmp_path / "available_clocksource").write_text("tsc kvm-clock \n")
    assert trusts_tsc(tmp_path)
    assert trusts_tsc(tmp_path / "missing")


def chooses(monkeypatch: pytest.MonkeyPatch, chosen: Accelerator | None) -> None:
    def choose(requested: str) -> tuple[Accelerator, str | None]:
        if chosen is None:
            raise HostError("accel='kvm' cannot be used")
        return chosen, None

    monkeypatch.setattr(verdicts, "choose_accelerator", choose)


@pytest.mark.parametrize(
    ("accel", "chosen", "kvm_works", "status"),
    [
        ("auto", KVM, True, Outcome.OK),
        ("auto", KVM, False, Outcome.FAILED),
        ("auto", TCG, False, Outcome.WARNING),
        ("tcg", TCG, False, Outcome.OK),
        ("kvm", KVM, False, Outcome.FAILED),
        ("kvm", None, False, Outcome.FAILED),
    ],
)
def test_the_accelerator(
    monkeypatch: pytest.MonkeyPatch,
    accel: str,
    chosen: Accelerator | None,
    kvm_works: bool,
    status: Outcome,
) -> None:
    chooses(monkeypatch, chosen)
    verdict = verdicts.accelerator(accel, kvm_works, NO_FLAGS if chosen is TCG else None)
    assert verdict.status is status
    if status is Outcome.FAILED:
        assert "accel='tcg'" in verdict.cure


@pytest.mark.anyio
async def test_a_guest_that_kvm_gave_up_on_is_seen() -> None:
    class Monitor:
        async def execute(self, command: str) -> dict[str, str]:
            return {"status": "internal-error"}

    assert "internal-error" in await _failure(cast(Any, None), cast(Any, Monitor()))


def test_parts_are_left_out_one_by_one() -> None:
    assert [sorted(some) for some in _subsets(frozenset("ba"))] == [[], ["a"], ["b"], ["a", "b"]]


# The disk


def test_the_disk_is_a_file_system_with_the_application(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(unsigned_disk())
    subprocess.run(["mcopy", "-i", disk, "::/EFI/BOOT/BOOTX64.EFI", tmp_path], check=True)
    assert (tmp_path / "BOOTX64.EFI").read_bytes() == unsigned_application()


def test_the_application_has_no_signature() -> None:
    application = unsigned_application()
    start = struct.unpack_from("<I", application, 60)[0]
    assert application[start : start + 4] == b"PE\0\0"
    optional = start + 24
    assert struct.unpack_from("<H", application, optional)[0] == 0x20B
    certificates = struct.unpack_from("<II", application, optional + 112 + 4 * 8)
    assert certificates == (0, 0)


# The notebook


async def conclude(work: Callable[[], Any], deadline: float) -> Finding:
    notebook = Notebook(None)
    await notebook.run([Check("it", work, deadline=deadline)])
    (finding,) = notebook.findings
    return finding


@pytest.mark.anyio
async def test_whatever_goes_wrong_is_a_finding() -> None:
    async def host_error() -> Verdict:
        raise HostError("no such thing")

    async def bug() -> Verdict:
        raise KeyError("x")

    async def hang() -> Verdict:
        await asyncio.sleep(3600)
        return ok("")

    for work, deadline, words, cure in [
        (host_error, 60, "no such thing", "Do what"),
        (bug, 60, "unexpected KeyError: 'x'", "report it"),
        (hang, 0.01, "did not end within 0.01 s", "again"),
    ]:
        finding = await conclude(work, deadline)
        assert finding.status is Outcome.FAILED
        assert words in finding.detail
        assert cure in finding.cure


@pytest.mark.anyio
async def test_what_needs_a_failed_check_is_skipped_and_names_the_cause() -> None:
    def never() -> Any:
        raise AssertionError

    notebook = Notebook(None)
    await notebook.run(
        [Check("disk", lambda: failed("full", "Free some.")), Check("a", lambda: ok(""))]
    )
    checks = [Check("qemu", never, ("disk",)), Check("boot", never, ("qemu", "disk", "python"))]
    await notebook.run(checks, "windows")
    for finding in notebook.findings[2:]:
        expected = (Outcome.SKIPPED, "not checked, because of disk", "windows")
        assert (finding.status, finding.detail, finding.guest) == expected
    assert [notebook.passed(name) for name in ("a", "disk", "boot")] == [True, False, False]


@pytest.mark.anyio
async def test_a_cancellation_is_no_finding() -> None:
    notebook = Notebook(None)
    task = asyncio.ensure_future(notebook.run([Check("it", lambda: asyncio.sleep(3600, ok("")))]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not notebook.findings


@pytest.mark.anyio
async def test_progress_and_report() -> None:
    steps: list[Progress] = []
    notebook = Notebook(steps.append)
    await notebook.run([Check("a", lambda: ok("fine"))])
    await notebook.run([Check("b", lambda: asyncio.sleep(0, warning("slow", "wait")))], "x")
    assert notebook.passed("a")
    assert notebook.passed("b")
    assert [(step.stage, step.message) for step in steps] == [("doctor", "a"), ("doctor", "b (x)")]
    report = Report(findings=tuple(notebook.findings))
    assert report.ok
    assert '"ok":true' in report.model_dump_json()
    assert Report.model_validate_json(report.model_dump_json(exclude={"ok"})) == report
    bad = report.findings[0].model_copy(update={"status": Outcome.FAILED})
    assert not Report(findings=(bad, *report.findings)).ok


def test_a_known_cause_of_a_failed_boot_replaces_the_general_cures() -> None:
    failure = "QEMU ended (exit status 127): libslirp.so.0: cannot open shared object file"
    for name, verdict in (
        ("kvm", verdicts.kvm("kvm", Sighting("kvm", failure=failure), None)),
        ("tcg", verdicts.boot(Sighting("tcg", failure=failure))),
    ):
        assert verdict.status is Outcome.FAILED, name
        assert "a shared library of the program is missing" in verdict.detail
        assert verdict.cure.startswith("Reinstall the program")
