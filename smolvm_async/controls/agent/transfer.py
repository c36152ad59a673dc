"""A guest's files through its agent: one way of uploads and downloads; see `files/copying.py`.

The agent opens, reads and writes files. It cannot list, rename or remove them, so the guest's shell
does this: each step of a transfer is a function of `files.sh` (Windows: `files.ps1`).

- An upload makes a temporary directory beside the path to copy to, which only its user can enter:
  the agent makes files that everybody can write to. A file is written there and renamed.
- A directory is sent as archives, which the guest's `tar` unpacks: requests to the agent for each
  of many small files would take long. An archive is removed when it is unpacked, before the next
  one is sent: the guest's disk holds at most 16 MiB, or the biggest file, twice.
- A download lists the source first, then reads one file after the other: nothing is written in the
  guest.

No Windows was run: `files.ps1` was only parsed.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFREG, S_IMODE
from typing import Literal

from smolvm_async.controls.agent.execution import AgentTransport, find_system
from smolvm_async.controls.agent.files import PIECE, SENT, GuestFile, open_file
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.commands.query import Answer, query
from smolvm_async.controls.commands.transport import Transport
from smolvm_async.controls.files.copying import TransferMeter, opened, unlike
from smolvm_async.controls.files.paths import check_windows_tree, name_problem
from smolvm_async.controls.files.tree import Entry, checked
from smolvm_async.errors import FileTransferError, GuestAgentError
from smolvm_async.foundation.tail import printable
from smolvm_async.foundation.tasks import in_background

PART = 16 << 20  # bytes of files in one archive, unless a single file has more
UNLIKE = 3  # the exit code of a step: a file would replace a directory, or a directory a file
BLOCK = 512  # bytes; the content of a file in an archive has a multiple of this
READ = 1 << 20  # bytes to read from this host's disk at once
QUOTED = 500  # characters of the guest's in an error message
FULL = ("No space left on device", "There is not enough space on the disk")


class AgentFiles:
    """The files of a guest through its agent: a `GuestFiles`."""

    def __init__(self, session: Session, transport: Transport, *, windows: bool = False) -> None:
        self.turn = session.env_turn
        self.session = session
        self.windows = windows
        self._transport = transport
        self._links: dict[str, str] = {}  # targets, by the path of the link

    async def step(self, step: str, values: Mapping[str, object], content: bytes = b"") -> Answer:
        """Run a function of the guest's script.

        Raises:
            FileTransferError: The function failed.
        """
        env = {"step": step, **{name: str(value) for name, value in values.items()}}
        script = _script("files.ps1" if self.windows else "files.sh")
        answer = await query(self._transport, script, env, content)
        if answer.exit_code == UNLIKE:
            raise unlike(printable(answer.reason)[-QUOTED:])
        if answer.exit_code:
            reason = printable(answer.reason)[-QUOTED:] or f"exit code {answer.exit_code}"
            raise FileTransferError(f"the guest reports: {reason}")
        return answer

    async def tree(self, source: str) -> list[Entry]:
        """See `GuestFiles.tree()`."""
        word = secrets.token_hex(16)
        answer = await self.step("list", {"source": source.rstrip("/"), "word": word})
        tree, links = await in_background(parse, answer.stdout, word, source)
        self._links = {f"{source}/{path}": target for path, target in links.items()}
        return tree

    def upload(self, source: Path, target: str) -> AgentUpload:
        """See `GuestFiles.upload()`."""
        return AgentUpload(self, source, target)

    def explanation(self, error: Exception, subject: str) -> Exception | None:
        """See `GuestFiles.explanation()`."""
        if isinstance(error, GuestAgentError):
            return FileTransferError(f"{subject}: {error.message}")
        return None

    async def read_own(self, name: str) -> bytes:
        """See `GuestFiles.read_own()`."""
        return (await self.step("read_own", {"file_name": name})).stdout

    async def write_own(self, name: str, content: bytes) -> None:
        """See `GuestFiles.write_own()`."""
        await self.step("write_own", {"file_name": name, "leaf": secrets.token_hex(4)}, content)

    def block(self, size: int) -> int:
        """See `Readable.block()`: the agent reads a file from its beginning to its end."""
        return max(size, PIECE)

    @asynccontextmanager
    async def open(self, path: str) -> AsyncIterator[AgentReader]:
        """See `Readable.open()`."""
        async with open_file(self.session, utf8(path), "rb") as file:
            yield AgentReader(file)

    async def readlink(self, path: str) -> str:
        """See `Readable.readlink()`."""
        return self._links[path]


@functools.cache
def _script(name: str) -> str:
    """Return a script; the cleanup after a lack of descriptors needs the script, too."""
    return files(__package__).joinpath(name).read_text()


def agent_files(session: Session, os: str) -> AgentFiles:
    """Return the files of a guest with this OS."""
    transport = AgentTransport(session, find_system(os))
    return AgentFiles(session, transport, windows=os == "windows")


class AgentReader:
    """An open file of the guest, read in order."""

    def __init__(self, file: GuestFile) -> None:
        self._file = file

    async def read(self, size: int, offset: int) -> bytes:
        """See `Reader.read()`."""
        content, _ = await self._file.read()
        return content[:size]


class AgentUpload:
    """A transfer into the guest: an `Upload`."""

    def __init__(self, guest: AgentFiles, source: Path, target: str) -> None:
        self.target = target
        self._guest, self._source = guest, source
        self._leaf = f".smolvm-{secrets.token_hex(8)}"  # the name of the temporary directory
        self._asked = target.rstrip("/")
        self._temporary = ""
        self._content = "data"
        self._begun = False

    async def place(self, *, make_dirs: bool) -> None:
        """See `Upload.place()`."""
        answer = await self._begin("place", make_dirs=make_dirs)
        inside = answer.stdout.strip() == b"inside"
        if inside and self._guest.windows and (problem := name_problem(self._source.name)):
            raise FileTransferError(problem)
        self._place(f"{self._asked}/{self._source.name}" if inside else self._asked)

    async def _begin(self, step: str, *, make_dirs: bool) -> Answer:
        """Make the temporary directory."""
        self._begun = True
        values = {
            "target": self._asked,
            "into": "yes" if self.target.endswith("/") else "",
            "file_name": self._source.name,
            "leaf": self._leaf,
            "make_dirs": "yes" if make_dirs else "",
        }
        return await self._guest.step(step, values)

    def _place(self, target: str) -> None:
        self.target = target
        self._temporary = f"{target.rpartition('/')[0]}/{self._leaf}"

    async def copy(self, tree: Sequence[Entry], meter: TransferMeter) -> None:
        """See `Upload.copy()`."""
        top = tree[0]
        if top.kind == S_IFREG:
            await self._write(_content(self._source, top.size, meter))
            mode = f"{S_IMODE(top.mode):o}"
            await self._step("attributes", mode=mode, mtime=int(top.mtime))
            return
        self._content = "tree"
        if self._guest.windows:
            check_windows_tree(tree, f"{self._temporary}/tree")
        for part in parts(tree):
            await self._write(archive(self._source, part, meter, windows=self._guest.windows))
            await self._step("unpack")

    async def publish(self) -> None:
        """See `Upload.publish()`."""
        await self._step("publish", target=self.target, content=self._content)

    async def discard(self) -> None:
        """See `Upload.discard()`. This goes on in the background if the guest hangs."""
        if self._begun:
            await self._guest.session.end(self._discard())

    async def _discard(self) -> None:
        await self._guest.step("discard", {"target": self._asked, "leaf": self._leaf})

    async def met_full_disk(self, error: BaseException) -> bool:
        """See `Upload.met_full_disk()`."""
        own = isinstance(error, FileTransferError | GuestAgentError)
        return own and any(words in str(error) for words in FULL)

    async def _step(self, step: str, **values: object) -> None:
        await self._guest.step(step, {**values, "temporary": self._temporary})

    async def _write(self, chunks: AsyncGenerator[bytes, None]) -> None:
        """Write a file in the temporary directory."""
        path = utf8(f"{self._temporary}/data")
        async with aclosing(chunks), open_file(self._guest.session, path, "wb") as file:
            pending = bytearray()
            async for chunk in chunks:
                pending += chunk
                if len(pending) >= SENT:
                    await file.write(bytes(pending))
                    pending.clear()
            await file.write(bytes(pending))
            await file.flush()


def parts(tree: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Split a tree into archives.

    The directories come first, with mode 0700, so that even a read-only directory can receive its
    files. Their modes and times come last: each new file changes a directory's time.
    """
    directories = [entry for entry in tree if entry.kind == S_IFDIR]
    part, size = [entry._replace(mode=S_IFDIR | 0o700) for entry in directories], 0
    for entry in tree:
        if entry.kind == S_IFREG:
            if size and size + entry.size > PART:
                yield part
                part, size = [], 0
            part.append(entry)
            size += entry.size
    yield [*part, *(entry for entry in tree if entry.kind == S_IFLNK)]
    yield directories[::-1]


