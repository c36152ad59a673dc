"""A trial of the guard's filter: can this host enforce a network policy?"""

from __future__ import annotations

import functools
import os

from smolvm_async.errors import HostError
from smolvm_async.foundation.process import Spawner


@functools.cache
def find_problem() -> HostError | None:
    """Return why this host cannot guard a guest's network; `None` if it can.

    The first call tries it, in a thread of its own, which keeps the filter until its end.

    Raises:
        HostError: The host lacks memory, descriptors or threads now: a later call tries again.
    """
    from smolvm_async.host import seccomp  # needs ctypes, which an import does not need

    spawner = Spawner()
    try:
        seccomp.check_seccomp()
        try:
            spawner.run(lambda: os.close(seccomp.install()))
        except OSError as error:
            return seccomp.refused(error)
    except HostError as error:
        if "threads" in error.missing:
            raise
        return error
    except OSError as error:
        message = f"A guest's network cannot be guarded now: {error.strerror}."
        raise HostError(message, hint="Close files, or raise the limit: ulimit -n.") from error
    finally:
        spawner.close()
    return None
