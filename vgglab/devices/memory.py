"""Memory: recognise out-of-memory errors; on the CPU, keep freed memory and set a limit.

The C library returns large freed blocks to the system. VGG's activations are freed and allocated again in each step,
and the system has to clear the pages each time. Keeping the blocks saves this time and does not change results.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
from pathlib import Path

# Parts of the out-of-memory messages of torch and oneDNN; the last is for oneDNN's own buffers.
OOM_MESSAGES = (
    "out of memory", "can't allocate memory", "could not create a memory", "bad_alloc", "could not create a primitive",
)  # fmt: skip

# Parameters of mallopt(3), glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER_TRIM, TOP_PAD_BYTES = 2**31 - 1, 64 * 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the host or on a card."""
    is_torch_error = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OOM_MESSAGES)
    return is_torch_error or isinstance(error, MemoryError)


def keep_freed_memory() -> bool:
    """Make this process and its forked children keep freed memory. Returns False if the C library is not glibc."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER_TRIM, M_TOP_PAD: TOP_PAD_BYTES}
    return all([library.mallopt(name, value) for name, value in settings.items()])


def limit_to_free_memory(share: float = 0.95) -> int | None:
    """Limit the memory of this process, so that it gets an error before the kernel's OOM killer acts.

    Returns how many more bytes it can allocate: ``share`` times the free memory of the machine or of its container,
    whichever is less; None if the system does not report the free memory (Linux does).
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        free = int(share * _free_bytes())
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        used = 1024 * int(re.search(r"VmSize:\s*(\d+)", status)[1])  # type: ignore[index]
        resource.setrlimit(resource.RLIMIT_AS, (used + free, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return free
    return None


def _free_bytes() -> int:
    [kilobytes] = re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"))
    free = 1024 * int(kilobytes)
    with contextlib.suppress(OSError, ValueError):  # the container's limit (cgroup v2); "max" means no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        # The system's cache of file contents counts as free: it is released on demand.
        [cache] = re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
        free = min(free, limit - int((group / "memory.current").read_text(encoding="ascii")) + int(cache))
    return free
