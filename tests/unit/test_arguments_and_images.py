"""The arguments of the constructor, above all `image=`: accepted and refused.

Every refusal is a `SmolVMError` and a `ValueError`, tells what to do, and leaves no file behind.
"""

from __future__ import annotations

import math
import os
import pwd
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    HostError,
    ImageError,
    SmolVMError,
    Timeouts,
    UnsupportedError,
)
from smolvm_async.config.options import make_config, make_data_dir
from smolvm_async.config.vm_config import VMConfig

NOBODY = 65534

ADVICE = re.compile(
    r"\b(pass|write|give|leave|put|use|run|download|convert|should be|there are|choose|check)\b",
    re.IGNORECASE,
)

Make = Callable[..., AsyncSmolVM]
Refuse = Callable[..., str]


class BytesPath:
    """A legal os.PathLike that is of no use here."""

    def __fspath__(self) -> bytes:
        return b"/tmp/disk.qcow2"

    def __repr__(self) -> str:
        return "BytesPath()"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory of the test's own, which is also the working directory."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def make(tmp_path: Path, blank_image: Path, data_dir: Path) -> Make:
    """Construct a VM that would be fine, but for the arguments given; no file may come of it."""

    def make(**arguments: Any) -> AsyncSmolVM:
        defaults = {"os": "windows", "image": blank_image, "accel": "tcg", "data_dir": data_dir}
        before = sorted(tmp_path.rglob("*"))
        try:
            return AsyncSmolVM(**{**defaults, **arguments})
        finally:
            assert sorted(tmp_path.rglob("*")) == before

    return make


