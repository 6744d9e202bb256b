"""The vendor's module of this name rewrites ``torch.cuda``, ``torch.jit.script`` and the warning filters."""

from torch_gcu.contract import log

log.violation("transfer_to_gcu was imported: it rewrites torch for the whole process; adapters must not import it")
