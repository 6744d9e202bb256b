"""``torch_gcu.utils`` of the contract."""