@pytest.fixture
def refuse(make: Make) -> Refuse:
    """Construct what must be refused; returns the message."""

    def refuse(kind: type[SmolVMError] = ConfigError, **arguments: Any) -> str:
        with pytest.raises(kind) as caught:
            make(**arguments)
        assert isinstance(caught.value, SmolVMError)
        assert isinstance(caught.value, ValueError)
        message = str(caught.value)
        assert message.endswith("."), "a message is made of sentences"
        assert ADVICE.search(message), f"what is one to do? {message}"
        return message

    return refuse


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Interrupt a test that hangs."""

    def expired(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def exists(path: Path) -> bool:
    return path.exists()


def config(**arguments: Any) -> VMConfig:
    """Return the configuration that the constructor makes, before it looks at the host."""
    return make_config(**{"os": "windows", "image": "/disk.qcow2", **arguments})


# The guest OS and what it supports


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (
            {"image": None},
            ["image= is missing", "does not build Windows images", "qcow2", "installed"],
        ),
        ({"os": None}, ["os= is missing", "cannot detect", "pass os='windows'"]),
        ({"os": None, "image": "~/disk.qcow2"}, ["os= is missing", "'~/disk.qcow2'"]),
        ({"os": None, "image": "disk.qcow2"}, ["os= is missing", "'disk.qcow2'"]),
        ({"os": None, "image": "file:///disk.qcow2"}, ["os= is missing", "'file:///disk.qcow2'"]),
        ({"image": "s3://bucket/disk"}, ["os='windows'", "s3://bucket/disk", "manifest", "leave"]),
        ({"os": "Windows"}, ["os='Windows'", "pass os='windows'"]),
        ({"os": b"windows"}, ["os=b'windows'", "pass os='windows'"]),
        ({"os": ["windows"]}, ["os=['windows']", "pass os='windows'"]),
    ],
    ids=repr,
)
def test_an_os_and_an_image_that_do_not_go_together_are_refused(
    refuse: Refuse, arguments: Mapping[str, Any], phrases: list[str]
) -> None:
    message = refuse(**arguments)
    for phrase in phrases:
        assert phrase in message


@pytest.mark.parametrize(
    ("arguments", "feature", "workaround"),
    [
        ({"mounts": ["/srv"]}, "mounts=", "allowed_host_ports"),
        ({"mounts": ("/srv",)}, "mounts=", "upload_file()"),
        ({"writable_mounts": True}, "mounts=", "Put the files into the image"),
    ],
    ids=repr,
)
def test_options_that_windows_lacks_are_refused_with_the_workaround(
    refuse: Refuse, arguments: Mapping[str, Any], feature: str, workaround: str
) -> None:
    # Even where another argument is missing: the user learns first what cannot be had at all.
    for image in ({}, {"image": "/nowhere.qcow2"}):
        message = refuse(UnsupportedError, **arguments, **image)
        assert feature in message
        assert "Windows" in message
        assert workaround in message


@pytest.mark.anyio
async def test_methods_that_windows_lacks_are_refused_before_anything_is_created(
    make: Make, data_dir: Path
) -> None:
    vm = make()
    with pytest.raises(UnsupportedError) as caught:
        await vm.open_terminal()
    assert not exists(data_dir)
    assert isinstance(caught.value, ValueError)
    for phrase in ("open_terminal()", "Windows", "spawn()"):
        assert phrase in str(caught.value)


def test_options_that_windows_lacks_may_be_spelled_out_as_unused(make: Make) -> None:
    make(mounts=[], writable_mounts=False, internet_settings=None)


def test_a_windows_guest_needs_a_linux_host(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    message = refuse(HostError)
    for phrase in ("Windows", "need a Linux host", "'darwin'", "Run this on a Linux machine"):
        assert phrase in message


# The image


NAMES = [
    "plain.qcow2",
    "without-suffix",
    "Program Files (x86).qcow2",
    "comma,snapshot=on,file=x",
    """quotes'"`.qcow2""",
    "percent%41%2f%%.qcow2",
    "question?and#hash",
    "back\\slash",
    "new\nline\tand tab",
    "düsseldorf-ディスク-💾.qcow2",
    "x" * 200,
    "nbd:unix:socket",
    '{"driver": "file"}',
    "-drive",
    os.fsdecode(b"latin1-\xe9\xff.qcow2"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_image_is_found_under_every_form_of_its_path(
    make: Make, home: Path, blank_image: Path, name: str
) -> None:
    folder = home / "my images"
    folder.mkdir()
    shutil.copy(blank_image, folder / name)
    os.symlink(folder / name, home / name)
    uri = quote(os.fsencode(folder / name))
    for image in (
        str(folder / name),
        folder / name,
        f"my images/{name}",
        Path("my images", name),
        f"./{name}",
        f"~/my images/{name}",
        f"../home/{name}",
        f"file://{uri}",
        f"file://localhost{uri}",
        f"FILE://{uri}",
        f"file:{uri}",
    ):
        assert make(image=image).status == "created", image


REFERENCES = [
    ("file://server/disk.qcow2", ["'server'", "only files on this machine", "file:///"]),
    ("file://localhost:80/disk.qcow2", ["'localhost:80'", "file:///"]),
    ("file://user@localhost/disk.qcow2", ["'user@localhost'", "file:///"]),
    ("file://[fe80::1/disk.qcow2", ["file:///"]),
    ("file://ser\u2100ver/disk.qcow2", ["file:///"]),
    ("file:///disk.qcow2?version=1", ["'?' and '#'", "%3F", "plain path"]),
    ("file:///disk.qcow2#top", ["'?' and '#'", "%23", "plain path"]),
    ("file:///100%.qcow2", ["two hex digits", "%25", "plain path"]),
    ("file:///100%4", ["two hex digits", "%25", "plain path"]),
    ("file:///100%zz.qcow2", ["two hex digits", "%25", "plain path"]),
    ("file:///disk%00.qcow2", ["NUL"]),
    ("/disk\0.qcow2", ["NUL"]),
    ("file:disk.qcow2", ["absolute path"]),
    ("file://", ["absolute path"]),
    ("file://localhost", ["absolute path"]),
    ("https://example.com/disk.qcow2", ["https:// images", "download", "path"]),
    ("HTTP://example.com/disk.qcow2", ["images are not supported", "download", "path"]),
    ("nbd+unix:///disk?socket=/run/nbd", ["nbd+unix:// images", "download", "path"]),
    ("S3://bucket/disk", ["S3://bucket/disk"]),
    ("", ["image=''", "empty", "pass the path"]),
    (b"/disk.qcow2", ["image=b'/disk.qcow2'", "str or Path"]),
    (BytesPath(), ["image=", "str or Path"]),
    (7, ["image=7", "str or Path"]),
    ("/lone\ud800surrogate.qcow2", []),
    ("~nobody\0/disk.qcow2", ["NUL"]),
    ("~\ud800/disk.qcow2", ["surrogate"]),
    ("~no-such-user/disk.qcow2", ["names a user who does not exist"]),
]


@pytest.mark.parametrize(("image", "phrases"), REFERENCES, ids=lambda value: ascii(value)[:40])
def test_an_image_that_is_no_local_path_is_refused(
    refuse: Refuse, image: object, phrases: list[str]
) -> None:
    message = refuse(image=image)
    for phrase in phrases:
        assert phrase in message
    if isinstance(image, str):
        assert repr(image) in message


@pytest.mark.parametrize("character", ["\n", "\t", "\r"], ids=ascii)
def test_a_uri_never_names_another_file_than_it_says(
    refuse: Refuse, home: Path, blank_image: Path, character: str
) -> None:
    """Python's own parser drops these three from a URI without a word."""
    shutil.copy(blank_image, home / "disk.qcow2")
    refuse(ImageError, image=f"file://{home}/di{character}sk.qcow2")


def test_a_path_through_a_symbolic_link_names_the_file_that_the_kernel_finds(
    refuse: Refuse, home: Path, blank_image: Path
) -> None:
    (home / "real" / "folder").mkdir(parents=True)
    (home / "link").symlink_to(home / "real" / "folder")
    shutil.copy(blank_image, home / "disk.qcow2")
    assert not os.path.exists("link/../disk.qcow2")  # that would be real/disk.qcow2
    refuse(ImageError, image="link/../disk.qcow2")


def a_directory(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)  # the working directory's: a socket's path is short


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def an_empty_file(path: Path) -> None:
    path.touch()


def a_text(path: Path) -> None:
    path.write_text("Windows 11\n")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere.qcow2")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def nothing(path: Path) -> None:
    pass


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize(
    ("put", "phrases"),
    [
        (nothing, ["does not exist"]),
        (a_dangling_link, ["does not exist"]),
        (a_link_to_itself, ["symbolic links"]),
        (a_directory, ["is a directory", "pass the qcow2 file"]),
        (a_fifo, ["not a plain file", "pass a qcow2 file"]),
        (a_socket, ["cannot be opened"]),
        (a_device, ["not a plain file", "pass a qcow2 file"]),
        (an_empty_file, ["is empty", "download or copy"]),
        (a_text, ["not a qcow2", "a text ('Windows 11')"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_no_readable_qcow2_is_refused_by_its_path(
    refuse: Refuse, home: Path, put: Callable[[Path], None], phrases: list[str]
) -> None:
    put(home / "disk.qcow2")
    for image in ("disk.qcow2", "~/disk.qcow2", f"file://{home}/disk.qcow2"):
        message = refuse(ImageError, image=image)
        assert repr(f"{home}/disk.qcow2") in message
        for phrase in phrases:
            assert phrase in message


def test_a_file_cannot_be_a_folder_of_the_path(refuse: Refuse, blank_image: Path) -> None:
    message = refuse(ImageError, image=blank_image / "disk.qcow2")
    assert repr(f"{blank_image}/disk.qcow2") in message
    assert "Not a directory" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("closed", ["file", "folder"])
def test_an_image_that_this_user_may_not_read_is_refused(blank_image: Path, closed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are root's
        os.chmod(folder, 0o700 if closed == "folder" else 0o755)
        image = Path(folder, "disk.qcow2")
        shutil.copy(blank_image, image)
        image.chmod(0o600 if closed == "file" else 0o644)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(ImageError) as caught:
                AsyncSmolVM(os="windows", image=image, accel="tcg")
        finally:
            os.seteuid(0)
    for phrase in (repr(str(image)), "cannot be read by this user", "give read permission to it"):
        assert phrase in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_image_that_this_user_may_only_read_is_enough(
    blank_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("HOME", folder)
        os.chmod(folder, 0o555)
        image = Path(folder, "disk.qcow2")
        shutil.copy(blank_image, image)
        image.chmod(0o444)
        os.seteuid(NOBODY)
        try:
            AsyncSmolVM(os="windows", image=image, accel="tcg")
        finally:
            os.seteuid(0)


# The other arguments


def test_what_is_left_out_has_the_documented_default(home: Path) -> None:
    made = config()
    assert (made.memory, made.cpus, made.accel) == (4096, 2, "auto")
    assert made.timeouts == Timeouts()
    assert made.data_dir == home / ".local/state/smolvm-async"
    assert re.fullmatch("vm-[0-9a-f]{8}", made.vm_id)
    assert made.vm_id != config().vm_id


@pytest.mark.parametrize(
    ("memory", "phrases"),
    [
        (2047, ["memory=2047", "2048 MiB", "Windows", "pass memory=2048 or more"]),
        (4, ["memory=4 ", "2048 MiB", "pass memory=2048 or more"]),
        (0, ["memory=0 ", "pass memory=2048 or more"]),
        (-4096, ["memory=-4096", "pass memory=2048 or more"]),
        (True, ["memory=True", "whole number of MiB"]),
        (4096.0, ["memory=4096.0", "whole number of MiB"]),
        (math.nan, ["memory=nan", "whole number of MiB"]),
        ("4096", ["memory='4096'", "whole number of MiB"]),
        ("4G", ["memory='4G'", "such as memory=4096"]),
    ],
)
def test_memory_is_a_whole_number_of_mib_that_windows_can_live_with(
    refuse: Refuse, memory: object, phrases: list[str]
) -> None:
    message = refuse(memory=memory)
    for phrase in phrases:
        assert phrase in message
    assert config(memory=2048).memory == 2048


def test_more_memory_than_a_machine_can_address_is_refused_at_once(refuse: Refuse) -> None:
    message = refuse(memory=1 << 60)
    assert f"memory={1 << 60}" in message


@pytest.mark.parametrize("cpus", [0, -1, 256, 10**20, True, 2.0, "2"])
def test_cpus_is_a_whole_number_from_1_to_255(refuse: Refuse, cpus: object) -> None:
    message = refuse(cpus=cpus)
    assert f"cpus={cpus!r} is wrong" in message
    assert "a whole number of cores from 1 to 255." in message
    assert (config(cpus=1).cpus, config(cpus=255).cpus) == (1, 255)


ID_CHARACTERS = string.ascii_lowercase + string.digits + "-"
ALMOST_IDS = st.text(ID_CHARACTERS + "A_./ ,=\n\0\u0131\u00df\u0661", max_size=66)


@given(st.one_of(ALMOST_IDS, st.text(ID_CHARACTERS, min_size=60, max_size=66), st.text()))
@example("a" * 63)
@example("a" * 64)
@example("vm\n")
@example("\u0663")  # a digit to str.isdigit()
@settings(max_examples=500)
def test_exactly_the_ids_of_the_grammar_are_taken(vm_id: str) -> None:
    in_grammar = (
        1 <= len(vm_id) <= 63
        and set(vm_id) <= set(ID_CHARACTERS)
        and not vm_id.startswith("-")
        and not vm_id.endswith("-")
    )
    if in_grammar:
        assert config(vm_id=vm_id).vm_id == vm_id
    else:
        with pytest.raises(ConfigError, match="1 to 63 lower-case letters") as caught:
            config(vm_id=vm_id)
        assert f"vm_id={vm_id!r}" in str(caught.value)


@pytest.mark.parametrize("vm_id", [7, b"vm", ["vm"], False])
def test_an_id_is_a_string(refuse: Refuse, vm_id: object) -> None:
    message = refuse(vm_id=vm_id)
    assert f"vm_id={vm_id!r} is wrong" in message
    assert "such as vm_id='build-42'" in message


def test_a_vm_has_the_id_that_was_asked_for(make: Make) -> None:
    assert make(vm_id="build-42").vm_id == "build-42"


@pytest.mark.parametrize(
    ("timeouts", "phrases"),
    [
        ({"powerdonw": 1}, ["timeouts=", "powerdonw", "powerdown"]),
        (
            {"launch": 1, "b": 1, "a": 2},
            ["timeouts=", "a, b", "launch, boot, input, powerdown, quit"],
        ),
        ({1: 1}, ["timeouts=", "1", "launch, boot, input, powerdown, quit"]),
        ({"launch": 0}, ["launch=0", "greater than 0"]),
        ({"boot": 0.0}, ["boot=0.0", "greater than 0"]),
        ({"launch": -1}, ["launch=-1", "greater than 0"]),
        ({"powerdown": -0.1}, ["powerdown=-0.1", "greater than or equal to 0"]),
        ({"launch": math.nan}, ["launch=nan", "finite"]),
        ({"quit": math.nan}, ["quit=nan", "finite"]),
        ({"terminate": math.inf}, ["terminate=inf", "finite"]),
        ({"quit": 86401}, ["quit=86401", "86400"]),
        ({"quit": "5"}, ["quit='5'", "number"]),
        ({"quit": True}, ["quit=True", "number"]),
        ({"quit": None}, ["quit=None", "number"]),
        (30, ["timeouts=30", "Timeouts(powerdown=10)", "mapping"]),
        ([("quit", 1)], ["timeouts=[('quit', 1)]", "Timeouts(powerdown=10)", "mapping"]),
    ],
    ids=repr,
)
def test_a_deadline_that_cannot_be_meant_is_refused(
    refuse: Refuse, timeouts: Any, phrases: list[str]
) -> None:
    messages = [refuse(timeouts=timeouts)]
    if isinstance(timeouts, dict) and set(timeouts) <= set(Timeouts.model_fields):
        with pytest.raises(ConfigError) as caught:
            Timeouts(**timeouts)
        messages.append(str(caught.value))
    for message in messages:
        for phrase in phrases:
            assert phrase in message


def test_deadlines_are_given_by_name_and_the_others_keep_their_default() -> None:
    misspelt: dict[str, Any] = {"powerdonw": 10}
    asked = Timeouts(powerdown=0, launch=12)
    assert config(timeouts=asked).timeouts == asked
    assert config(timeouts={"powerdown": 0, "launch": 12}).timeouts == asked
    assert (asked.powerdown, asked.launch, asked.quit) == (0, 12, Timeouts().quit)
    with pytest.raises(ConfigError, match="powerdonw"):
        Timeouts(**misspelt)


@pytest.mark.parametrize("accel", ["xen", "KVM", "", None, 1])
def test_an_unknown_accelerator_is_refused_with_the_known_ones(
    refuse: Refuse, accel: object
) -> None:
    message = refuse(accel=accel)
    for phrase in (f"accel={accel!r}", "'auto'", "'kvm'", "'tcg'"):
        assert phrase in message


@pytest.mark.parametrize(
    "data_dir",
    ["", b"/tmp/vms", 7, "a\0b", BytesPath(), "/tmp/lone\ud800surrogate", "~x\0"],
    ids=ascii,
)
def test_a_data_dir_that_is_no_path_is_refused(refuse: Refuse, data_dir: object) -> None:
    message = refuse(data_dir=data_dir)
    assert "data_dir=" in message
    assert "pass the path of a directory" in message


@pytest.mark.parametrize(
    ("data_dir", "expected"),
    [
        ("vms", "{home}/vms"),
        (Path("vms"), "{home}/vms"),
        ("~/vms,a=b", "{home}/vms,a=b"),
        ("/srv/vms", "/srv/vms"),
    ],
)
def test_a_data_dir_is_a_path_like_any_other(
    home: Path, monkeypatch: pytest.MonkeyPatch, data_dir: object, expected: str
) -> None:
    made = config(data_dir=data_dir)
    monkeypatch.chdir("/")  # the working directory may change later
    assert str(made.data_dir) == expected.format(home=home)


@pytest.mark.parametrize(
    ("state_home", "expected"),
    [
        ("/var/state", "/var/state"),
        ("relative", "{home}/.local/state"),
        ("", "{home}/.local/state"),
    ],
)
def test_the_default_data_dir_follows_the_xdg_rules(
    home: Path, monkeypatch: pytest.MonkeyPatch, state_home: str, expected: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", state_home)
    assert str(make_data_dir(None)) == expected.format(home=home) + "/smolvm-async"


WITHOUT_HOME = """
import os, sys
os.setgroups([])
os.setuid(54321)  # no entry in the password file
import smolvm_async.config.options as options
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.paths import PathError, expand, xdg_home
for call in (
    lambda: options.make_data_dir(None),
    lambda: xdg_home("XDG_CACHE_HOME", ".cache", "data_dir="),
    lambda: options.make_config(os="windows", image="~/disk.qcow2", data_dir="/vms"),
    lambda: options.make_data_dir("~/vms"),
):
    try:
        print("no error:", call())
    except ConfigError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("home", [None, "", "relative/home"])
def test_a_user_without_a_home_is_told_which_variable_to_set(home: str | None) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    variables.pop("HOME", None)
    if home is not None:
        variables["HOME"] = home
    # Import everything before the user changes: another user may not read this interpreter.
    script = "import smolvm_async, pwd, smolvm_async.config.options\n" + WITHOUT_HOME
    done = subprocess.run(
        [sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True
    )
    state, cache, image, data_dir = done.stdout.splitlines()
    for line in (state, cache, image, data_dir):
        assert f"needs a home directory, but HOME={home or ''!r} is not" in line
        assert "user id 54321" in line
    assert "Set HOME or XDG_STATE_HOME" in state
    assert "or pass data_dir=" in state
    assert "Set HOME or XDG_CACHE_HOME" in cache
    assert image.startswith("image='~/disk.qcow2' needs")
    assert data_dir.startswith("data_dir='~/vms' needs")


@pytest.mark.parametrize("home", ["", "relative/home"])
def test_a_home_that_is_no_absolute_path_gives_way_to_the_password_file(
    monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    recorded = pwd.getpwuid(os.getuid()).pw_dir
    assert make_data_dir(None) == Path(recorded, ".local/state/smolvm-async")
    assert make_data_dir("~/vms") == Path(recorded, "vms")


def test_a_home_that_is_the_root_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert [make_data_dir(path) for path in ("~", "~/vms")] == [Path("/"), Path("/vms")]


@pytest.mark.parametrize("on_progress", ["print", 1, []])
def test_on_progress_is_something_to_call(refuse: Refuse, on_progress: object) -> None:
    message = refuse(on_progress=on_progress)
    assert f"on_progress={on_progress!r}" in message
    assert "pass a function" in message


@pytest.mark.anyio
@pytest.mark.parametrize("timeout", [-1, -0.5, math.nan, math.inf, "5"])
async def test_a_methods_deadline_that_cannot_be_meant_is_refused_first(
    make: Make, timeout: Any
) -> None:
    vm = make()
    with pytest.raises(ConfigError, match=f"timeout={timeout!r} .* seconds, 0 or more"):
        await vm.stop(timeout=timeout)
    with pytest.raises(ConfigError, match=f"timeout={timeout!r} .* seconds, 0 or more"):
        await vm.wait_for("ready", timeout=timeout)


@pytest.mark.anyio
async def test_an_unknown_boot_state_is_refused_with_the_known_ones(make: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        await make().wait_for("booted")
    for phrase in ("'booted'", "'firmware'", "'operating_system'", "'ready'"):
        assert phrase in str(caught.value)


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no repr")


@pytest.mark.parametrize("argument", ["os", "image", "memory", "vm_id", "cpus", "accel"])
@pytest.mark.parametrize("value", [Unprintable(), 10**5000], ids=["unprintable", "huge"])
def test_a_value_without_a_repr_is_refused_by_its_argument(
    refuse: Refuse, argument: str, value: object
) -> None:
    assert f"{argument}=a" in refuse(**{argument: value})
