"""What one does with a running guest, one file for each."""
