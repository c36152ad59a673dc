"""The screen, input devices, VNC server and ports of a VM that another process owns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from smolvm_async.config.checks import PortForward, VNCKind
from smolvm_async.qemu.input import InputEvent

Request = Callable[..., Awaitable[Any]]
Post = Callable[..., object]


class RemoteScreen:
    """See `smolvm_async.qemu.screen.Screen`."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def dump(self, image_format: str, device: str | None, head: int) -> bytes:
        """A picture of the screen."""
        picture: bytes = await self._request(
            "screen.dump", image_format=image_format, device=device, head=head
        )
        return picture


class RemoteInput:
    """See `smolvm_async.qemu.input.Input`."""

    def __init__(self, request: Request, post: Post) -> None:
        self._request = request
        self._post = post

    async def send(self, events: Sequence[InputEvent]) -> None:
        """Send input events together."""
        await self._request("input.send", events=[*events])

    def post(self, events: Sequence[InputEvent]) -> None:
        """Deliver them, and wait for nothing."""
        self._post("input.deliver", events=[*events])

    async def deliver(self, events: Sequence[InputEvent]) -> None:
        """Likewise, and wait for it."""
        await self._request("input.deliver", events=[*events])

    async def strike(self, events: Sequence[InputEvent], patience: float) -> None:
        """Send what happens on the keyboard, and wait until the guest has read it."""
        await self._request("input.strike", events=[*events], patience=patience)

    async def tablet_taken(self) -> bool:
        """Whether the guest has a driver for the tablet."""
        taken: bool = await self._request("input.tablet_taken")
        return taken


class RemoteVNC:
    """See `smolvm_async.qemu.vnc.VNCServer`."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def start(self, kind: VNCKind) -> str:
        """Listen; returns the URL."""
        url: str = await self._request("vnc.start", kind=kind)
        return url

    async def stop(self) -> None:
        """Close it."""
        await self._request("vnc.stop")

    async def url(self) -> str | None:
        """Where it listens."""
        url: str | None = await self._request("vnc.url")
        return url


class RemotePorts:
    """See `smolvm_async.qemu.ports.Ports`."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def expose(self, guest_port: int, host_port: int | None) -> int:
        """Forward a port of 127.0.0.1; returns it."""
        port: int = await self._request("ports.expose", guest_port=guest_port, host_port=host_port)
        return port

    async def unexpose(self, host_port: int) -> None:
        """Forward it no longer."""
        await self._request("ports.unexpose", host_port=host_port)

    async def forwards(self) -> list[PortForward]:
        """What is forwarded."""
        return [PortForward(*ports) for ports in await self._request("ports.forwards")]
