"""Commands and files in a guest through its QEMU guest agent: no network, no password."""
