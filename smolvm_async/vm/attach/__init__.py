"""A VM's control socket: the owner serves it, other processes of the same user attach to it.

Messages are JSON-RPC 2.0, one on each line; a result of type `bytes` follows its line as it is. The
client sends requests (`stop`, `screen.dump`, ...), whose methods are marked with `@rpc` where they
are defined. The server sends notifications: `hello` first, then `event`, `status` and `console` as
they come, and `ended`, with the failure and the shutdown report, before it closes.
"""

from __future__ import annotations

from smolvm_async.vm.attach.client import AttachedVM
from smolvm_async.vm.attach.server import ControlServer

__all__ = ["AttachedVM", "ControlServer"]
