"""Settings of the whole process, for long work on large arrays; libraries read most of them when they are loaded."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and values of glibc's malloc.h


def prepare() -> None:
    """Make every setting below; to be called before torch is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns of every fork
    bound_kernel_caches()
    let_waiting_threads_sleep()
    keep_freed_memory()


def bound_kernel_caches() -> None:
    """Let oneDNN keep its 64 newest kernels instead of 1,024.

    The number of noisy positions differs from step to step, and every new shape of a product leaves a kernel of
    megabytes behind: without a bound a run's memory grows by gigabytes over its first thousand steps.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def let_waiting_threads_sleep() -> None:
    """Let OpenMP's threads spin only briefly while they wait for work; settings of the user's own are kept.

    PyTorch's CPU wheel for Linux brings GNU's libgomp, which reads ``OMP_WAIT_POLICY`` and ``GOMP_SPINCOUNT`` once,
    when it is loaded. By itself a thread that waits spins 300,000 times before it sleeps, and keeps its core from other
    processes meanwhile. With 1,000 it is about as fast on an idle machine, and twice as fast at generation beside one
    busy process (`benchmarks/threads.py`).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


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
