"""A trial of the guard's filter: can this host enforce a network policy?"""

from __future__ import annotations

import functools
import os
import threading

from smolvm_async.errors import HostError


@functools.cache
def find_problem() -> HostError | None:
    """Return why this host cannot guard a guest's network; `None` if it can.

    The first call tries it, in a thread of its own, which keeps the filter until its end.
    """
    from smolvm_async.host import seccomp  # needs ctypes, which an import does not need

    problems: list[HostError] = []

    def install() -> None:
        try:
            os.close(seccomp.install())
        except OSError as error:
            problems.append(seccomp.refused(error))

    try:
        seccomp.check_seccomp()
        thread = threading.Thread(target=install, name="smolvm-trial")
        thread.start()
        thread.join()
    except HostError as error:
        problems.append(error)
    except RuntimeError as error:  # the host starts no thread
        problems.append(HostError(f"A guest's network cannot be guarded: {error}."))
    return problems[0] if problems else None
