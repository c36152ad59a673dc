"""What a fleet's client and the Dask workers send each other; needs `distributed`."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distributed.protocol import pickle

from smolvm_async.config.checks import told
from smolvm_async.errors import RemoteError
from smolvm_async.qemu.events import BootState

RESOURCE = "smolvm_memory"  # MiB: of a worker, what its VMs may take; of a job, what its VM does
CLAIM = "smolvm_worker"  # in a task's metadata at the scheduler: which worker has begun it


@dataclass(frozen=True)
class JobRequest:
    """One try of one job.

    Attributes:
        fleet: The fleet's id: its jobs on one worker share a look at the host.
        call: The id of the call of `map()`.
        key: Dask's name of the task.
        template: The VM's arguments, pickled, as are the `job` and its `item`.
        rerun: Whether another worker may do it, should this one be lost.
    """

    fleet: str
    call: str
    key: str
    template: bytes
    job: bytes
    item: bytes
    until: BootState
    rerun: bool


@dataclass(frozen=True)
class JobReply:
    """What has become of it: a pickled value, or an error and its causes, or the worker lost."""

    vm_id: str = ""
    value: bytes | None = None
    errors: Sequence[bytes | str] = ()
    lost: str = ""


def dumps(value: object) -> bytes:
    """Pickle, by value what cannot be imported elsewhere."""
    dump: Any = pickle.dumps  # not typed
    with no_exit("pickling"):
        return bytes(dump(value))


def loads(data: bytes) -> Any:
    """The reverse."""
    load: Any = pickle.loads
    with no_exit("unpickling"):
        return load(data)


@contextmanager
def no_exit(what: str) -> Iterator[None]:
    """What a job or an object of the user's does cannot end the process.

    Raises:
        RemoteError: It has tried to.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        raise RemoteError(f"{what} has raised {error!r}.") from None


def pack(error: BaseException, where: str) -> Sequence[bytes | str]:
    """An error and its causes, each pickled, or in words if it cannot be; with its traceback."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"On {where}:\n{text.rstrip()}")
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    return [_pickled(link) for link in chain]


def _pickled(error: BaseException) -> bytes | str:
    # Alone: one of its causes may be what cannot be pickled, nor its traceback's frames.
    error.__cause__ = error.__context__ = error.__traceback__ = None
    try:
        data = dumps(error)
        if isinstance(loads(data), BaseException):
            return data
    except Exception:  # whatever a class of the job's own may raise
        pass
    return "\n".join([told(error), *getattr(error, "__notes__", ())])


def unpack(packed: Sequence[bytes | str]) -> BaseException:
    """The error, with its causes."""
    chain = [_unpickled(link) for link in packed]
    for error, cause in pairwise(chain):
        error.__cause__ = cause
    return chain[0]


def _unpickled(link: bytes | str) -> BaseException:
    if isinstance(link, str):
        return RemoteError(link)
    try:
        error = loads(link)
    except Exception as missing:
        return RemoteError(f"an exception that this process cannot load: {missing}")
    return error if isinstance(error, BaseException) else RemoteError("an exception, once pickled")
