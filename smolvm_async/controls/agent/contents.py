"""The guest's files as bytes, through its agent: a `FileAccess`. No Windows was run."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from stat import S_IFREG, S_IMODE

from smolvm_async.controls.agent.files import SENT, open_file
from smolvm_async.controls.agent.transfer import AgentFiles, AgentUpload, parse, utf8
from smolvm_async.controls.contents import MOST, check_length
from smolvm_async.controls.file_info import FileInfo, kind_of
from smolvm_async.controls.files.copying import TransferMeter
from smolvm_async.controls.files.files import carry_out, explained
from smolvm_async.controls.files.tree import Entry
from smolvm_async.errors import FileTransferError


class AgentAccess:
    """The files of a guest that has an agent."""

    def __init__(self, files: AgentFiles) -> None:
        self._files = files

    async def read(self, path: str, offset: int, length: int | None) -> bytes:
        """Read a file; without a length, refuse a file of more than `MOST` bytes."""
        with explained(self._files.explanation, repr(path)):
            entry = (await self._list("info", path))[0]
            if entry.kind != S_IFREG:
                raise FileTransferError("it is not a file")
            if length is None:
                check_length(max(0, entry.size - offset))
            content = bytearray()
            most = MOST + 1 if length is None else length
            async with open_file(self._files.session, utf8(path), "rb") as file:
                await file.seek(offset, "set")
                while len(content) < most:
                    piece, _ = await file.read()
                    content += piece
                    if not piece:
                        break
            if length is None:
                check_length(len(content))
            return bytes(content[:most])

    async def write(self, path: str, content: bytes, mode: int | None, make_dirs: bool) -> None:
        """Replace a file as a whole, or not at all."""
        with explained(self._files.explanation, repr(path)):
            upload = _Content(self._files, path, content, mode)
            await carry_out(upload, [], TransferMeter(None, "", 0), make_dirs=make_dirs)

    async def entries(self, path: str) -> list[FileInfo]:
        """Return the files in a directory, sorted by name."""
        with explained(self._files.explanation, repr(path)):
            found = await self._list("entries", path)
        return sorted(_info(path.rstrip("/"), entry) for entry in found[1:])

    async def remove(self, path: str, recursive: bool) -> None:
        """Remove a file, or a directory."""
        with explained(self._files.explanation, repr(path)):
            try:
                await self._step("remove", path, recursive="yes" if recursive else "")
            except FileTransferError as error:
                if "not empty" not in error.message:
                    raise
                message = "the directory is not empty."
                raise FileTransferError(message, hint="Pass recursive=True.") from error

    async def make_directory(self, path: str, parents: bool) -> None:
        """Make a directory."""
        with explained(self._files.explanation, repr(path)):
            try:
                await self._step("make_directory", path, parents="yes" if parents else "")
            except FileTransferError as error:
                if parents or "File exists" not in error.message:
                    raise
                raise FileTransferError("it exists already") from error

    async def exists(self, path: str) -> bool:
        """Return whether a path leads to a file or a directory."""
        with explained(self._files.explanation, repr(path)):
            return bool(await self._step("exists", path))

    async def _list(self, step: str, path: str) -> list[Entry]:
        word = secrets.token_hex(16)
        return parse(await self._step(step, path, word=word), word, path, any_kind=True)[0]

    async def _step(self, step: str, path: str, **values: str) -> bytes:
        return (await self._files.step(step, {"source": path, **values})).stdout


class _Content(AgentUpload):
    """A transfer of bytes into a file."""

    def __init__(self, files: AgentFiles, target: str, content: bytes, mode: int | None) -> None:
        super().__init__(files, Path(), target)
        self._bytes, self._mode = content, mode

    async def place(self, *, make_dirs: bool) -> None:
        """Make the temporary directory beside the file, or beside the file that it links to."""
        answer = await self._begin("place_content", make_dirs=make_dirs)
        self._place(answer.stdout.decode(errors="surrogateescape"))

    async def copy(self, tree: Sequence[Entry], meter: TransferMeter) -> None:
        """Write everything under the temporary name."""

        async def chunks() -> AsyncGenerator[bytes, None]:
            for start in range(0, len(self._bytes), SENT):
                yield self._bytes[start : start + SENT]

        await self._write(chunks())
        mode = "" if self._mode is None else f"{self._mode:o}"
        await self._step("content_attributes", mode=mode, target=self.target)


def _info(directory: str, entry: Entry) -> FileInfo:
    path = f"{directory}/{entry.path}"
    kind, mode = kind_of(entry.mode), S_IMODE(entry.mode)
    return FileInfo(entry.path, path, kind, entry.size, mode, float(entry.mtime))