async def archive(
    source: Path, part: Sequence[Entry], meter: TransferMeter, *, windows: bool
) -> AsyncGenerator[bytes, None]:
    """Return the bytes of a tar archive: a header for each file, and its content."""
    import tarfile  # most processes do not need it

    kinds = {S_IFDIR: tarfile.DIRTYPE, S_IFREG: tarfile.REGTYPE, S_IFLNK: tarfile.SYMTYPE}
    # Busybox does not know the names of PAX; the tar of Windows knows no other ones in UTF-8.
    form: Literal[1, 2] = 2 if windows else 1
    assert (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) == (1, 2)
    for entry in part:
        info = tarfile.TarInfo(entry.path or ".")
        info.type, info.mode, info.mtime = kinds[entry.kind], S_IMODE(entry.mode), int(entry.mtime)
        if windows:
            info.mode |= 0o600  # otherwise the file would be "read-only"
        if entry.kind == S_IFLNK:
            info.linkname = await in_background(os.readlink, source / entry.path)
        elif entry.kind == S_IFREG:
            info.size = entry.size
        yield info.tobuf(form, "utf-8", "surrogateescape")
        if info.size:
            async with aclosing(_content(source / entry.path, entry.size, meter)) as chunks:
                async for chunk in chunks:
                    yield chunk
            yield bytes(-entry.size % BLOCK)
    yield bytes(2 * BLOCK)


