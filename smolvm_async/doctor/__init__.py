"""Examine the host: do the same as a VM does, instead of comparing versions."""

from __future__ import annotations

from smolvm_async.doctor.examination import examine
from smolvm_async.doctor.findings import Finding, Outcome, Report

__all__ = ["Finding", "Outcome", "Report", "examine"]
