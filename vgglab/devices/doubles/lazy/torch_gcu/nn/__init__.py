"""The double of ``torch_gcu.nn``."""
