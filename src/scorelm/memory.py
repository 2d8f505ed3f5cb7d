"""Process-wide memory settings for programs that allocate large arrays over and over."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and values of glibc's malloc.h


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
