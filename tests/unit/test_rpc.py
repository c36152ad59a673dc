"""Methods that another process may call: which they are, and what their types let through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_type_hints

import pytest
from pydantic import ValidationError

from smolvm_async import ConfigError, PortForward, Rung, ShutdownReport, Step
from smolvm_async.config.options import make_config
from smolvm_async.controls.interface import VM, Run
from smolvm_async.foundation.rpc import (
    arguments_by_name,
    arguments_from_json,
    result_from_json,
    rpc,
    rpc_methods,
    to_json,
)
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.pauses import Pauses
from smolvm_async.qemu.peripherals import Peripherals
from smolvm_async.qemu.ports import Ports
from smolvm_async.vm.attach.proxy import make_proxy
from smolvm_async.vm.attach.server import remote_methods


class Place(NamedTuple):
    x: int
    y: int


class Clipboard:
    """An object of the owner's."""

    text = "not a method"

    def __init__(self) -> None:
        self.posted: list[str] = []

    @rpc
    async def copy(self, place: Place, kind: Literal["text", "html"] = "text") -> list[Place]:
        return [place, place]

    @rpc
    async def picture(self, data: bytes) -> bytes:
        return data

    @rpc
    async def fails(self) -> None:
        raise ConfigError("no")

    @rpc
    def post(self, events: Sequence[str]) -> None:
        self.posted += events

    async def unmarked(self) -> None:
        raise AssertionError


def over_a_socket(target: Clipboard) -> Clipboard:
    """A proxy of `target`, whose calls go through JSON."""

    async def request(name: str, params: Mapping[str, Any]) -> Any:
        method = rpc_methods(Clipboard)[name.removeprefix("clipboard.")]
        arguments = arguments_from_json(method, json.loads(to_json(params)))
        result = await method(target, **arguments)
        if isinstance(result, bytes):
            return result
        return json.loads(to_json({"result": result}))["result"]

    def post(name: str, params: Mapping[str, Any]) -> None:
        method = rpc_methods(Clipboard)[name.removeprefix("clipboard.")]
        method(target, **arguments_from_json(method, json.loads(to_json(params))))

    return make_proxy(Clipboard, "clipboard.", request, post)


@pytest.mark.anyio
async def test_a_proxy_has_the_marked_methods_with_their_types() -> None:
    target = Clipboard()
    proxy = over_a_socket(target)
    assert await proxy.copy(Place(1, 2)) == [Place(1, 2)] * 2
    assert isinstance((await proxy.copy(place=Place(1, 2), kind="html"))[0], Place)
    assert await proxy.picture(b"\x00\xff") == b"\x00\xff"
    proxy.post(["a"])
    proxy.post(("b", "c"))
    assert target.posted == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="no"):
        await proxy.fails()
    for name in ("unmarked", "text", "posted"):
        with pytest.raises(AttributeError, match=f"Clipboard.{name} is not marked with @rpc"):
            getattr(proxy, name)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"place": [1]},
        {"place": [1, "left"]},
        {"place": [1, 2], "kind": "png"},
        {"place": [1, 2], "more": 1},
        {"place": [1, 2], "self": 1},
        {"place": [1, 2], "_self": 1},
    ],
)
def test_wrong_arguments_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wrong arguments"):
        arguments_from_json(Clipboard.copy, values)


def test_a_call_that_the_method_does_not_take_is_a_mistake_at_once() -> None:
    with pytest.raises(TypeError):
        arguments_by_name(Clipboard.copy, (), {"where": 1})


@pytest.mark.anyio
async def test_marked_methods_and_no_others_can_be_called_by_attached_processes() -> None:
    peripherals = Peripherals.make(Monitor(lambda event: None), Pauses(), make_config(vm_id="one"))
    run = SimpleNamespace(peripherals=peripherals, **dict.fromkeys(rpc_methods(Run)))
    vm = SimpleNamespace(**dict.fromkeys(rpc_methods(VM)))
    expected = {"start", "stop", "pause", "resume", "delete", "snapshot", "ssh_access"}
    expected |= {"set_internet_settings", "wake", "stats"}
    for name, kind in get_type_hints(Peripherals).items():
        expected |= {f"{name}.{method}" for method in rpc_methods(kind)}
    assert "screen.dump" in expected
    assert not any("_" in (name[0], name.split(".")[-1][0]) for name in expected)
    methods: Mapping[str, Any] = remote_methods(vm, run)
    assert set(methods) == expected


def test_the_types_of_every_marked_method_can_travel() -> None:
    for kind in (VM, Run, *get_type_hints(Peripherals).values()):
        for method in rpc_methods(kind).values():
            with pytest.raises(ConfigError, match="wrong arguments"):
                arguments_from_json(method, {"no such argument": 1})
            with pytest.raises(ValidationError):
                result_from_json(method, object())


def test_results_come_back_as_themselves() -> None:
    report = ShutdownReport(Rung.QUIT, 1.5, (Step(Rung.POWERDOWN, 1.5),), exit_status=0)
    assert result_from_json(VM.stop, json.loads(to_json({"result": report}))["result"]) == report
    values = json.loads(to_json({"result": [PortForward(80, 8080)]}))["result"]
    assert result_from_json(Ports.forwards, values) == [PortForward(80, 8080)]
