"""Commands in a guest: one interface, and several ways to run them (`transport.py`)."""
