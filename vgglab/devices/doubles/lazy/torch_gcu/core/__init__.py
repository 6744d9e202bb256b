"""What the real library has native code for."""
