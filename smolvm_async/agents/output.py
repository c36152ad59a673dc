"""The output of a command, kept in pages for an agent, whose context is short."""

from __future__ import annotations

PAGE = 8000  # characters in one answer
KEPT = 1 << 20  # characters of a command's output that can be read later


class Output:
    """The output of a command. The first `KEPT` characters can be read; the end is always known."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._kept = 0
        self._end = ""
        self.total = 0

    def add(self, text: str) -> None:
        """Add output."""
        self.total += len(text)
        self._end = (self._end + text)[-PAGE // 2 :]
        if self._kept < KEPT:
            self._parts.append(text[: KEPT - self._kept])
            self._kept += len(self._parts[-1])

    def summary(self, more: str) -> str:
        """Return the whole output, or its beginning and end, and how to get `more`."""
        if self.total <= PAGE:
            return "".join(self._parts)
        half = PAGE // 2
        return (
            f"{self._text()[:half]}\n[{self.total - PAGE} of {self.total} characters are left out: "
            f"{more}]\n{self._end}"
        )

    def page(self, offset: int) -> str:
        """Return the characters from `offset` on, and how to get more."""
        text = self._text()[offset : offset + PAGE]
        end = offset + len(text)
        if end < self._kept:
            return f"{text}\n[characters {offset} to {end} of {self.total}: pass offset={end}]"
        lost = self.total - self._kept
        return f"{text}\n[{lost} more characters were not kept]" if lost else text

    def _text(self) -> str:
        self._parts = ["".join(self._parts)]
        return self._parts[0]
