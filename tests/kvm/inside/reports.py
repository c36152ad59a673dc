"""A plugin of the pytest in the host guest: it prints each test's result as a line of JSON."""

from __future__ import annotations

import json

import pytest

MARK = "RESULT "


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Find the terminal, which a test's captured output does not reach."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    assert terminal is not None
    config.pluginmanager.register(Reporter(terminal))


class Reporter:
    """Prints the first phase of a test that did not pass, else its call."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print a result, and let it reach the host before the next test begins."""
        if report.when != "call" and report.passed:
            return
        result = {
            "name": report.nodeid.rpartition("::")[2],
            "outcome": report.outcome,
            "phase": report.when,
            "text": report.longreprtext,
            "output": report.capstdout + report.capstderr + report.caplog,
            "seconds": report.duration,
        }
        self._terminal.write_line(f"\n{MARK}{json.dumps(result)}", flush=True)
