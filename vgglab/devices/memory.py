"""Memory: its lack, known by torch's words; and on the CPU freed memory that stays, and a limit before it is too late.

The C library hands large freed blocks back to the system and asks for them again every step. VGG's activations are
freed and allocated again in each; the system has to clear those pages. Kept, they cost nothing, and no number changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

# Messages of torch and oneDNN when memory is lacking; the last is for oneDNN's own buffers.
NO_MEMORY = (
    "out of memory", "can't allocate memory", "could not create a memory", "bad_alloc", "could not create a primitive",
)  # fmt: skip

# Parameters of mallopt(3), glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER, TOP_PAD_BYTES = 2**31 - 1, 64 * 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception is about, on this machine's memory or a card's."""
    is_torchs = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
    return is_torchs or isinstance(error, MemoryError)


def keep_freed_memory() -> bool:
    """Have this process and those it forks keep what they free. False if the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: TOP_PAD_BYTES}
    return all([library.mallopt(name, value) for name, value in settings.items()])


def limit_to_free_memory(share: float = 0.95) -> int | None:
    """Raise an error here, before the kernel's OOM killer acts.

    Returns the bytes that this process may still take, that share of what is free in the machine and in its
    container; None if the system does not tell (Linux does).
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        free = int(share * _free_bytes())
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        taken = 1024 * int(re.search(r"VmSize:\s*(\d+)", status)[1])  # type: ignore[index]
        resource.setrlimit(resource.RLIMIT_AS, (taken + free, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return free
    return None


def _free_bytes() -> int:
    [kilobytes] = re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"))
    free = 1024 * int(kilobytes)
    with contextlib.suppress(OSError, ValueError):  # of the container (cgroup v2); "max" is no number
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        # What the system keeps of files it gives back when asked.
        [files] = re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
        free = min(free, limit - int((group / "memory.current").read_text(encoding="ascii")) + int(files))
    return free
