"""Clones: their configuration, their processor, and the hosts that can load them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from smolvm_async import AsyncSmolVM, ConfigError, SnapshotError
from smolvm_async.config.options import make_clone_config, make_config
from smolvm_async.host.processor import describe_processor
from smolvm_async.host.qemu_version import qemu_version
from smolvm_async.host.tools import find_tools
from smolvm_async.state.snapshots import Snapshot
from smolvm_async.vm.compatibility import check_loadable
from smolvm_async.vm.plan import Plan

CPUINFO = """\
processor\t: 0
model name\t: Some  Processor @ 2 GHz
flags\t\t: fpu sse avx
cpu MHz\t\t: 2000.1

processor\t: 1
model name\t: another one
"""


def test_a_clone_has_the_machine_of_its_source_and_nothing_of_its_owner() -> None:
    source = make_config(
        os="windows",
        image="/disk.qcow2",
        memory=5000,
        cpus=3,
        resolution="1024x768",
        vm_id="source",
        keep=True,
        vnc="unix",
        port_forwards=[80],
    )
    clone = make_clone_config(source, vm_id="clone", data_dir="/elsewhere")
    changed = {name for name, value in clone if value != getattr(source, name)}
    assert changed == {"vm_id", "keep", "vnc", "port_forwards", "data_dir"}
    assert (clone.vm_id, clone.keep, clone.vnc, clone.port_forwards) == ("clone", False, None, ())


@pytest.mark.parametrize("name", ["memory", "cpus", "os", "image", "resolution", "boot"])
def test_what_the_snapshot_fixes_cannot_be_given(name: str) -> None:
    options: Any = {name: 512}
    with pytest.raises(ConfigError, match=f"{name}= cannot be given: the snapshot fixes it"):
        AsyncSmolVM.from_snapshot("first", **options)
    wrong = r"from_snapshot\(\) got an unexpected keyword argument 'colour'"
    with pytest.raises(TypeError, match=wrong):
        AsyncSmolVM.from_snapshot("first", **cast(Any, {"colour": 1}))


def test_a_clone_of_the_built_in_linux_and_of_a_published_image_can_be_made() -> None:
    assert make_clone_config(make_config(memory=256)).memory == 256
    published = make_config(image="s3://bucket/image/").model_copy(
        update={"os": "linux", "memory": 700, "cpus": 2}
    )
    clone = make_clone_config(published, env={"a": "b"})
    assert (clone.os, clone.memory, clone.cpus) == ("linux", 700, 2)
    assert clone.env == {"a": "b"}


def test_a_processor_is_the_model_and_what_the_model_stands_for(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("this", "reordered", "newer")]
    changes = [("", ""), ("fpu sse avx", "avx sse fpu"), ("avx", "avx avx2")]
    for file, change in zip(files, changes, strict=True):
        file.write_text(CPUINFO.replace(*change, 1))
    here, reordered, newer = (describe_processor("host,hv_time", "7.2", file) for file in files)
    assert here.startswith("host,hv_time (Some Processor @ 2 GHz, features ")
    assert here == reordered != newer
    assert here == describe_processor("host,hv_time", "8.0", files[0])
    assert describe_processor("max", "7.2") == "max (QEMU 7.2)"
    assert describe_processor("qemu64,+aes", "7.2") == "qemu64,+aes"


MACHINE = "pc-q35-7.2"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"live": False, "accelerator": "kvm", "qemu": "99.0"}, ""),  # at rest, the guest boots
        ({"accelerator": "kvm"}, "ran under KVM, and this VM would run under TCG"),
        ({"qemu": "99.0"}, "QEMU 99.0 has saved it, and this host's QEMU .* is older"),
        ({"processor": "EPYC"}, "its guest has the processor EPYC, and this VM has qemu64"),
        ({"qemu": "2.1", "machine": "pc-q35-0.1"}, "does not know its machine type pc-q35-0.1"),
        ({"qemu": "2.1"}, ""),  # an older version, and a type that this one knows
    ],
)
def test_a_snapshot_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    config = make_config(os="windows", image="/disk.qcow2")
    tools = find_tools(config.profile, ())
    version = asyncio.run(qemu_version(tools.qemu))
    facts = {"live": True, "accelerator": "tcg", "qemu": version, "processor": "qemu64", **changes}
    machine = SimpleNamespace(type=facts.pop("machine", MACHINE))
    snapshot = SimpleNamespace(
        path=Path("/snapshots/first"), record=SimpleNamespace(**facts, machine=machine)
    )
    profile = SimpleNamespace(cpu={"tcg": "qemu64"})
    plan = SimpleNamespace(
        tools=tools,
        accelerator=SimpleNamespace(name="tcg"),
        config=SimpleNamespace(profile=profile),
    )
    check = check_loadable(cast(Snapshot, snapshot), cast(Plan, plan))
    if not reason:
        asyncio.run(check)
        return
    with pytest.raises(SnapshotError, match=f"'first' cannot be loaded here: .*{reason}") as raised:
        asyncio.run(check)
    assert "boot a VM" in raised.value.hint
