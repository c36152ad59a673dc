"""Tests in which something fails, is killed or is cancelled."""
