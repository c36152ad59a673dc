"""What happens when something fails, is killed or is cancelled."""
