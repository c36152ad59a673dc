"""KVM, tested in a guest that has it."""
