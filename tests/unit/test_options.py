"""The one list of arguments: its signature, its types, the origin it makes; and guests as data."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from smolvm_async import AsyncSmolVM, ConfigError, DaskFleet, Fleet, UnsupportedError
from smolvm_async.config.options import (
    VMOptions,
    complete,
    make_clone_config,
    make_config,
    recheck,
)
from smolvm_async.config.source import BuiltInImage, LocalDisk, PublishedImage
from smolvm_async.controls.ssh.login import check_account, image_login, make_key_pair
from smolvm_async.guests import DEFAULT, GUESTS, PUBLISHED, GuestName
from smolvm_async.guests.features import FEATURES, NEEDED


def test_the_signature_shows_every_argument_with_its_default() -> None:
    parameters = inspect.signature(AsyncSmolVM).parameters
    assert list(parameters) == list(VMOptions.__annotations__)
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert {name: default for name, default in defaults.items() if default is not None} == {
        "accel": "auto",
        "port_forwards": (),
        "keep": False,
        "mounts": (),
        "writable_mounts": False,
    }
    assert parameters["os"].annotation == f"Literal[{', '.join(map(repr, GUESTS))}] | None"


def test_an_unknown_argument_is_a_type_error_as_in_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'memroy'"):
        AsyncSmolVM(memroy=512)  # type: ignore[call-arg]


def test_a_type_checker_finds_a_wrong_key_or_value_in_a_template() -> None:
    """mypy, which checks this file, complains of an ignored error that does not exist."""
    with pytest.raises(ConfigError, match="memroy"):
        Fleet({"memroy": 512})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="memory='512'"):
        Fleet({"memory": "512"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="os='beos'"):
        DaskFleet("tcp://127.0.0.1:1", {"os": "beos"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="memory='512'"):
        AsyncSmolVM(memory="512")  # type: ignore[arg-type]
    mapping: Any = MappingProxyType({"memory": 1})
    with pytest.raises(ConfigError, match="memory=1 "):
        Fleet(mapping)


def test_the_origin_is_a_type_that_the_record_keeps_as_text(tmp_path: Path) -> None:
    disk, kernel = tmp_path / "disk.qcow2", tmp_path / "vmlinuz"
    for options, origin in (
        ({}, BuiltInImage()),
        ({"os": "linux", "image": disk}, LocalDisk(disk)),
        ({"os": "linux", "image": f"file://{disk}"}, LocalDisk(disk)),
        ({"os": "linux", "image": disk, "kernel": kernel}, LocalDisk(disk, kernel)),
        ({"image": "S3://bucket/a"}, PublishedImage("s3://bucket/a/smolvm-image.json")),
    ):
        given: Any = options
        config = make_config(**given)
        assert config.origin == origin
        assert type(config)(**config.model_dump()).origin == origin
        assert {type(config.model_dump()[name]) for name in ("image", "kernel")} == {str}


def test_the_names_of_guests_are_those_of_their_profiles() -> None:
    assert get_args(GuestName) == tuple(GUESTS)


def test_the_features_name_real_methods_and_arguments() -> None:
    for feature in FEATURES.values():
        assert all(hasattr(AsyncSmolVM, name.split("(")[0]) for name in feature.methods)
        assert set(feature.arguments) <= set(VMOptions.__annotations__)


@pytest.mark.parametrize("name", NEEDED)
def test_a_new_guest_os_refuses_what_it_does_not_list(name: str) -> None:
    guest = DEFAULT._replace(title="FreeBSD", features=frozenset(), instead={})
    match = rf"{re.escape(name)}(=|\(\))? is not available for FreeBSD"
    with pytest.raises(UnsupportedError, match=match) as caught:
        guest.require(name)
    assert str(caught.value).endswith(".")
    guest._replace(features=frozenset({NEEDED[name]})).require(name)


def test_a_published_image_may_have_all_that_some_guest_has() -> None:
    PUBLISHED.require("run")
    PUBLISHED.require("kernel")
    PUBLISHED.require("mounts")


@pytest.mark.parametrize("name", ["ttl", "idle_timeout"])
@pytest.mark.parametrize("wrong", [0, -1, True, "60", float("nan"), float("inf"), 10**400])
def test_a_time_to_live_is_more_than_0_seconds(name: str, wrong: object) -> None:
    options: Any = {name: wrong}
    with pytest.raises(
        ConfigError, match=f"{name}=.* is wrong: pass seconds.*, at most 1000000000"
    ):
        make_config(**options)
    options[name] = 60
    assert getattr(make_config(**options), name) == 60.0


def test_a_clone_has_neither_the_labels_nor_the_time_of_its_source() -> None:
    config = make_config(labels={"task": "42"}, ttl=60, idle_timeout=5)
    clone = make_clone_config(config)
    assert (clone.labels, clone.ttl, clone.idle_timeout) == ({}, None, None)
    assert recheck(config) == config
    own = make_clone_config(config, labels={"task": "43"}, ttl=1)
    assert (own.labels, own.ttl) == ({"task": "43"}, 1.0)


def test_a_guest_that_is_used_through_its_agent_has_no_login() -> None:
    config = make_config(os="linux", image="x.qcow2", channel="agent")
    assert (config.channel, config.profile.channels, config.profile.login) == (
        *("agent", ("agent",), "none"),
    )
    config.profile.require("run")
    config.profile.require("spawn")
    for name in ("ssh_access", "open_terminal"):
        with pytest.raises(UnsupportedError, match=r"Linux \(channel='agent'\) guests"):
            config.profile.require(name)
    with pytest.raises(UnsupportedError, match="mounts= is not available"):
        make_config(os="linux", image="x.qcow2", channel="agent", mounts=["/tmp"])


def test_a_channel_that_a_guest_does_not_have_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="channel='agent' is not available for built-in"):
        make_config(channel="agent")
    with pytest.raises(ConfigError, match="channel='telnet' is wrong: pass 'ssh', or 'agent'"):
        make_config(os="linux", image="x.qcow2", channel="telnet")  # type: ignore[arg-type]


def test_an_account_of_a_windows_image_means_ssh() -> None:
    config = make_config(os="windows", image="x.qcow2", password="pass word", key="k")
    assert (config.user, config.channel, config.profile.login) == ("Administrator", "ssh", "image")
    own = make_config(os="windows", image="x.qcow2", user="PC\\me you", password="x")
    assert own.user == "PC\\me you"
    for name in ("spawn", "ssh_access"):
        own.profile.require(name)
    for name in ("spawn(detached=True)", "open_terminal", "mounts"):
        with pytest.raises(UnsupportedError, match=r"Windows \(channel='ssh'\) guests"):
            own.profile.require(name)
    published = make_config(image="s3://bucket/a", password="x")
    assert complete(published, "windows", None, None).profile == own.profile
    with pytest.raises(UnsupportedError, match="password= is not available for Linux guests"):
        complete(published, "linux", None, None)
    for name in ("password", "key"):
        with pytest.raises(UnsupportedError, match=rf"{name}= is not available for .*Leave"):
            make_config(**{name: "x"})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"user= is not available .* pass password= or key="):
        make_config(os="windows", image="x.qcow2", user="me")


def test_a_password_is_in_no_record_no_repr_and_no_message() -> None:
    config = make_config(os="windows", image="x.qcow2", password="s3cret")
    assert config.password == "s3cret"
    shown = (repr(config), str(config), config.model_dump_json(), repr(config.model_dump()))
    assert not [text for text in shown if "s3cret" in text]
    assert recheck(type(config)(**config.model_dump())).password is None
    assert make_clone_config(config).password is None
    assert make_clone_config(config, password="s3cret").password == "s3cret"
    for wrong in ("", "s3cret\0", b"s3cret"):
        with pytest.raises(ConfigError, match="password= is wrong") as caught:
            make_config(os="windows", image="x.qcow2", password=wrong)  # type: ignore[arg-type]
        assert "s3cret" not in str(caught.value)


def test_a_login_needs_a_password_or_a_private_key_of_this_user(tmp_path: Path) -> None:
    key = tmp_path / "key"
    pair = make_key_pair()

    def check(**options: Any) -> None:
        check_account(make_config(os="windows", image="x.qcow2", channel="ssh", **options))

    with pytest.raises(ConfigError, match=r"password= is missing.*'Administrator'.*from_id\(\)"):
        check()
    with pytest.raises(ConfigError, match=r"key=.*cannot be read.*No such file"):
        check(key=key)
    key.write_text(pair.public)
    with pytest.raises(ConfigError, match="is not a private key: pass the file without"):
        check(key=key)
    key.write_bytes(pair.private)
    key.chmod(0o640)
    with pytest.raises(ConfigError, match=r"by other users of this host\. .*chmod 600"):
        check(key=key)
    key.chmod(0o600)
    check(key=key)
    check(password="x")
    config = make_config(os="windows", image="x.qcow2", key=key)
    login = image_login(config, tmp_path).remember(pair.public, tmp_path)
    assert image_login(config, tmp_path) == login
    assert pair.private.decode() not in repr(login) + repr(login.access(1))
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase")
    )
    key.write_bytes(locked)
    with pytest.raises(ConfigError, match=r"cannot be used: .*assphrase"):
        image_login(config, tmp_path)
