"""``torch_gcu.core.random`` of the contract."""

from torch_gcu.core.contract import log


def manual_seed_all(seed):
    if not 0 <= int(seed) <= 4294967295:
        raise ValueError(f"a seed is from 0 to 4294967295, not {seed}")
    log.call("manual_seed_all", seed=int(seed))
