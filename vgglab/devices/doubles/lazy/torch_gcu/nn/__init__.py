"""``torch_gcu.nn`` of the contract."""
