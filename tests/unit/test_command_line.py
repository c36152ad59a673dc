"""QEMU's command line: the whole of it, and that nothing a user chooses becomes an option."""

from __future__ import annotations

import json
import socket
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import assume, given, reject
from hypothesis import strategies as st

from smolvm_async.config.options import make_config
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import ConfigError
from smolvm_async.guests import GUESTS
from smolvm_async.host.accelerator import KVM, TCG, Accelerator
from smolvm_async.host.firmware import Firmware
from smolvm_async.host.tools import HostTools, find_tools
from smolvm_async.images.qcow2 import empty
from smolvm_async.qemu.arguments import Descriptors, MachineSpec, RAMFile, qemu_arguments
from smolvm_async.qemu.sidecars import programs
from smolvm_async.state.names import OVERLAY, VARS

TOOLS = HostTools(
    qemu=Path("/usr/bin/qemu-system-x86_64"),
    qemu_img=Path("/usr/bin/qemu-img"),
    firmware=Firmware(Path("/fw/CODE.fd"), "raw", Path("/fw/VARS.fd"), "raw"),
)
BASE_IMAGE = 12
DESCRIPTORS = Descriptors(monitor=10, console=11, screen=14, agent=15)
ATTACH = ("-chardev", "socket,id=tpm,fd=13", "-tpmdev", "emulator,id=tpm0,chardev=tpm")

GOLDEN_TCG = [
    "/usr/bin/qemu-system-x86_64",
    "-name guest=build-42,debug-threads=on",
    "-uuid c0fbc555-e7dc-5773-829e-0199133ac961",
    "-nodefaults",
    "-no-user-config",
    "-S",
    "-machine q35,smm=on,vmport=off,hpet=off,pflash0=code,pflash1=vars",
    "-accel tcg,thread=multi,tb-size=1024",
    "-cpu max",
    "-smp sockets=1,cores=3,threads=1",
    "-m size=5000M",
    "-rtc base=localtime,driftfix=slew",
    "-global driver=cfi.pflash01,property=secure,value=on",
    "-global ICH9-LPC.disable_s3=1",
    "-global ICH9-LPC.disable_s4=1",
    "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    "-chardev socket,id=monitor,fd=10",
    "-qmp chardev:monitor",
    "-chardev socket,id=console,fd=11",
    "-serial chardev:console",
    '-blockdev {"driver": "raw", "node-name": "code", "read-only": true, '
    '"file": {"driver": "file", "filename": "/fw/CODE.fd", "read-only": true}}',
    '-blockdev {"driver": "raw", "node-name": "vars", "read-only": false, '
    '"file": {"driver": "file", "filename": "vars.fd", "read-only": false, '
    '"cache": {"direct": false, "no-flush": true}}, '
    '"cache": {"direct": false, "no-flush": true}}',
    "-add-fd fd=12,set=1",
    '-blockdev {"driver": "qcow2", "node-name": "base", "read-only": true, '
    '"file": {"driver": "file", "filename": "/dev/fdset/1", "read-only": true}}',
    '-blockdev {"driver": "qcow2", "node-name": "disk", '
    '"file": {"driver": "file", "filename": "overlay.qcow2", "discard": "unmap", '
    '"cache": {"direct": false, "no-flush": true}}, '
    '"backing": "base", "discard": "unmap", "detect-zeroes": "unmap", '
    '"cache": {"direct": false, "no-flush": true}}',
    "-object iothread,id=disk-thread",
    "-device virtio-scsi-pci,id=scsi,iothread=disk-thread",
    "-device scsi-hd,drive=disk,bootindex=1",
    "-netdev user,id=network",
    "-device virtio-net-pci,netdev=network,mac=52:54:00:c0:fb:c5,romfile=",
    "-device virtio-serial-pci,max_ports=2",
    "-chardev socket,fd=15,id=agent",
    "-device virtserialport,id=agent,chardev=agent,name=org.qemu.guest_agent.0",
    "-display none",
    "-vnc none,password=on,share=ignore",
    "-add-fd fd=14,set=2",
    "-device VGA,id=display,edid=on,xres=1280,yres=800,refresh_rate=50000,vgamem_mb=32",
    "-device qemu-xhci",
    "-device usb-tablet",
    "-device pvpanic",
    "-device vmgenid,guid=auto",
    "-chardev socket,id=tpm,fd=13",
    "-tpmdev emulator,id=tpm0,chardev=tpm",
]

