"""The input of a terminal on its way to a guest."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from smolvm_async.cli.streams import until_escape

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        (b"ls ~.\r", b"ls ~.\r"),
        (b"ls\r~.more", b"ls\r"),
        (b"~.", b""),
        (b"~~.\r~x\r~\r~.", b"~.\r~x\r~\r"),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
async def test_enter_tilde_dot_leaves_a_terminal(typed: bytes, sent: bytes, size: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(typed), size):
            yield typed[start : start + size]

    assert b"".join([chunk async for chunk in until_escape(chunks())]) == sent
