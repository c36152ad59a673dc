#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest, but for the first:
#
#   --quick   3 minutes: the static checks, the unit tests, and a handful of real VMs
#   --all     hours: the faults at every await that the default run leaves to chance, too, and most
#             tests once more on Debian 13, with QEMU 10 and QEMU 11

set -eu
# An SSH server, the guest agent, the layouts that the keyboard's tests type on, a VNC client, and
# what makes the cloud image and installs Debian 13.
more_packages=(openssh-server qemu-guest-agent libxkbcommon0 xkb-data libx11-data vncsnapshot
    tigervnc-tools mmdebstrap debian-archive-keyring)
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"

# The main job on the stand-in, the built-in Linux with a command, a crash, a kept VM, the command
# line.
quick=(
    tests/unit
    tests/integration/test_main_job.py::test_the_main_job
    tests/integration/test_linux.py::test_the_newcomers_line_answers
    tests/faults/test_crashes.py::test_a_process_that_is_killed_cancels_the_body_and_is_named
    tests/integration/test_kept.py::test_every_boot_has_the_same_command_line_with_the_machine_type_pinned
    tests/integration/test_cli.py::test_the_first_signal_stops_the_vm
)
case ${1:-} in
    --quick) set -- "${quick[@]}" "${@:2}" ;;
    --all) export SMOLVM_ASYNC_EVERY_FAULT=1 && shift ;;
esac
# Three workers keep two processors busy. With `worksteal` a worker keeps whole files as long as it
# can, so that their tests share guests.
pytest=(.venv/bin/python -m pytest -rs)  # -rs: say what was skipped, and why
at_once=(-n 3 --dist worksteal)
if [ $# -eq 0 ]; then
    # tests/kvm runs beside all others. Its guest's timers take processor time for as long as it runs,
    # so it is not made to wait. The static checks leave a processor idle.
    report=$(mktemp)
    "${pytest[@]}" -p no:cacheprovider tests/kvm >"$report" 2>&1 &
    kvm=$!
    trap 'kill "$kvm" 2>/dev/null || true; rm -f "$report"' EXIT
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
[ $# -eq 0 ] || exec "${pytest[@]}" "${at_once[@]}" "$@"
failed=0
"${pytest[@]}" "${at_once[@]}" --ignore=tests/kvm || failed=$?
wait "$kvm" || failed=$?
cat "$report"
exit "$failed"
