#!/usr/bin/env bash
# Sets everything up and runs the main job: a sandbox with Secure Boot and a TPM, from a qcow2.
# Arguments go to examples/windows_sandbox.py, such as --image ~/win11.qcow2

set -eu
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python examples/windows_sandbox.py "$@"