ONLY_KVM = [
    "-accel kvm",
    "-cpu host,hv_relaxed,hv_vapic,hv_spinlocks=0x1fff,hv_vpindex,hv_runtime,hv_time,hv_synic,"
    "hv_stimer,hv_stimer_direct,hv_frequencies,hv_tlbflush,hv_ipi,hv_crash",
    "-global kvm-pit.lost_tick_policy=discard",
]
ONLY_TCG = ["-accel tcg,thread=multi,tb-size=1024", "-cpu max"]


def config(**arguments: Any) -> VMConfig:
    defaults: dict[str, Any] = {"os": "windows", "image": "/disk.qcow2"}
    defaults.update(memory=5000, cpus=3, vm_id="build-42")
    return make_config(**{**defaults, **arguments})


def arguments(
    config: VMConfig,
    accelerator: Accelerator = TCG,
    tools: HostTools = TOOLS,
    descriptors: Descriptors = DESCRIPTORS,
    attach: Sequence[str] = ATTACH,
    base_image: int = BASE_IMAGE,
) -> list[str]:
    spec = MachineSpec(config, tools, accelerator, base_image, config.profile.sidecars)
    return qemu_arguments(spec, descriptors, attach)


def entries(argv: list[str]) -> list[str]:
    """The command line with each flag and its value in one entry."""
    made: list[str] = []
    for word in argv:
        if word.startswith("-") or not made:
            made.append(word)
        else:
            assert " " not in made[-1], f"{word!r} belongs to no flag"
            made[-1] += f" {word}"
    return made


def test_the_whole_command_line_of_a_windows_guest() -> None:
    assert entries(arguments(config())) == GOLDEN_TCG


def test_a_restored_machine_differs_by_its_memory_its_layers_and_its_wait() -> None:
    layers = (OVERLAY, "disk-1.qcow2", "disk-2.qcow2")
    given = MachineSpec(
        config(),
        TOOLS,
        TCG,
        BASE_IMAGE,
        config().profile.sidecars,
        machine_type="pc-q35-7.2",
        layers=layers,
        ram=RAMFile(15, shared=False),
        incoming=True,
    )
    restored = entries(qemu_arguments(given, DESCRIPTORS, ATTACH))
    frozen = [
        f'-blockdev {{"driver": "qcow2", "node-name": "{name}", "read-only": true, '
        f'"file": {{"driver": "file", "filename": "{file}", "read-only": true}}, '
        f'"backing": "{backing}"}}'
        for name, file, backing in (("disk", OVERLAY, "base"), ("disk-1", layers[1], "disk"))
    ]
    written = next(entry for entry in GOLDEN_TCG if OVERLAY in entry)
    written = written.replace('"backing": "base"', '"backing": "disk-1"')
    written = written.replace('"node-name": "disk"', '"node-name": "disk-2"')
    assert [entry for entry in restored if entry not in GOLDEN_TCG] == [
        "-machine pc-q35-7.2,smm=on,vmport=off,hpet=off,pflash0=code,pflash1=vars,"
        "memory-backend=pc.ram",
        "-object memory-backend-file,id=pc.ram,size=5000M,mem-path=/proc/self/fd/15,share=off",
        "-incoming defer",
        *frozen,
        written.replace(OVERLAY, layers[2]),
        "-device scsi-hd,drive=disk-2,bootindex=1",
    ]


def test_hyper_v_is_kvms_and_nothing_else_differs() -> None:
    with_kvm = entries(arguments(config(), KVM))
    assert [entry for entry in with_kvm if entry not in GOLDEN_TCG] == ONLY_KVM
    assert [entry for entry in GOLDEN_TCG if entry not in with_kvm] == ONLY_TCG
    # hv_vpindex ends QEMU under TCG, and the others mean nothing there.
    assert "hv_" not in " ".join(GOLDEN_TCG)


ANY_PATH = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(prefix=ANY_PATH, text=ANY_PATH)
def test_no_path_of_the_users_is_on_the_command_line(prefix: str, text: str) -> None:
    """The image is an inherited descriptor, and the data directory is where QEMU runs."""
    marked = f"{prefix}uSeRtExT{text}"
    assume(not marked.lower().startswith("s3://"))  # with which os= cannot be given
    try:
        argv = arguments(config(image=marked, data_dir=f"/{marked}"))
    except ConfigError:  # such as the home of a user who does not exist
        reject()
    assert argv == arguments(config())


