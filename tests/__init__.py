"""The tests: unit (pure), integration (real parts), faults."""
