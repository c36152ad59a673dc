"""The doctor's report, and the notebook that runs checks and collects their verdicts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, computed_field

from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.progress import Progress, ProgressCallback, report
from smolvm_async.host.restrictions import find_cause

UNKNOWN = "The cause is unknown: look up this message, and the host's log (journalctl -b)."
DEADLINE = 20.0  # seconds for a check that sets no other deadline


class Outcome(StrEnum):
    """The result of a check. SKIPPED: it is unnecessary, or a check that it needs failed."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


class Verdict(NamedTuple):
    """The conclusion of a check in plain English, and the cure if there is a problem."""

    status: Outcome
    detail: str
    cure: str = ""


def ok(detail: str) -> Verdict:
    """Return the verdict that all is well."""
    return Verdict(Outcome.OK, detail)


def warning(detail: str, cure: str) -> Verdict:
    """Return the verdict that guests run, but worse than they could."""
    return Verdict(Outcome.WARNING, detail, cure)


def failed(detail: str, cure: str) -> Verdict:
    """Return the verdict that guests cannot run, or cannot run safely."""
    return Verdict(Outcome.FAILED, detail, cure)


def blamed(detail: str, cure: str = UNKNOWN, path: Path | None = None) -> Verdict:
    """Return a failure, with the restriction of this host that explains it if there is one.

    `cure` is the cure if no restriction explains the failure; `path` is the file concerned.
    """
    cause = find_cause(detail, path)
    return (
        failed(detail, cure) if cause is None else failed(f"{cause.reason}: {detail}", cause.cure)
    )


def skipped(detail: str) -> Verdict:
    """Return the verdict that nothing was checked, for the reason in `detail`."""
    return Verdict(Outcome.SKIPPED, detail)


class Check(NamedTuple):
    """A check of the doctor.

    Attributes:
        name: The name of the check, such as `secure-boot`.
        work: Returns the verdict, or an awaitable of it.
        needs: The names of the checks that this check depends on. If one fails, skip this check.
        deadline: The seconds that `work` may take.
    """

    name: str
    work: Callable[[], Verdict | Awaitable[Verdict]]
    needs: tuple[str, ...] = ()
    deadline: float = DEADLINE


class Finding(BaseModel):
    """The finding of one check.

    Attributes:
        check: The name of the check, such as `secure-boot`.
        guest: The guest OS that the check concerns; `None` if it concerns all.
        status: The result.
        detail: The observation, with the measured values.
        cure: The action to take; empty if none is necessary.
        seconds: The duration of the check; 0 if the result comes from the work of another check.
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

    @computed_field  # type: ignore[prop-decorator]  # mypy does not know decorated properties
    @property
    def ok(self) -> bool:
        """True if nothing failed."""
        return all(finding.status is not Outcome.FAILED for finding in self.findings)


class Notebook:
    """A notebook that runs checks one after another and collects their findings."""

    def __init__(self, on_progress: ProgressCallback | None) -> None:
        self.findings: list[Finding] = []
        self._on_progress = on_progress
        self._started = time.monotonic()
        # For each check that failed or was skipped: the failed checks that are the reason.
        self._causes: dict[str, list[str]] = {}

    async def run(self, checks: Iterable[Check], guest: str | None = None) -> None:
        """Run checks and note their verdicts; `guest` is the guest OS that they concern."""
        for check in checks:
            seconds = 0.0
            causes = [cause for need in check.needs for cause in self._causes.get(need, ())]
            if causes:
                self._causes[check.name] = causes = [*dict.fromkeys(causes)]
                verdict = skipped(f"not checked, because of {' and '.join(causes)}")
            else:
                started = time.monotonic()
                about = f"{check.name} ({guest})" if guest else check.name
                report(self._on_progress, Progress("doctor", about, started - self._started))
                verdict = await _conclude(check)
                seconds = round(time.monotonic() - started, 3)
                if verdict.status is Outcome.FAILED:
                    self._causes[check.name] = [check.name]
            self.findings.append(
                Finding(check=check.name, guest=guest, seconds=seconds, **verdict._asdict())
            )

    def passed(self, name: str) -> bool:
        """Return whether neither the check nor a check that it depends on has failed."""
        return name not in self._causes


async def _conclude(check: Check) -> Verdict:
    try:
        async with asyncio.timeout(check.deadline):
            verdict = check.work()
            return verdict if isinstance(verdict, Verdict) else await verdict
    except TimeoutError:
        cure = "Check whether the host is overloaded or a disk hangs, then run the doctor again."
        return failed(f"the check did not end within {check.deadline:g} s", cure)
    except (SmolVMError, OSError) as error:
        return blamed(str(error), "Do what the error says, then run the doctor again.")
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}"
        return failed(text, "This is a bug of smolvm_async: report it with this text.")
