"""The command line, started with `python -m smolvm_async`."""

from __future__ import annotations

from smolvm_async.cli.app import main

if __name__ == "__main__":
    main()
