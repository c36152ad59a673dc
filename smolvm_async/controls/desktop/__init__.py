"""Screen, mouse, keyboard and VNC of any guest; the guest needs no extra software."""
