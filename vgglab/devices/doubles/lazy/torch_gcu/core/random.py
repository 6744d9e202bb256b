"""The double of ``torch_gcu.core.random``."""

from torch_gcu.core.contract import log


def manual_seed_all(seed):
    if not 0 <= int(seed) <= 4294967295:
        raise ValueError(f"the seed must be from 0 to 4294967295, not {seed}")
    log.call("manual_seed_all", seed=int(seed))
