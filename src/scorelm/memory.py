"""Process-wide memory settings for long runs that allocate large arrays over and over."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and values of glibc's malloc.h


def bound_kernel_caches() -> None:
    """Let oneDNN keep its 64 newest kernels instead of 1,024; to be called before torch is imported.

    The number of noisy positions differs from step to step, and every new shape of a product leaves a kernel of
    megabytes behind: without a bound a run's memory grows by gigabytes over its first thousand steps.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the kernel, which zeroes every page again.

    Elementwise CPU operations on activations of tens of megabytes are several times faster
    (`benchmarks/training.py`). Does nothing where the C library is another one.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
