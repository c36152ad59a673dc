"""Sandboxes in the hands of agents: the actions of computer-use models, executed on a VM."""

from __future__ import annotations

from smolvm_async.agents.computer import ActionResult, Computer

__all__ = ["ActionResult", "Computer"]
