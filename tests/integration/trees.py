"""Trees of files to copy, and their digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def make_tree(root: Path, files: int) -> None:
    for number in range(files):
        path = root / f"d{number % 7}" / f"file {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 37 % 5000))
        path.chmod(0o755 if number % 2 else 0o640)
    (root / "link").symlink_to("/etc/passwd")
    (root / "empty").mkdir()


def digest_tree(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            status = path.stat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = (digest, status.st_mode, int(status.st_mtime))
        else:
            found[name] = "directory"
    return found
