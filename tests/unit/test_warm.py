"""The cache of ready guests, without a guest."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from smolvm_async.config.source import Source
from smolvm_async.vm import warm
from smolvm_async.vm.plan import Plan


@pytest.mark.anyio
async def test_a_cache_that_cannot_be_used_is_tried_once_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    async def full(*_: Any) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(warm, "_name", lambda *_: "ready-0123456789abcdef")
    monkeypatch.setattr(warm, "_find_or_make", full)
    monkeypatch.setattr(warm, "_pauses", {})
    source = Source(Path("disk"))
    plan = cast(Plan, SimpleNamespace(source=source, _replace=lambda **_: None))
    for _ in range(2):
        async with warm.ready_guest(plan) as held:
            assert held is None
    assert tries == 1
    assert caplog.text.count("No space left on device.") == 1
