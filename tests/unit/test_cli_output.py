"""The words of the command line for the library's arguments, and its exit codes."""

from __future__ import annotations

import pytest

from smolvm_async.cli.exec import to_exit_code
from smolvm_async.cli.output import in_options


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Pass accel='tcg' to silence this.", "Pass --accel tcg to silence this."),
        ("memory=4096 MiB does not fit", "--memory 4096 MiB does not fit"),
        ("idle_timeout=-1.5 is wrong", "--idle-timeout -1.5 is wrong"),
        ("ttl=nan is wrong", "--ttl nan is wrong"),
        ("Pass a smaller memory=, or", "Pass a smaller --memory, or"),
        ("data_dir='/a b' cannot be used", "--data-dir '/a b' cannot be used"),
        ("vm_id='one' belongs to", "--id one belongs to"),
        ("os= is missing: pass os='linux'", "--os is missing: pass --os linux"),
        ("a kept VM (keep=True): labels= has", "a kept VM (--keep): --label has"),
        ("cwd='' is wrong; env= has", "--workdir '' is wrong; --env has"),
        ("AsyncSmolVM.list() shows the VMs", "smolvm-async list shows the VMs"),
        ("or delete() the VM; vm.stop(), from_id()", "or delete the VM; vm.stop(), from_id()"),
        (
            "or attach to the VM with AsyncSmolVM.from_id()",
            "or use that VM with smolvm-async exec ID",
        ),
        (
            "count=9 clones do not fit: pass a smaller count=",
            "--count 9 clones do not fit: pass a smaller --count",
        ),
        ("pass password= or key=, user='me'", "pass --password-file or --key, --user me"),
        ("spawn(detached=True) is not", "exec --detach is not"),
        ("spawn() needs the agent", "exec ID -- COMMAND needs the agent"),
        ("image='x.qcow2', max_memory=5, -m memory", "image='x.qcow2', max_memory=5, -m memory"),
    ],
)
def test_arguments_and_methods_in_messages_become_options_and_commands(
    message: str, expected: str
) -> None:
    assert in_options(message) == expected


@pytest.mark.parametrize(
    ("code", "shown"), [(0, 0), (255, 255), (-9, 137), (256, 255), (0xC0000005, 255)]
)
def test_a_command_that_failed_never_ends_this_program_with_success(code: int, shown: int) -> None:
    assert to_exit_code(code) == shown
