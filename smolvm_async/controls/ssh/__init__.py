"""Commands and files in a guest, over SSH: nothing here knows how the guest was started."""
