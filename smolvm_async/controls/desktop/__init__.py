"""Screen, mouse, keyboard and VNC of any guest; nothing has to be installed in the guest."""
