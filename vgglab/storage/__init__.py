"""Files of a run directory: safe opening, locking and validation."""
