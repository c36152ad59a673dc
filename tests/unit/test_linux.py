"""Linux guests: what the arguments may be, the command line, the seed, the choice of firmware."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pycdlib
import pytest

from smolvm_async import AsyncSmolVM, ConfigError, ImageError, PortForward, UnsupportedError
from smolvm_async.config.options import make_config
from smolvm_async.controls.ssh.login import Login, make_key_pair, make_seed
from smolvm_async.guests import BUILT_IN, GUESTS
from smolvm_async.host.accelerator import TCG
from smolvm_async.host.shares import Share
from smolvm_async.host.tools import find_tools
from smolvm_async.qemu.arguments import Descriptors, DirectBoot, MachineSpec, qemu_arguments

LINUX, DEBIAN = GUESTS["linux"], BUILT_IN["linux"]


def arguments(direct_boot: DirectBoot | None = None, **options: Any) -> list[str]:
    config = make_config(vm_id="one", accel="tcg", **options)
    spec = MachineSpec(config, find_tools(config.profile, []), TCG, 5, (), direct_boot=direct_boot)
    return qemu_arguments(spec, Descriptors(3, 4, 6), [])


def test_no_argument_at_all_means_the_built_in_linux() -> None:
    for config in (make_config(), make_config(os="linux")):
        assert config.os == "linux"
        assert config.profile is DEBIAN
        assert config.memory == 512


def test_an_image_of_ones_own_is_no_built_in_one() -> None:
    assert make_config(os="linux", image="x.qcow2").profile is LINUX


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        ({"memory": 100}, ["memory=100", "128 MiB"]),
        ({"mounts": ["/none-there"]}, ["mounts: '/none-there'", "create the directory"]),
        ({"kernel": "/k"}, ["kernel=", "image=", "root disk"]),
        ({"image": "x", "initrd": "/i"}, ["initrd=", "kernel="]),
        ({"image": "x", "boot_args": "quiet"}, ["boot_args=", "kernel="]),
        ({"image": "x", "kernel": 3}, ["kernel=3", "a Linux kernel"]),
        ({"image": "x", "kernel": "/k", "boot_args": "a\nb"}, ["boot_args=", "printable"]),
        ({"image": "x", "user": "Bob"}, ["user='Bob'", "user name"]),
        ({"user": "bob"}, ["user='bob'", "only the user root"]),
        ({"env": ["A"]}, ["env=['A']", "mapping"]),
        ({"env": {"1A": "x"}}, ["env=", "'1A'", "digit"]),
        ({"env": {"A=B": "x"}}, ["env=", "'A=B'"]),
        ({"env": {"A": 1}}, ["env=", "A", "str"]),
        ({"env": {"A": "x\0"}}, ["env=", "NUL"]),
        ({"port_forwards": 80}, ["port_forwards=80", "(80, 8080)"]),
        ({"port_forwards": "80"}, ["port_forwards='80'"]),
        ({"port_forwards": [0]}, ["guest_port=0", "1 to 65535"]),
        ({"port_forwards": [(80, 70000)]}, ["host_port=70000"]),
        ({"port_forwards": [(80, 81, 82)]}, ["(80, 81, 82)"]),
        ({"port_forwards": [(80, 81), (90, 81)]}, ["host port 81", "more than once"]),
        ({"port_forwards": [True]}, ["guest_port=True"]),
    ],
    ids=repr,
)
def test_a_wrong_argument_is_named_with_what_to_do(
    options: dict[str, Any], phrases: list[str], data_dir: Path
) -> None:
    settings: dict[str, Any] = {"os": "linux", **options}
    with pytest.raises(ConfigError) as caught:
        AsyncSmolVM(**settings, data_dir=data_dir, accel="tcg")
    for phrase in phrases:
        assert phrase in str(caught.value)
    assert not data_dir.exists()


@pytest.mark.parametrize("feature", ["user", "kernel", "initrd", "boot_args", "mounts"])
def test_what_windows_guests_lack_is_refused_by_name(feature: str) -> None:
    values: dict[str, Any] = {feature: "x"}
    with pytest.raises(UnsupportedError, match=f"{feature}= is not available for Windows guests"):
        AsyncSmolVM(os="windows", image="x.qcow2", **values)


def test_port_forwards_take_ports_pairs_and_mappings() -> None:
    expected = (PortForward(80), PortForward(443, 8443))
    given: Any
    for given in ([80, (443, 8443)], {80: None, 443: 8443}, expected):
        assert make_config(port_forwards=given).port_forwards == expected


def test_shares_are_descriptors_and_only_a_writable_one_can_be_written() -> None:
    config = make_config(vm_id="one", accel="tcg")
    shares = (Share(8, writable=False), Share(9, writable=True))
    spec = MachineSpec(config, find_tools(config.profile, []), TCG, 5, (), shares=shares)
    argv = qemu_arguments(spec, Descriptors(3, 4, 6), [])
    common = "multidevs=remap"
    assert [word for word in argv if word.startswith("local,")] == [
        f"local,id=mount0,path=/proc/self/fd/8,security_model=none,readonly=on,{common}",
        f"local,id=mount1,path=/proc/self/fd/9,security_model=mapped-xattr,{common}",
    ]
    assert "pcie-root-port,id=mounts,chassis=1,slot=1" in argv  # a free slot for their devices


def test_the_built_in_image_is_started_without_firmware_or_usb() -> None:
    argv = arguments(DirectBoot(7, 8, "quiet a,b=c"))
    assert argv[argv.index("-kernel") + 1] == "/proc/self/fd/7"
    assert argv[argv.index("-initrd") + 1] == "/proc/self/fd/8"
    assert argv[argv.index("-append") + 1] == "quiet a,b=c"
    assert "pflash" not in " ".join(argv)
    assert "usb-tablet" not in argv
    assert "user,id=network,hostfwd=tcp:127.0.0.1:0-:22" in argv
    assert f"name=opt/smolvm/hostname,string={'one':<64}" in argv
    assert "pvpanic-pci" in argv
    assert any(word.startswith("virtio-blk-pci,drive=disk") for word in argv)


def test_an_image_of_ones_own_gets_a_seed() -> None:
    argv = arguments(image="x.qcow2", os="linux")
    (seed,) = (json.loads(word) for word in argv if '"seed"' in word)
    assert seed["read-only"] is True
    assert "virtio-blk-pci,drive=seed" in argv
    assert "-kernel" not in argv
    assert "-fw_cfg" not in argv


@pytest.mark.parametrize("user", ["root", "debian"])
def test_the_seed_holds_what_cloud_init_reads(user: str) -> None:
    key, host_key = make_key_pair(), make_key_pair()
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(make_seed("guest-1", Login(user, key, host_key))))
    assert iso.pvd.volume_identifier.decode().strip() == "cidata"

    def read(path: str) -> str:
        content = io.BytesIO()
        iso.get_file_from_iso_fp(content, joliet_path=path)
        return content.getvalue().decode()

    meta = json.loads(read("/meta-data"))
    assert meta == {"instance-id": "guest-1", "local-hostname": "guest-1"}
    first, _, rest = read("/user-data").partition("\n")
    assert first == "#cloud-config"
    config = json.loads(rest)
    assert config["hostname"] == "guest-1"
    assert config["ssh_keys"]["ed25519_private"] == host_key.private.decode()
    assert config["ssh_keys"]["ed25519_public"] == host_key.public
    if user == "root":
        assert config["disable_root"] is False
        assert config["ssh_authorized_keys"] == [key.public]
    else:
        assert config["user"]["name"] == user
        assert config["user"]["ssh_authorized_keys"] == [key.public]
        assert config["users"] == ["default"]


@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (lambda path: path.write_bytes(b"MZ" + bytes(4096)), "not a Linux kernel"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_kernel_is_refused_at_once(
    tmp_path: Path, blank_image: Path, spoil: Callable[[Path], None], phrase: str
) -> None:
    kernel = tmp_path / "kernel"
    spoil(kernel)
    with pytest.raises(ImageError, match=phrase) as caught:
        AsyncSmolVM(os="linux", image=blank_image, kernel=kernel, accel="tcg")
    assert str(kernel) in str(caught.value)


def test_printed_keys_hide_their_private_part() -> None:
    login = Login("root", make_key_pair(), make_key_pair())
    for text in (repr(login), str(login.access(22)), f"{login.key}", repr([login.access(22)])):
        assert "PRIVATE" not in text
        assert "ssh-ed25519" in text
