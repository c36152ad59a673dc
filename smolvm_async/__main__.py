"""`python -m smolvm_async` is the command line."""

from __future__ import annotations

from smolvm_async.cli.app import main

if __name__ == "__main__":
    main()
