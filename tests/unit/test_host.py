"""The host: its programs and firmware, and the messages about missing ones."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smolvm_async import AcceleratorWarning, AsyncSmolVM, HostError
from smolvm_async.guests import GUESTS
from smolvm_async.host import accelerator, tools
from smolvm_async.host import firmware as firmware_module
from smolvm_async.host.firmware import Firmware, descriptor_directories, find_firmware
from smolvm_async.host.tools import HostTools, choose_accelerator, find_tools
from smolvm_async.qemu.sidecars import programs

NOBODY = 65534
WINDOWS = GUESTS["windows"]
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "swtpm", "setpriv")

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def windows_tools() -> HostTools:
    return find_tools(WINDOWS, programs(WINDOWS))


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    """The process's memory of its host, empty before and after."""

    def forget() -> None:
        tools._find_tools.cache_clear()
        tools._find_plain_uefi.cache_clear()
        tools._kvm_works.clear()

    forget()
    yield
    forget()


# Firmware descriptors


class Descriptors:
    """Three directories of firmware descriptors, the least specific first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directories = [root / "share", root / "etc", root / "home"]
        for directory in self.directories:
            directory.mkdir()

    def firmware(self, name: str) -> dict[str, Any]:
        """A descriptor of a firmware called `name`, whose files exist."""
        for part in ("CODE", "VARS"):
            (self.root / f"{name}.{part}").touch()
        return {
            "interface-types": ["uefi"],
            "mapping": {
                "device": "flash",
                "executable": {"filename": f"{self.root}/{name}.CODE", "format": "raw"},
                "nvram-template": {"filename": f"{self.root}/{name}.VARS", "format": "raw"},
            },
            "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
            "features": [*WINDOWS.firmware_features, "amd-sev"],
        }

    def write(self, directory: int, file: str, content: object) -> None:
        """Put a descriptor, or anything else, into one of the directories."""
        text = content if isinstance(content, str) else json.dumps(content)
        (self.directories[directory] / file).write_text(text)

    def found(self, pairs: tuple[tuple[str, str], ...] = ()) -> str | None:
        """The name of the firmware that is found."""
        made = find_firmware(WINDOWS.firmware_features, self.directories, pairs)
        if made is None:
            return None
        assert made.vars_template.stem == made.code.stem
        return made.code.stem


@pytest.fixture
def descriptors(tmp_path: Path) -> Descriptors:
    return Descriptors(tmp_path)


def test_the_first_name_wins_across_all_directories(descriptors: Descriptors) -> None:
    descriptors.write(2, "60-c.json", descriptors.firmware("c"))
    descriptors.write(1, "50-b.json", descriptors.firmware("b"))
    assert descriptors.found() == "b"
    descriptors.write(0, "40-a.json", descriptors.firmware("a"))
    assert descriptors.found() == "a"


def test_of_one_name_the_more_specific_directory_wins(descriptors: Descriptors) -> None:
    for directory, name in enumerate(("share", "etc", "home")):
        descriptors.write(directory, "50-x.json", descriptors.firmware(name))
        assert descriptors.found() == name


def test_an_empty_file_hides_those_of_its_name(descriptors: Descriptors) -> None:
    descriptors.write(0, "40-a.json", descriptors.firmware("a"))
    descriptors.write(0, "50-b.json", descriptors.firmware("b"))
    descriptors.write(1, "40-a.json", "")
    assert descriptors.found() == "b"
    descriptors.write(2, "40-a.json", descriptors.firmware("own"))
    assert descriptors.found() == "own"


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Change a descriptor's value, at keys separated by dots."""

    def apply(descriptor: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        node = descriptor
        for key in parents:
            node = node[key]
        node[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("features", ["secure-boot", "requires-smm"]),
        ("features", ["secure-boot", "enrolled-keys"]),
        ("features", []),
        ("interface-types", ["bios"]),
        ("mapping.device", "memory"),
        ("mapping.mode", "stateless"),
        ("mapping.mode", "combined"),
        ("targets", []),
        ("targets", [{"architecture": "aarch64", "machines": ["virt-*"]}]),
        ("targets", [{"architecture": "i386", "machines": ["pc-q35-*"]}]),
        ("targets", [{"architecture": "x86_64", "machines": ["pc-i440fx-*"]}]),
        ("mapping.executable.filename", "/nowhere/CODE.fd"),
        ("mapping.nvram-template.filename", "/nowhere/VARS.fd"),
    ],
)
def test_a_firmware_that_does_not_fit_is_passed_over(
    descriptors: Descriptors, path: str, value: object
) -> None:
    wrong = descriptors.firmware("wrong")
    descriptors.write(0, "40-wrong.json", wrong)
    descriptors.write(0, "50-right.json", descriptors.firmware("right"))
    assert descriptors.found() == "wrong"
    change(path, value)(wrong)
    descriptors.write(0, "40-wrong.json", wrong)
    assert descriptors.found() == "right"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mapping.mode", "split"),
        ("interface-types", ["bios", "uefi"]),
        (
            "targets",
            [
                {"architecture": "i386", "machines": ["pc-i440fx-*"]},
                {"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]},
            ],
        ),
    ],
)
def test_a_firmware_that_fits_among_other_things_is_taken(
    descriptors: Descriptors, path: str, value: object
) -> None:
    fitting = descriptors.firmware("fitting")
    change(path, value)(fitting)
    descriptors.write(0, "40-fitting.json", fitting)
    assert descriptors.found() == "fitting"


