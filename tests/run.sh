#!/usr/bin/env bash
# Sets everything up and passes the tests. Arguments go to pytest.

set -eu
# An SSH server, the layouts that the keyboard's tests type on, a VNC client, and what makes the
# cloud image.
more_packages=(openssh-server libxkbcommon0 xkb-data libx11-data vncsnapshot tigervnc-tools mmdebstrap)
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
