# Sets up a fresh Debian or Ubuntu machine: system packages, .venv, the package itself.
# examples/run.sh and tests/run.sh source this file. It skips everything that is already installed.

set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# For the library: QEMU, its disk tool, the software TPM, the UEFI firmware. For the stand-in for
# Windows: mtools, fdisk and e2fsprogs. The script that sources this file can add more packages in
# `more_packages`.
packages=(qemu-system-x86 qemu-utils swtpm ovmf mtools fdisk e2fsprogs util-linux)
packages+=(${more_packages[@]+"${more_packages[@]}"})

say() { printf '\033[1m[set-up]\033[0m %s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

install_packages() {
    local missing=() package as_root=() family
    family=$(. /etc/os-release 2>/dev/null && echo " ${ID:-} ${ID_LIKE:-} ") || family=""
    case "$family" in
        *" debian "* | *" ubuntu "*) ;;
        *)
            say "This distribution is unknown. Install its equivalents of these Debian packages," \
                "and Python 3.11 or newer: ${packages[*]} python3-venv"
            exit 1
            ;;
    esac
    [ -n "$(find_python)" ] || packages+=(python3)
    "$(find_python || true)" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
    for package in "${packages[@]}"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null; then
            say "Run as root: apt-get update && apt-get install ${missing[*]}"
            exit 1
        fi
        as_root=(sudo)
    fi
    say "installing system packages: ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

install_library() {
    local python wanted
    python=$(find_python)
    if [ -z "$python" ]; then
        say "This distribution's python3 is too old: install Python 3.11 or newer."
        exit 1
    fi
    wanted="$("$python" --version) $(pwd) $(sha256sum pyproject.toml)"
    [ "$(cat .venv/set-up 2>/dev/null)" != "$wanted" ] || return 0
    say "installing smolvm_async into .venv"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    .venv/bin/python -m compileall -q smolvm_async
    echo "$wanted" >.venv/set-up
}

install_packages
install_library
