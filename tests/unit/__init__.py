"""Pure: no virtual machine is started here."""