def test_the_formats_are_the_descriptors(descriptors: Descriptors) -> None:
    described = descriptors.firmware("x")
    change("mapping.executable.format", "qcow2")(described)
    descriptors.write(0, "x.json", described)
    made = find_firmware(WINDOWS.firmware_features, descriptors.directories, ())
    expected = Firmware(descriptors.root / "x.CODE", "qcow2", descriptors.root / "x.VARS", "raw")
    assert made == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
PATHS = (
    *("interface-types", "mapping", "mapping.device", "mapping.mode", "mapping.executable"),
    *("mapping.executable.filename", "mapping.executable.format", "mapping.nvram-template"),
    *("mapping.nvram-template.filename", "mapping.nvram-template.format"),
    *("features", "targets"),
)


@given(path=st.sampled_from(PATHS), value=JSON)
@example(path="mapping.executable.filename", value="a file name without\0an end")
@settings(max_examples=300)
def test_a_descriptor_of_another_shape_is_no_reason_to_fail(path: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        descriptors = Descriptors(Path(folder))
        odd = copy.deepcopy(descriptors.firmware("odd"))
        change(path, value)(odd)
        descriptors.write(0, "40-odd.json", odd)
        descriptors.write(0, "50-right.json", descriptors.firmware("right"))
        assert find_firmware(WINDOWS.firmware_features, descriptors.directories, ()) is not None


@pytest.mark.parametrize("content", ["{", "null", "[]", "7", '"text"', "\ufeff{}"])
def test_a_broken_descriptor_is_no_reason_to_fail(descriptors: Descriptors, content: str) -> None:
    descriptors.write(0, "40-broken.json", content)
    (descriptors.directories[0] / "41-directory.json").mkdir()
    (descriptors.directories[0] / "42-dangling.json").symlink_to("nowhere")
    (descriptors.directories[0] / "43-binary.json").write_bytes(bytes(range(256)))
    descriptors.write(0, "README.txt", descriptors.firmware("readme"))
    descriptors.write(0, "50-right.json", descriptors.firmware("right"))
    assert descriptors.found() == "right"


def test_without_descriptors_the_distributions_paths_are_tried_in_order(
    descriptors: Descriptors,
) -> None:
    shutil.rmtree(descriptors.directories[0])
    for name in ("debian", "fedora", "described"):
        descriptors.firmware(name)
    half = (f"{descriptors.root}/debian.CODE", "/nowhere/VARS.fd")
    pairs = [(f"{descriptors.root}/{n}.CODE", f"{descriptors.root}/{n}.VARS") for n in ("fedora",)]
    assert descriptors.found() is None
    assert descriptors.found((half,)) is None
    assert descriptors.found((half, *pairs)) == "fedora"
    descriptors.write(2, "90-x.json", descriptors.firmware("described"))
    assert descriptors.found((half, *pairs)) == "described"


def test_the_four_distributions_paths_are_known() -> None:
    for code, variables in (
        ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"),
        ("/usr/share/edk2/x64/OVMF_CODE.secboot.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
        (
            "/opt/homebrew/share/qemu/edk2-x86_64-secure-code.fd",
            "/opt/homebrew/share/qemu/edk2-i386-vars.fd",
        ),
    ):
        assert (code, variables) in firmware_module.KNOWN_PAIRS


@pytest.mark.parametrize(
    ("environ", "own"),
    [
        ({"HOME": "/home/me"}, "/home/me/.config/qemu/firmware"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": ""}, "/home/me/.config/qemu/firmware"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": "/etc/me"}, "/etc/me/qemu/firmware"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": "me"}, "/home/me/.config/qemu/firmware"),
        ({"HOME": "me"}, "/nonexistent/qemu/firmware"),
    ],
)
def test_descriptors_are_sought_where_qemu_says(environ: dict[str, str], own: str) -> None:
    expected = ["/usr/share/qemu/firmware", "/etc/qemu/firmware", own]
    assert [str(directory) for directory in descriptor_directories(environ)] == expected


def test_a_host_without_a_home_still_has_the_systems_descriptors() -> None:
    found = descriptor_directories({})
    assert [str(directory) for directory in found[:2]] == [
        "/usr/share/qemu/firmware",
        "/etc/qemu/firmware",
    ]


@root_only
def test_a_home_that_this_user_may_not_enter_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HOME belongs to another user, as after `sudo -u`."""
    with tempfile.TemporaryDirectory() as closed:
        monkeypatch.setenv("HOME", closed)
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        os.seteuid(NOBODY)
        try:
            assert windows_tools().sidecars["swtpm"].name == "swtpm"
        finally:
            os.seteuid(0)


# Programs


@pytest.fixture
def bin_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory in PATH, with all programs in it."""
    path = tmp_path / "bin"
    path.mkdir()
    for program in PROGRAMS:
        (path / program).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(path))
    return path


def this_is(monkeypatch: pytest.MonkeyPatch, release: dict[str, str] | None) -> None:
    """Have the host be a distribution with this os-release file."""

    def freedesktop_os_release() -> dict[str, str]:
        if release is None:
            raise OSError("there is no os-release file")
        return release

    monkeypatch.setattr(platform, "freedesktop_os_release", freedesktop_os_release)


def no_firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firmware_module, "find_firmware", lambda *arguments: None)


