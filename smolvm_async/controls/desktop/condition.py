"""The condition that `wait_for_screen()` waits for, checked on each screenshot."""

from __future__ import annotations

from collections.abc import Iterator

from smolvm_async.config.checks import check_seconds, shown
from smolvm_async.controls.desktop.comparison import Comparison
from smolvm_async.controls.desktop.picture import Reference, Screenshot, load_picture
from smolvm_async.errors import ConfigError


class ScreenCondition:
    """Conditions that must all hold at the same time; see `AsyncSmolVM.wait_for_screen()`.

    Args:
        resolution: The size that the screen is expected to get. While it has another size, a
            region or reference that fits only the expected size is not an error.
    """

    def __init__(
        self,
        comparison: Comparison,
        changed: bool | Screenshot,
        stable: float | None,
        like: Reference | None,
        resolution: tuple[int, int],
    ) -> None:
        if not isinstance(changed, bool | Screenshot):
            raise ConfigError(f"changed={shown(changed)} is wrong: pass True or a screenshot.")
        if stable is not None:
            check_seconds("stable", stable)
        if changed is False and stable is None and like is None:
            raise ConfigError(
                "wait_for_screen() has no condition: pass changed=True, stable=SECONDS or "
                "like=PICTURE."
            )
        self._comparison = comparison
        self._changed = changed is not False
        self._from = changed if isinstance(changed, Screenshot) else None
        self._stable = stable
        self._like = load_picture(like) if like is not None else None
        self._resolution = resolution
        self._last: Screenshot | None = None  # the first of a series of equal screenshots
        self._since = 0.0  # when `_last` was taken
        self._now = 0.0
        self._unmet: list[str] = []

    def seen(self, picture: Screenshot, now: float) -> bool:
        """Return whether a screenshot, taken at `now` in seconds, meets all conditions.

        Raises:
            ConfigError: The region, an ignored region or the reference does not fit the screen.
        """
        self._now = now
        if not self._fits(picture):
            self._last = None
            return False
        if self._last is None or self._comparison.differs(self._last, picture):
            self._last, self._since = picture, now
        if self._from is None:
            self._from = picture
        self._unmet = [*self._look(picture)]
        return not self._unmet

    def _fits(self, picture: Screenshot) -> bool:
        try:
            self._comparison.check(picture.size, self._like)
        except ConfigError as error:
            if picture.size == self._resolution:
                raise
            self._comparison.check(self._resolution, self._like)
            self._unmet = [str(error)]
            return False
        return True

    def _look(self, picture: Screenshot) -> Iterator[str]:
        """Yield a sentence for each condition that the screenshot does not meet."""
        assert self._from is not None
        if self._changed and not self._comparison.differs(self._from, picture):
            yield "the screen has not changed"
        if self._stable is not None and (rested := self._now - self._since) < self._stable:
            yield (
                f"the screen changed {rested:.1f} s ago, but must stay unchanged for "
                f"{self._stable:g} s"
            )
        if self._like is not None and not self._comparison.matches(picture, self._like):
            yield "the screen does not look like the reference"

    def explain(self) -> str:
        """Describe the conditions that the last screenshot did not meet."""
        return "; ".join(self._unmet).rstrip(".") + "."
