"""Errors carry data: through pickles, copies, groups and a VM's control socket, and as JSON."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from smolvm_async import (
    CommandError,
    CommandResult,
    ConfigError,
    HostError,
    SmolVMError,
    VMTimeoutError,
    errors,
)
from smolvm_async.foundation.process import run
from smolvm_async.qemu.events import Trouble
from smolvm_async.vm.attach.messages import error_from_json, error_to_json

# A value for a field of each type, other than the default of any field.
VALUES: dict[object, Any] = {
    str: "ünusual\nvalue",
    int: 3,
    float: 2.5,
    int | None: -9,
    str | bytes: b"\xff\x00",
    tuple[str, ...]: ("qemu-system-x86_64", "-S"),
    object: "an item",
    CommandResult[Any]: CommandResult("false", 1, b"\xfe", b"", 0.25),
    tuple[Trouble, ...]: (Trouble("TROUBLE", 1.5, {"kind": "disk", "message": "a disk is full"}),),
}
CLASSES: list[type[SmolVMError]] = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SmolVMError)
]


def through_json(error: Exception) -> Exception:
    return error_from_json(json.loads(json.dumps(error_to_json(error))))


def through_a_pickle(error: Exception) -> Exception:
    restored: Exception = pickle.loads(pickle.dumps(error))
    return restored


def through_a_group(error: Exception) -> Exception:
    group: ExceptionGroup[Exception] = ExceptionGroup("both", [error, ValueError("x")])
    restored: Exception = pickle.loads(pickle.dumps(group)).exceptions[0]
    return restored


def through_dask(error: Exception) -> BaseException:
    from smolvm_async.fleet.dask.messages import pack, unpack

    return unpack(pack(error, "a worker"))


WAYS = [copy.copy, copy.deepcopy, through_a_pickle, through_a_group, through_dask, through_json]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_of_every_error_survives(
    kind: type[SmolVMError], way: Callable[[Exception], BaseException]
) -> None:
    types = get_type_hints(kind, localns={"CommandResult": CommandResult, "Trouble": Trouble})
    error = kind(**{field.name: VALUES[types[field.name]] for field in fields(kind)})
    restored = way(error)
    assert type(restored) is kind
    assert vars(restored) == vars(error)
    assert {"message", "hint"} <= vars(error).keys()
    assert (str(restored), restored.args) == (str(error), error.args)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_is_documented(kind: type[SmolVMError]) -> None:
    for field in set(vars(kind).get("__annotations__", {})) - {"_"}:
        assert f"        {field}: " in (kind.__doc__ or "")


def test_the_text_is_the_message_and_then_the_hint() -> None:
    assert str(HostError("No swtpm.", hint="Install it.")) == "No swtpm. Install it."
    assert str(HostError("Log:\nx", hint="Install it.")) == "Log:\nx\nInstall it."
    assert str(HostError("No swtpm.")) == "No swtpm."
    assert str(SmolVMError()) == ""


class UsersError(VMTimeoutError):
    """A subclass whose arguments are not those of its base."""

    def __init__(self, what: str, when: int) -> None:
        super().__init__(f"{what} at {when}", seconds=2.0)
        self.when = when


@pytest.mark.parametrize("way", WAYS[:-1])
def test_a_subclass_of_the_users_and_notes_survive(
    way: Callable[[Exception], BaseException],
) -> None:
    error = UsersError("lunch", 12)
    error.add_note("a note")
    restored = way(error)
    assert isinstance(restored, UsersError)
    assert (restored.when, restored.seconds, str(restored)) == (12, 2.0, "lunch at 12")
    assert restored.__notes__[0] == "a note"


@pytest.mark.anyio
async def test_a_host_command_that_fails_is_told_with_its_status_and_output() -> None:
    command = ("sh", "-c", "echo out of luck; exit 3")
    with pytest.raises(CommandError, match="exit status 3\nout of luck") as raised:
        await run(command)
    error = raised.value
    assert (error.command, error.returncode, error.output) == (command, 3, "out of luck\n")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"message": "m", "data": "HostError"}, HostError("m")),  # of a version without fields
        ({"message": "m", "data": "OSError"}, SmolVMError("m")),
        ({"message": "m", "data": "AcceleratorWarning"}, SmolVMError("m")),
        ({"message": "m", "data": "copyreg"}, SmolVMError("m")),
        ({"message": "m", "data": ["HostError"]}, SmolVMError("m")),
        ({}, SmolVMError("None")),
        ({"message": "m", "data": "ConfigError", "fields": {"args": 1}}, ConfigError("m")),
        ({"message": "m", "data": "ConfigError", "fields": {"hint": {}}}, ConfigError("m")),
        ({"message": "m", "data": "HostError", "fields": ["hint"]}, HostError("m")),
        (
            {"message": "m", "data": "HostError", "fields": {"hint": {"base64": "?"}}},
            HostError("m"),
        ),
    ],
)
def test_only_known_classes_and_fields_are_taken_from_another_process(
    sent: dict[str, Any], expected: SmolVMError
) -> None:
    error = error_from_json(sent)
    assert (type(error), vars(error)) == (type(expected), vars(expected))


def test_an_error_about_a_name_that_is_not_utf8_can_be_printed() -> None:
    error = ConfigError(os.fsdecode(b"caf\xe9 is wrong."), hint="Choose another name.")
    assert str(error) == r"caf\udce9 is wrong. Choose another name."
    assert str(error).encode()
    assert os.fsencode(error.message) == b"caf\xe9 is wrong."
