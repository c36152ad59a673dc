"""Shared by the tests of faults: other processes to kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.stage import Stage


@pytest.fixture
def stage(data_dir: Path) -> Iterator[Stage]:
    stage = Stage(data_dir)
    yield stage
    stage.close()
