"""The part that is native code in the real library."""
