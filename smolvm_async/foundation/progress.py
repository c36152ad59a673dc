"""What `on_progress=` receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smolvm_async.foundation.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Progress:
    """One step of something slow.

    Attributes:
        stage: Which part reports: `image`, `boot`, `stop` or `doctor`.
        message: What is happening, in plain English.
        elapsed: Seconds since the work began.
        done: How much is done, where that can be said.
        total: Out of how much.
        rate: Bytes for each second, of a download.
    """

    stage: str
    message: str
    elapsed: float
    done: int | None = None
    total: int | None = None
    rate: float | None = None


ProgressCallback = Callable[[Progress], None]


def report(callback: ProgressCallback | None, progress: Progress) -> None:
    """Call the user's callback; an error in it is logged and harms nothing."""
    if callback is not None:
        try:
            callback(progress)
        except Exception:
            logger.exception("on_progress raised for %s", progress)