APT = "sudo apt-get install qemu-system-x86 qemu-utils swtpm ovmf"
DNF = "sudo dnf install qemu-system-x86-core qemu-img swtpm edk2-ovmf"
PACMAN = "sudo pacman -S qemu-system-x86 qemu-img swtpm edk2-ovmf"
BREW = "brew install qemu swtpm"


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "debian"}, APT),
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, APT),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, APT),
        ({"ID": "fedora"}, DNF),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, DNF),
        ({"ID": "arch"}, PACMAN),
        ({"ID": "manjaro", "ID_LIKE": "arch"}, PACMAN),
    ],
)
def test_all_that_is_missing_is_said_at_once_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, bin_directory: Path, release: dict[str, str], command: str
) -> None:
    for program in PROGRAMS[:3]:
        (bin_directory / program).unlink()
    no_firmware(monkeypatch)
    this_is(monkeypatch, release)
    with pytest.raises(HostError) as caught:
        windows_tools()
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    for phrase in ("qemu-system-x86_64", "qemu-img", "swtpm", "Secure Boot (OVMF)", "not found"):
        assert phrase in message.split("Install with")[0]
    assert f"Install with: {command}" == caught.value.hint
    assert caught.value.missing == ("qemu-system-x86_64", "qemu-img", "swtpm", "ovmf")
    looked = message.split("Looked in:")[1]
    for place in (str(bin_directory), *map(str, descriptor_directories(os.environ))):
        assert place in looked
    for code, _ in firmware_module.KNOWN_PAIRS:
        assert code in looked


