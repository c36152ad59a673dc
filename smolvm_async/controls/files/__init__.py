"""Uploads into a guest and downloads from it, over one of two ways: SFTP, or the guest agent."""
