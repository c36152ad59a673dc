"""Which accelerator guests get here, and whether it runs them: pure conclusions."""

from __future__ import annotations

from smolvm_async.doctor.findings import Verdict, failed, ok, skipped, warning
from smolvm_async.doctor.verdicts import Sighting
from smolvm_async.errors import HostError
from smolvm_async.host import choose_accelerator
from smolvm_async.host.accelerator import Problem

USE_TCG = "Pass accel='tcg': software emulation, many times slower."
GOOD_KVM = (
    "Use a host whose KVM runs guests: a real machine, or a VM with nested virtualization. "
    f"Until then: {USE_TCG}"
)


def kvm_verdict(accel: str, sighting: Sighting | None, problem: Problem | None) -> Verdict:
    """Whether KVM runs guests.

    Args:
        accel: What VMs would ask for.
        sighting: What a boot under KVM has shown; `None` if KVM cannot be opened.
        problem: Why the library does not take KVM by itself; `None` if it does.
    """
    if accel == "tcg":
        return skipped("accel='tcg' was asked for")
    if sighting is not None and sighting.booted:
        found = f"the firmware booted under KVM in {sighting.seconds:.1f} s"
        if problem is None:
            return ok(found)
        return warning(f"{found}, but accel='auto' does not take it: {problem.reason}", USE_TCG)
    reasons = []
    if sighting is not None:
        reasons.append(f"KVM opens, and does not run guests: {sighting.why_not()}")
    if problem is not None:
        reasons.append(problem.reason)
    found = "; ".join(reasons) or "KVM cannot be opened"
    cure = problem.cure if problem is not None else GOOD_KVM
    return (failed if accel == "kvm" or problem is None else warning)(found, cure)


def accelerator_verdict(accel: str, kvm_works: bool, problem: Problem | None) -> Verdict:
    """What guests get if they ask for `accel`, and whether that works."""
    try:
        chosen, _ = choose_accelerator(accel)
    except HostError as error:
        return failed(str(error), USE_TCG)
    if chosen.name == accel == "tcg":
        return ok("accel='tcg' was asked for: software emulation, many times slower than KVM")
    if chosen.name == "tcg":
        reason = f": {problem.reason}" if problem is not None else ""
        return warning(
            f"accel={accel!r} takes TCG, software emulation, many times slower than KVM{reason}",
            f"{problem.cure if problem is not None else GOOD_KVM} accel='tcg' is silent about it.",
        )
    if not kvm_works:
        return failed(f"accel={accel!r} takes KVM, which does not run guests here", USE_TCG)
    return ok(f"accel={accel!r} takes KVM, and it works")
