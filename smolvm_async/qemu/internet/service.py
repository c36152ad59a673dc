"""The network of one VM: its guard, its gateway, and the policy that its settings ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from smolvm_async.config.internet import InternetSettings
from smolvm_async.foundation.process import Spawner
from smolvm_async.foundation.tasks import in_thread, settle
from smolvm_async.qemu.internet.addresses import Host
from smolvm_async.qemu.internet.denials import Denied
from smolvm_async.qemu.internet.guard import Guard
from smolvm_async.qemu.internet.rules import Rules

if TYPE_CHECKING:
    from smolvm_async.qemu.internet.gateway import Gateway


class Internet:
    """The network of one VM, until the end of the block.

    The mode `restricted` needs a gateway, which then stays until the end.

    Attributes:
        spawner: Spawns the VM's processes.

    Args:
        on_denied: See `Guard`.
    """

    def __init__(self, settings: InternetSettings, on_denied: Callable[[Denied], None]) -> None:
        self._host = Host()
        self._gateway: Gateway | None = None
        self._settings = settings
        self._guard = Guard(Rules(settings, self._host), on_denied)
        self.spawner: Spawner = self._guard.spawner

    async def __aenter__(self) -> Self:
        await self._guard.start()
        if self._settings.mode == "restricted":
            try:
                await self.change(self._settings)
            except BaseException:
                await self._close()
                raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def change(self, settings: InternetSettings) -> None:
        """Change the policy, and end the connections that it refuses.

        Raises:
            HostError: The host lacks threads, descriptors or ports now; nothing has changed.
        """
        await in_thread(self._change, settings)

    def _change(self, settings: InternetSettings) -> None:
        if settings.mode == "restricted" and self._gateway is None:
            from smolvm_async.qemu.internet.gateway import Gateway  # other modes do not need it

            self._gateway = Gateway(self._guard.report)
        services = None if self._gateway is None else self._gateway.services
        for name in settings.allowed_domains:
            if services is not None and not name.startswith("*."):
                services.names.add(name)
        rules = Rules(settings, self._host, services)
        self._guard.set_policy(rules)
        if self._gateway is not None:
            self._gateway.set_rules(rules)

    async def _close(self) -> None:
        if self._gateway is not None:
            await in_thread(self._gateway.close)
        await settle(asyncio.ensure_future(self._guard.close()))