ID_CHARACTERS = string.ascii_lowercase + string.digits


@given(
    vm_id=st.text(ID_CHARACTERS + "-", max_size=50).map(lambda middle: f"x9z{middle}z9x"),
    memory=st.integers(2048, 1 << 22),
    cpus=st.integers(1, 255),
)
def test_what_is_on_it_changes_one_value_each(vm_id: str, memory: int, cpus: int) -> None:
    changed = dict(
        pair
        for pair in zip(
            entries(arguments(config(vm_id=vm_id, memory=memory, cpus=cpus))),
            GOLDEN_TCG,
            strict=True,
        )
        if pair[0] != pair[1]
    )
    flags = {entry.split()[0] for entry in changed}
    assert flags <= {"-name", "-uuid", "-m", "-accel", "-smp", "-device"}
    assert [entry for entry in changed if vm_id in entry] == [
        f"-name guest={vm_id},debug-threads=on"
    ]
    argv = arguments(config(vm_id=vm_id, memory=memory, cpus=cpus))
    assert argv[argv.index("-m") + 1] == f"size={memory}M"
    assert argv[argv.index("-smp") + 1] == f"sockets=1,cores={cpus},threads=1"


def test_no_guest_can_sleep_in_s3_or_s4() -> None:
    for name in GUESTS:
        found = entries(arguments(config(os=name)))
        assert [entry for entry in found if "disable_s" in entry] == [
            "-global ICH9-LPC.disable_s3=1",
            "-global ICH9-LPC.disable_s4=1",
        ]


def test_a_machine_keeps_its_identity_and_shares_it_with_no_other() -> None:
    def identity(vm_id: str) -> tuple[str, str]:
        argv = arguments(config(vm_id=vm_id))
        (card,) = (word for word in argv if word.startswith("virtio-net-pci"))
        return argv[argv.index("-uuid") + 1], card

    assert identity("one") == identity("one")
    assert not set(identity("one")) & set(identity("two"))


@given(code=ANY_PATH, image_format=st.sampled_from(["raw", "qcow2"]))
def test_a_firmware_path_arrives_whole_whatever_is_in_it(code: str, image_format: str) -> None:
    """Paths such as `/x,snapshot=on/"quoted"/CODE.fd`: an option of their own in QEMU's syntax."""
    firmware = Firmware(Path("/", code), image_format, Path("/fw/VARS"), image_format)
    argv = arguments(config(), tools=TOOLS._replace(firmware=firmware))
    nodes = [json.loads(value) for value in argv if value.startswith("{")]
    by_name = {node["node-name"]: node for node in nodes}
    assert by_name["code"]["file"]["filename"] == str(firmware.code)
    assert by_name["code"]["driver"] == by_name["vars"]["driver"] == image_format
    assert by_name["code"]["read-only"] is True
    assert by_name["base"]["driver"] == by_name["disk"]["driver"] == "qcow2"
    # Only the firmware's code is named by a path; QEMU finds the rest where it runs.
    assert by_name["vars"]["file"]["filename"] == VARS
    assert by_name["disk"]["file"]["filename"] == OVERLAY


def test_qemu_accepts_the_line_and_builds_the_machine(tmp_path: Path, blank_image: Path) -> None:
    """All but the TPM, which needs its emulator."""
    tools = find_tools(GUESTS["windows"], programs(GUESTS["windows"]))
    assert tools.firmware is not None
    (tmp_path / OVERLAY).write_bytes(empty(10 << 30))
    (tmp_path / VARS).write_bytes(tools.firmware.vars_template.read_bytes())
    pairs = [socket.socketpair() for _ in range(2)]
    with (
        pairs[0][0],
        pairs[0][1],
        pairs[1][0],
        pairs[1][1],
        blank_image.open("rb") as image,
        (tmp_path / "screen").open("wb") as screen,
    ):
        descriptors = Descriptors(pairs[0][1].fileno(), pairs[1][1].fileno(), screen.fileno())
        fds = (*filter(None, descriptors), image.fileno())
        line = arguments(config(memory=2048), TCG, tools, descriptors, (), image.fileno())
        for command in ("qmp_capabilities", "quit"):
            pairs[0][0].sendall(json.dumps({"execute": command}).encode())
        done = subprocess.run(
            line, cwd=tmp_path, pass_fds=fds, capture_output=True, text=True, timeout=300
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