@pytest.mark.parametrize("release", [None, {}, {"ID": "slackware"}, {"ID": "nixos", "ID_LIKE": ""}])
def test_an_unknown_distribution_gets_every_known_command(
    monkeypatch: pytest.MonkeyPatch, bin_directory: Path, release: dict[str, str] | None
) -> None:
    for program in PROGRAMS[:3]:
        (bin_directory / program).unlink()
    no_firmware(monkeypatch)
    this_is(monkeypatch, release)
    with pytest.raises(HostError, match="distribution is unknown") as caught:
        windows_tools()
    for command, name in (
        (APT, "Debian or Ubuntu"),
        (DNF, "Fedora"),
        (PACMAN, "Arch Linux"),
        (BREW, "Homebrew"),
    ):
        assert f"{command} ({name})" in str(caught.value)


def test_homebrew_is_what_a_mac_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even though no Windows guest runs there: other guests will ask the same question."""
    from smolvm_async.host.distribution import QEMU, QEMU_IMG, how_to_install

    monkeypatch.setattr(sys, "platform", "darwin")
    assert how_to_install([QEMU, QEMU_IMG, *programs(WINDOWS)]) == f"Install with: {BREW}"


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("qemu-img", "qemu-utils"),
        ("swtpm", "swtpm"),
        ("setpriv", "util-linux"),
    ],
)
def test_only_what_is_missing_is_to_be_installed(
    monkeypatch: pytest.MonkeyPatch, bin_directory: Path, program: str, package: str
) -> None:
    (bin_directory / program).unlink()
    this_is(monkeypatch, {"ID": "debian"})
    with pytest.raises(HostError) as caught:
        windows_tools()
    message = str(caught.value)
    assert message.startswith(f"{program} not found. ")
    assert message.endswith(f" Install with: sudo apt-get install {package}")
    assert f"Looked in: PATH ({bin_directory})." in message


def test_firmware_alone_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, bin_directory: Path
) -> None:
    no_firmware(monkeypatch)
    this_is(monkeypatch, {"ID": "debian"})
    with pytest.raises(HostError) as caught:
        windows_tools()
    message = str(caught.value)
    assert message.startswith("UEFI firmware with Secure Boot (OVMF) not found. ")
    assert message.endswith(" Install with: sudo apt-get install ovmf")
    assert str(bin_directory) not in message, "PATH has no firmware"


def test_a_file_that_cannot_be_executed_is_no_program(bin_directory: Path) -> None:
    (bin_directory / "swtpm").unlink()
    (bin_directory / "swtpm").write_text("#!/bin/sh\n")
    with pytest.raises(HostError, match="swtpm not found"):
        windows_tools()


def test_the_host_is_looked_at_once_and_again_when_path_changes(
    monkeypatch: pytest.MonkeyPatch, bin_directory: Path
) -> None:
    tools = windows_tools()
    assert tools.qemu == bin_directory / "qemu-system-x86_64"

    def forbidden(*arguments: object, **options: object) -> None:
        pytest.fail("the host was looked at again")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "which", forbidden)
        patched.setattr(firmware_module, "find_firmware", forbidden)
        assert windows_tools() is tools
    other = bin_directory.with_name("other")
    shutil.copytree(bin_directory, other, symlinks=True)
    monkeypatch.setenv("PATH", f"{other}:{bin_directory}")
    assert windows_tools().qemu == other / "qemu-system-x86_64"


def test_what_was_missing_is_found_once_it_is_installed(bin_directory: Path) -> None:
    (bin_directory / "swtpm").unlink()
    with pytest.raises(HostError):
        windows_tools()
    (bin_directory / "swtpm").symlink_to("/bin/true")
    assert windows_tools().sidecars["swtpm"] == bin_directory / "swtpm"


def test_a_relative_path_entry_gives_absolute_programs(
    monkeypatch: pytest.MonkeyPatch, bin_directory: Path
) -> None:
    monkeypatch.chdir(bin_directory.parent)
    monkeypatch.setenv("PATH", bin_directory.name)
    tools = windows_tools()
    found = (tools.qemu, tools.qemu_img, tools.sidecars["swtpm"])
    assert {path.parent for path in found} == {bin_directory}


# The accelerator


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    """A processor that can run guests."""
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu vme vmx sse\nvmx flags\t: vnmi\n")
    return path


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device that answers as a full KVM does."""
    path = tmp_path / "kvm"
    path.touch()
    kvm_answers(monkeypatch, version=12, smm=1)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return path


