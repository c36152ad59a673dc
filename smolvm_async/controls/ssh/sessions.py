"""The sessions on one SSH connection: whoever wants one waits until the server has room for it."""

from __future__ import annotations

import asyncio

MOST = 256  # sessions at a time; more only wait for each other in the guest


class Sessions:
    """How many sessions there may be: the server's limit is known once it has refused one.

    OpenSSH's is 10, unless `MaxSessions` says otherwise.
    """

    def __init__(self) -> None:
        self._entered = self._opened = 0
        self._limit = MOST
        self._learnt = 0  # how often
        self._waiting: list[asyncio.Future[None]] = []

    async def enter(self) -> int:
        """Wait for room, first come, first served; returns what `refused()` wants."""
        if self._entered >= self._limit or self._waiting:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:  # it was ours already
                    self.give_up()
                raise
        else:
            self._entered += 1
        return self._learnt

    def opened(self) -> None:
        """The server has given one to whom has entered."""
        self._opened += 1

    def leave(self) -> None:
        """One that was opened has ended."""
        self._opened -= 1
        self.give_up()

    def give_up(self) -> None:
        """Who has entered leaves without one."""
        self._entered -= 1
        self._admit()

    def refused(self, learnt: int) -> bool:
        """The server has none for whom has entered; false if no other one could end either.

        Of many refusals at once the first one tells the limit: by the later ones, some have ended.
        """
        if self._opened and learnt == self._learnt:
            self._limit = min(self._limit, self._opened)
            self._learnt += 1
        self.give_up()
        return self._opened > 0

    def forget_limit(self) -> None:
        """The server may be another one."""
        self._limit = MOST
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._entered < self._limit:
            turn = self._waiting.pop(0)
            if not turn.done():
                self._entered += 1
                turn.set_result(None)
