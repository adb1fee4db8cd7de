"""Let a CPU process keep freed memory from step to step."""

import ctypes
import os
import sys

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Let glibc keep freed memory for the next step. Returns whether it will.

    By default glibc returns each large block to the system at once. The system then zeroes new pages for the next
    block, thousands per step. Without that, AlexNet trained 1.6 times faster on two cores (benchmarks/memory.py). If
    the environment sets an allocator or options of it (LD_PRELOAD, GLIBC_TUNABLES, MALLOC_*), nothing is changed.
    """
    if sys.platform != "linux" or any(
        name in ("LD_PRELOAD", "GLIBC_TUNABLES") or name.startswith("MALLOC_") for name in os.environ
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):  # musl has another allocator
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26))
    return all(mallopt(key, value) == 1 for key, value in settings)
