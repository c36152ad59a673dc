"""The words of the command line for the library's arguments."""

from __future__ import annotations

import pytest

from smolvm_async.cli.output import in_options


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Pass accel='tcg' to silence this.", "Pass --accel tcg to silence this."),
        ("memory=4096 MiB does not fit", "--memory 4096 MiB does not fit"),
        ("Pass a smaller memory=, or", "Pass a smaller --memory, or"),
        ("data_dir='/a b' cannot be used", "--data-dir '/a b' cannot be used"),
        ("vm_id='one' belongs to", "--id one belongs to"),
        ("os= is missing: pass os='linux'", "--os is missing: pass --os linux"),
        ("image='x.qcow2', max_memory=5, -m memory", "image='x.qcow2', max_memory=5, -m memory"),
    ],
)
def test_arguments_in_messages_become_options(message: str, expected: str) -> None:
    assert in_options(message) == expected
