"""What runs in the host guest."""
