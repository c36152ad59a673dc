"""What the doctor reports, and the notebook in which its checks collect it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, computed_field

from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.progress import Progress, ProgressCallback, report

DEADLINE = 20.0  # seconds for a check that says nothing else


class Outcome(StrEnum):
    """How a check went: SKIPPED if something that it needs failed or was not asked for."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


class Verdict(NamedTuple):
    """What a check concludes, in plain English, and if not all is well, what to do."""

    status: Outcome
    detail: str
    cure: str = ""


def ok(detail: str) -> Verdict:
    """All is well."""
    return Verdict(Outcome.OK, detail)


def warning(detail: str, cure: str) -> Verdict:
    """It works, but worse than it could."""
    return Verdict(Outcome.WARNING, detail, cure)


def failed(detail: str, cure: str) -> Verdict:
    """Guests cannot run, or not safely."""
    return Verdict(Outcome.FAILED, detail, cure)


def skipped(detail: str) -> Verdict:
    """Nothing was checked; `detail` says why."""
    return Verdict(Outcome.SKIPPED, detail)


def needs(*checks: str) -> str:
    """Why something is skipped: these checks have failed."""
    return f"not checked, because of {' and '.join(checks)}"


Check = Callable[[], Awaitable[Verdict]]


class Finding(BaseModel):
    """One finding.

    Attributes:
        check: What was checked, such as `secure-boot`.
        guest: The guest OS that it concerns; `None` if all.
        status: How it went.
        detail: What was found, with the values measured.
        cure: What to do; empty if nothing.
        seconds: How long the check took; 0 if another one's work showed it.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    guest: str | None
    status: Outcome
    detail: str
    cure: str
    seconds: float


class Report(BaseModel):
    """Everything that the doctor found; `model_dump_json()` is its machine-readable form."""

    model_config = ConfigDict(frozen=True)

    findings: tuple[Finding, ...]

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status is not Outcome.FAILED for finding in self.findings)


class Notebook:
    """Runs checks one after the other, and notes what they find."""

    def __init__(self, on_progress: ProgressCallback | None) -> None:
        self.findings: list[Finding] = []
        self._on_progress = on_progress
        self._started = time.monotonic()

    async def check(
        self,
        name: str,
        work: Check,
        *,
        guest: str | None = None,
        deadline: float = DEADLINE,
        obstacle: str = "",
    ) -> bool:
        """Note what `work` concludes within `deadline` seconds, or what went wrong.

        Args:
            name: What is checked.
            work: The check.
            guest: The guest OS that it concerns.
            deadline: Seconds.
            obstacle: Why it cannot be checked; empty if it can.

        Returns:
            Whether what depends on it can be checked.
        """
        if obstacle:
            self.note(name, skipped(obstacle), guest=guest)
            return False
        started = time.monotonic()
        about = f"{name} ({guest})" if guest else name
        report(self._on_progress, Progress("doctor", about, started - self._started))
        verdict = await _conclude(work, deadline)
        self.note(name, verdict, guest=guest, seconds=time.monotonic() - started)
        return verdict.status in (Outcome.OK, Outcome.WARNING)

    def note(
        self, name: str, verdict: Verdict, *, guest: str | None = None, seconds: float = 0.0
    ) -> None:
        """Note a verdict."""
        status, detail, cure = verdict
        self.findings.append(
            Finding(
                check=name,
                guest=guest,
                status=status,
                detail=detail,
                cure=cure,
                seconds=round(seconds, 3),
            )
        )


async def _conclude(work: Check, deadline: float) -> Verdict:
    try:
        async with asyncio.timeout(deadline):
            return await work()
    except TimeoutError:
        cure = "Look whether the host is overloaded or a disk hangs, and run the doctor again."
        return failed(f"it did not end within {deadline:g} s", cure)
    except (SmolVMError, OSError) as error:
        return failed(str(error), "Do what the error says, and run the doctor again.")
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}"
        return failed(text, "This is a bug of smolvm_async: report it with this text.")
