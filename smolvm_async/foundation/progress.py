"""Progress of slow work: the value that `on_progress=` receives, and the class that reports it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from smolvm_async.foundation.log import get_logger

logger = get_logger(__name__)

INTERVAL = 0.1  # seconds between two reports of bytes


@dataclass(frozen=True)
class Progress:
    """One step of slow work.

    Attributes:
        stage: The part that reports: `image`, `boot`, `stop`, `snapshot`, `files` or `doctor`.
        message: The current step, in plain English.
        elapsed: Seconds since the work began.
        done: The amount of work that is done; `None` if unknown.
        total: The amount of all work; `None` if unknown.
        rate: Bytes per second, if the work is a download or an upload of an image.
    """

    stage: str
    message: str
    elapsed: float
    done: int | None = None
    total: int | None = None
    rate: float | None = None


ProgressCallback = Callable[[Progress], None]


def report(callback: ProgressCallback | None, progress: Progress) -> None:
    """Call the user's callback; if it raises an error, log the error and continue."""
    if callback is not None:
        try:
            callback(progress)
        except Exception:
            logger.exception("on_progress raised for %s", progress)


class Meter:
    """A reporter of progress, for work that begins when the reporter is made; see `Progress`."""

    def __init__(
        self, callback: ProgressCallback | None, stage: str, total: int | None = None
    ) -> None:
        self._total = total
        self._callback = callback
        self._stage = stage
        self._began = self._reported = time.monotonic()

    @property
    def due(self) -> bool:
        """True if the last report is at least 0.1 s old: more reports would only cost time."""
        return time.monotonic() - self._reported >= INTERVAL

    def report(
        self,
        message: str,
        done: int | None = None,
        total: int | None = None,
        *,
        copied: int | None = None,
    ) -> None:
        """Report the current step.

        Args:
            total: The total of this step, if it differs from the total of the whole work.
            copied: Bytes copied since the work began, for the rate.
        """
        self._reported = time.monotonic()
        elapsed = self._reported - self._began
        rate = copied / elapsed if copied is not None and copied > 0 and elapsed > 0 else None
        total = self._total if total is None else total
        report(self._callback, Progress(self._stage, message, elapsed, done, total, rate))
