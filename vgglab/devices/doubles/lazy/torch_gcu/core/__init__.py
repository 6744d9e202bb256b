"""The double of the part that is native code in the real library."""