def kvm_answers(monkeypatch: pytest.MonkeyPatch, *, version: int, smm: int) -> None:
    answers = {0xAE00: version, 0xAE03: smm}

    def ioctl(fd: int, request: int, argument: int = 0) -> int:
        assert request == 0xAE00 or argument == 117  # KVM_CAP_X86_SMM
        return answers[request]

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


def problem(device: Path, cpuinfo: Path, modules: Path = Path("/nonexistent")) -> str:
    """The reason and the cure, which are sentences of a longer message."""
    found = accelerator.probe_kvm(device, cpuinfo, modules)
    assert found is not None
    assert not found.reason.endswith(".")
    assert found.cure.endswith(".")
    return f"{found.reason} | {found.cure}"


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_kvm_is_taken_where_it_can_run_guests(device: Path, cpuinfo: Path, flag: str) -> None:
    cpuinfo.write_text(f"flags\t\t: fpu {flag}\n")
    assert accelerator.probe_kvm(device, cpuinfo) is None
    assert accelerator.probe_kvm(device, cpuinfo.with_name("missing")) is None


def test_kvm_without_hardware_virtualization_is_not_trusted(device: Path, cpuinfo: Path) -> None:
    for text in ("flags\t\t: fpu vmxnet\n", "", "model name\t: vmx svm\n"):
        cpuinfo.write_text(text)
        message = problem(device, cpuinfo)
        for phrase in ("(vmx)", "(svm)", "nested virtualization", "| Enable virtualization"):
            assert phrase in message


@pytest.mark.parametrize(
    ("version", "smm", "phrases"),
    [
        (11, 1, ["KVM API version 11", "| Update"]),
        (12, 0, ["SMM", "Secure Boot needs", "| Use a kernel"]),
    ],
)
def test_kvm_that_lacks_something_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
    device: Path,
    cpuinfo: Path,
    version: int,
    smm: int,
    phrases: list[str],
) -> None:
    kvm_answers(monkeypatch, version=version, smm=smm)
    for phrase in phrases:
        assert phrase in problem(device, cpuinfo)


def test_a_missing_device_is_a_matter_of_firmware_or_module(tmp_path: Path, cpuinfo: Path) -> None:
    message = problem(tmp_path / "kvm", cpuinfo)
    for phrase in (
        f"{tmp_path}/kvm does not exist",
        "| Load the module",
        "sudo modprobe kvm_intel (Intel) or sudo modprobe kvm_amd (AMD)",
    ):
        assert phrase in message


def test_a_device_that_a_container_hides_is_passed_on(tmp_path: Path, cpuinfo: Path) -> None:
    (tmp_path / "kvm_amd").mkdir()
    message = problem(tmp_path / "kvm", cpuinfo, modules=tmp_path)
    assert "this kernel has loaded KVM" in message
    assert "docker run --device /dev/kvm" in message
    assert "modprobe" not in message


@root_only
def test_a_device_of_another_user_is_a_matter_of_groups(device: Path, cpuinfo: Path) -> None:
    os.seteuid(NOBODY)
    try:
        message = problem(device, cpuinfo)
    finally:
        os.seteuid(0)
    for phrase in (f"this user may not open {device}", "sudo usermod -aG kvm"):
        assert phrase in message


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_another_device_is_no_kvm(path: str, cpuinfo: Path) -> None:
    assert f"{path} does not answer as KVM" in problem(Path(path), cpuinfo)