async def _content(path: Path, size: int, meter: TransferMeter) -> AsyncGenerator[bytes, None]:
    """Return the bytes of a file of this host; all of them if it does not tell its size."""
    async with opened(path, os.O_RDONLY) as fd:
        offset = 0
        while offset < size or not size:
            count = min(READ, size - offset) if size else READ
            chunk = await in_background(os.pread, fd, count, offset)
            if not chunk and size:
                raise FileTransferError("the file became shorter while it was copied")
            if not chunk:
                return
            offset += len(chunk)
            meter.add(len(chunk))
            yield chunk


def parse(
    output: bytes, word: str, source: str, *, any_kind: bool = False
) -> tuple[list[Entry], dict[str, str]]:
    """Return the entries of a listing and the targets of links; a hostile guest has written both.

    With `any_kind`, there may be sockets, FIFOs and devices, and links without targets.

    Raises:
        FileTransferError: The listing makes no sense, or a name could lead out of the tree.
    """
    found: dict[str, Entry] = {}
    links: dict[str, str] = {}
    link = ""
    try:
        for record in output.split(f"{word} ".encode())[1:]:
            kind, size, mtime, name = record[:-1].split(b" ", 3)
            if kind == b"link":
                link = _checked_path(name)
            elif kind == b"to":
                links[link] = os.fsdecode(name.removesuffix(b".").removesuffix(b"\n"))
            else:
                path = _checked_path(name)
                numbers = int(kind, 16), int(size), int(mtime)
                if path in found or not 0 <= min(numbers[:2]) <= max(map(abs, numbers)) < 1 << 62:
                    raise ValueError
                found[path] = Entry(path, *numbers)
                if not any_kind:
                    checked(found[path], f"{source}/{path}".rstrip("/"))
        expected = {entry.path for entry in found.values() if entry.kind == S_IFLNK}
        if next(iter(found), None) != "" or (not any_kind and links.keys() != expected):
            raise ValueError
    except ValueError:
        raise FileTransferError(f"the guest's list of {source!r} makes no sense") from None
    return [*found.values()], links


def _checked_path(name: bytes) -> str:
    """Return a path of a listing, which starts with `./`, relative to the root of the tree."""
    names = os.fsdecode(name).split("/")
    if names[0] != "." or b"\0" in name or {"", ".", ".."} & {*names[1:]}:
        raise FileTransferError(f"the guest reports an unsafe file name: {os.fsdecode(name)!r}")
    return "/".join(names[1:])


def utf8(path: str) -> str:
    """Check that the agent can open a path."""
    try:
        path.encode()
    except UnicodeEncodeError:
        message = f"the guest agent cannot open {path!r}: its name is not UTF-8."
        raise FileTransferError(message, hint="Rename it, or run() tar for it.") from None
    return path
