"""Files of a run directory: opened safely, locked, and read only as far as they are what they should be."""
