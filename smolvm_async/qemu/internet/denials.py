"""Refusals, and their reports at a bounded rate."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from smolvm_async.qemu.internet.policy import Address, Transport

PER_SECOND = 10  # reports


class Denied(NamedTuple):
    """A refusal.

    Attributes:
        protocol: `tcp`, `udp` or `icmp`; `dns` for a name that was not resolved.
        address: The address that the guest spoke to; `None` for `dns`.
        port: The port, 0 for ICMP and `dns`.
        name: The domain name that the guest had asked for, if any.
        reason: Why.
        left_out: The number of refusals since the last report that were not reported.
    """

    protocol: Transport | Literal["dns"]
    address: Address | None
    port: int
    name: str
    reason: str
    left_out: int = 0

    def data(self) -> dict[str, object]:
        """Return the data of the event; see `NetworkDenied`."""
        return {
            "protocol": self.protocol,
            "address": str(self.address or ""),
            "port": self.port,
            "domain": self.name,
            "reason": self.reason,
            "omitted": self.left_out,
        }


class Bucket:
    """A bucket of tokens, `rate` new ones a second, at most `size`."""

    def __init__(self, size: float, rate: float) -> None:
        self._size, self._rate = size, rate
        self._tokens, self._filled = size, time.monotonic()

    def take(self) -> bool:
        """Take a token; return whether there was one."""
        now = time.monotonic()
        self._tokens = min(self._size, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Reports:
    """Reports refusals of any thread in the running event loop.

    Args:
        on_denied: Called in the event loop, at most `PER_SECOND` times a second.
    """

    def __init__(self, on_denied: Callable[[Denied], None]) -> None:
        self._on_denied = on_denied
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._bucket = Bucket(PER_SECOND, PER_SECOND)
        self._left_out = 0

    def report(self, denied: Denied) -> None:
        """Report a refusal, or count it."""
        with self._lock:
            if not self._bucket.take():
                self._left_out += 1
                return
            report, self._left_out = denied._replace(left_out=self._left_out), 0
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._on_denied, report)
