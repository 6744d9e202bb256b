"""Everything people look at. Views read run directories; they import neither the engine nor torch."""
