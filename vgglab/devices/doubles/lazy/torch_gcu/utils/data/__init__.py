"""``torch_gcu.utils.data`` of the contract."""
