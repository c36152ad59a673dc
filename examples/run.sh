#!/usr/bin/env bash
# Sets everything up, and runs a sandbox with Secure Boot and a TPM. The script passes its arguments
# to examples/windows_sandbox.py, for example: --image ~/win11.qcow2

set -eu
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python examples/windows_sandbox.py "$@"
