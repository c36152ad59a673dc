"""Images that the library builds from the host's package sources."""
