"""The double of ``torch_gcu.core``, including what is native code in the real library."""
