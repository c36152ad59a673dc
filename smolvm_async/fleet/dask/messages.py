"""The messages between a `DaskFleet` and the Dask workers; needs `distributed`.

Dask pickles the messages by their module's path, so client, scheduler and workers need the same
version of this package. `check_version()` raises an error that explains a mismatch.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distributed.protocol import pickle

from smolvm_async.config.checks import told
from smolvm_async.errors import HostError, RemoteError
from smolvm_async.qemu.events import BootState

RESOURCE = "smolvm_memory"  # MiB that a worker offers for all its VMs, or a job needs for its VM
STARTED_BY = "smolvm_worker"  # key in a task's metadata: address of the worker that began the task


def version_asker() -> Callable[[], str]:
    """Return a function that returns the package's version where it runs, or an empty string.

    The function is nested, so pickled by value: it also runs where this module is not installed.
    """

    def installed() -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("smolvm-async")
        except PackageNotFoundError:
            return ""

    return installed


VERSION = version_asker()()


@dataclass(frozen=True)
class JobRequest:
    """A request for one attempt of one job.

    Attributes:
        fleet: The fleet's id; all jobs of a fleet share one check of the worker's host.
        call: The id of the call of `map()`.
        template: The VM's arguments, pickled; `job` and `item` are pickled, too.
        rerun: Whether another worker may run the job if this worker is lost.
        key: Dask's name of the task.
        from_snapshot: The name of the snapshot that the VM is a clone of.
        version: The client's version of this package.
    """

    fleet: str
    call: str
    template: bytes
    job: bytes
    until: BootState
    rerun: bool
    key: str = ""
    item: bytes = b""
    from_snapshot: str | None = None
    version: str = VERSION


@dataclass(frozen=True)
class JobReply:
    """The result of an attempt.

    Attributes:
        value: The job's result, pickled; `None` if the attempt failed.
        errors: The error and its causes, see `pack()`.
        lost: Address of the lost worker that began the job, if the job must not run again.
    """

    vm_id: str = ""
    value: bytes | None = None
    errors: Sequence[bytes | str] = ()
    lost: str = ""


def check_version(client: str, other: str, where: str) -> None:
    """Check that the scheduler or a worker has the client's version."""
    if client != other:
        raise HostError(
            f"the client has smolvm-async {client or '(not installed)'}, but the Dask {where} has "
            f"smolvm-async {other or '(not installed)'}.",
            hint="Install the same version of smolvm-async[dask] on the client, the scheduler and "
            "all workers, and restart them.",
            missing=("smolvm-async[dask]",),
        )


def dumps(value: object) -> bytes:
    """Pickle a value; objects that cannot be imported elsewhere are pickled by value."""
    dump: Any = pickle.dumps  # has no type hints
    with no_exit("pickling"):
        return bytes(dump(value))


def loads(data: bytes) -> Any:
    """Load a pickled value."""
    load: Any = pickle.loads
    with no_exit("unpickling"):
        return load(data)


@contextmanager
def no_exit(action: str) -> Iterator[None]:
    """Raise a `RemoteError` if the user's code in the block tries to exit the process."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        raise RemoteError(f"{action} raised {error!r}.") from None


def pack(error: BaseException, where: str) -> Sequence[bytes | str]:
    """Pickle an error and each of its causes; add the error's traceback to it as a note.

    An error that cannot be pickled and loaded again becomes text.
    """
    text = "".join(traceback.format_exception(error))
    error.add_note(f"On {where}:\n{text.rstrip()}")
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    return [_pickled(link) for link in chain]


def _pickled(error: BaseException) -> bytes | str:
    # Remove the causes and the traceback's frames: it may be impossible to pickle them.
    error.__cause__ = error.__context__ = error.__traceback__ = None
    try:
        data = dumps(error)
        if isinstance(loads(data), BaseException):
            return data
    except Exception:  # any exception: the class may be the user's
        pass
    return "\n".join([told(error), *getattr(error, "__notes__", ())])


def unpack(packed: Sequence[bytes | str]) -> BaseException:
    """Return the error that was passed to `pack()`, with its causes."""
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
        return RemoteError(f"this process cannot load the exception: {missing}")
    if not isinstance(error, BaseException):
        return RemoteError("the pickled error did not load as an exception")
    return error