def test_a_directory_is_no_kvm(tmp_path: Path, cpuinfo: Path) -> None:
    assert f"{tmp_path} cannot be opened" in problem(tmp_path, cpuinfo)


def test_another_processor_has_no_kvm_for_this_guest(
    monkeypatch: pytest.MonkeyPatch, device: Path, cpuinfo: Path
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    message = problem(device, cpuinfo)
    assert "aarch64" in message
    assert "| Use an x86_64 host." in message


class FakeKvm:
    """The result of the probe of KVM, and the number of probes."""

    def __init__(self, found: accelerator.Problem | None) -> None:
        self.found = found
        self.probes = 0

    def probe(self, *, smm: bool) -> accelerator.Problem | None:
        """Stand in for `probe_kvm`."""
        self.probes += 1
        return self.found


@pytest.fixture
def broken_kvm(monkeypatch: pytest.MonkeyPatch) -> FakeKvm:
    fake = FakeKvm(accelerator.Problem("it is out of order", "Mend it."))
    monkeypatch.setattr(accelerator, "probe_kvm", fake.probe)
    return fake


def test_working_kvm_is_taken_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKvm(None)
    monkeypatch.setattr(accelerator, "probe_kvm", fake.probe)
    assert choose_accelerator("auto") == choose_accelerator("kvm") == (accelerator.KVM, None)
    assert choose_accelerator("tcg") == (accelerator.TCG, None)
    assert fake.probes == 1, "it is probed once for the process"


def test_auto_falls_back_with_one_warning_at_the_callers_line(
    broken_kvm: FakeKvm, blank_image: Path
) -> None:
    for _ in range(2):  # each VM says so, though another VM has said it already
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            line = sys._getframe().f_lineno + 1
            vm = AsyncSmolVM(os="windows", image=blank_image)
        assert vm.accelerator == "tcg"
        (warning,) = caught
        assert warning.category is AcceleratorWarning
        assert (warning.filename, warning.lineno) == (__file__, line)
        message = str(warning.message)
        for phrase in ("it is out of order", "TCG", "many times slower", "Mend it.", "accel='tcg'"):
            assert phrase in message
    assert broken_kvm.probes == 2, "it may work by now"


def test_kvm_that_was_mended_is_taken_by_the_same_process(broken_kvm: FakeKvm) -> None:
    with pytest.raises(HostError, match="out of order"):
        choose_accelerator("kvm")
    broken_kvm.found = None
    assert choose_accelerator("kvm") == choose_accelerator("auto") == (accelerator.KVM, None)


def test_tcg_asks_for_no_warning_and_gets_none(broken_kvm: FakeKvm, blank_image: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AsyncSmolVM(os="windows", image=blank_image, accel="tcg").accelerator == "tcg"
    assert broken_kvm.probes == 0


def test_kvm_where_it_cannot_be_used_is_an_error(
    broken_kvm: FakeKvm, blank_image: Path, data_dir: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(HostError) as caught:
            AsyncSmolVM(os="windows", image=blank_image, accel="kvm", data_dir=data_dir)
    assert isinstance(caught.value, ValueError)
    assert not data_dir.exists()
    for phrase in ("accel='kvm'", "it is out of order", "Mend it.", "accel='tcg'"):
        assert phrase in str(caught.value)


@pytest.mark.skipif(accelerator.probe_kvm() is None, reason="KVM works here")
def test_this_host_itself_gives_a_reason_and_a_cure(blank_image: Path) -> None:
    with pytest.raises(HostError, match="accel='kvm' cannot be used: ") as caught:
        AsyncSmolVM(os="windows", image=blank_image, accel="kvm")
    found = accelerator.probe_kvm()
    assert found is not None
    assert f"{found.reason}. {found.cure} " in str(caught.value)
    with pytest.warns(AcceleratorWarning, match="KVM cannot be used"):
        AsyncSmolVM(os="windows", image=blank_image, accel="auto")
