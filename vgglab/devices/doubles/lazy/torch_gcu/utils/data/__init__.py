"""The double of ``torch_gcu.utils.data``."""
