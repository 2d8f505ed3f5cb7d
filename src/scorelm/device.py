"""Where a run computes, in which precision, and how fast that could be at best."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence

import torch

from scorelm.errors import InputError

MOST_GRAPHS = 128
"""How often a function is compiled in a process, for other shapes or options."""
LONG = 0.05
"""Seconds of a matrix product beyond which no larger one is tried."""


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one.

    Raises:
        InputError: there is none, or it has no float64.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("mps"):
        raise InputError("Apple's GPUs (mps) have no float64, which noise levels and prices need: use --device cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {name!r}: {str(error).splitlines()[0]}") from None


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in; auto is bfloat16 only where the processor does it natively."""
    if precision == "auto":
        has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def find_compiler(device: torch.device) -> str | None:
    """The program that torch.compile calls for such a device, if there is one."""
    from torch._inductor.config import cpp

    names = cpp.cxx if device.type == "cpu" else (os.environ.get("CC"), "clang", "gcc")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def check_compiler(device: torch.device) -> None:
    """See that what torch.compile calls is there.

    Raises:
        InputError: it is not.
    """
    if find_compiler(device) is None:
        cpu = device.type == "cpu"
        needs = "a CPU needs a C++ compiler, such as g++" if cpu else "a GPU needs a C compiler, such as gcc"
        raise InputError(f"compiling for {needs}, and there is none")


def set_up_compiler() -> None:
    """Change how torch.compile works in this process: it keeps more on disk, and compiles for more runs.

    By itself it keeps kernels, but no graph of AOTAutograd in which a function has a gradient of its own or a part is
    out of autocast, since it does not know these to be safe. They are: both are spelled out in what is traced, which
    the files are named after. And it gives up on a function that eight runs have had compiled for their own options.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
    functorch.autograd_cache_allow_custom_autograd_functions = True
    autocast = (f"torch.amp.autocast_mode.{name}" for name in ("_enter_autocast", "_exit_autocast"))
    inductor.unsafe_marked_cacheable_functions |= dict.fromkeys(autocast, torch.__version__)


def constant(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A few numbers as a tensor on the device of another one, which nobody waits for."""
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def send(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, which nobody waits for; the tensor itself where it is there already."""
    pinned = t.pin_memory() if t.device.type == "cpu" and device.type == "cuda" else t
    return pinned.to(device, non_blocking=True)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a square matrix product, best of 7: what MFU is relative to.

    The products grow as large as a device needs to reach its peak: of 1,024 an H200 shows an eighth of it, and two
    cores with AMX half of it. They stop growing at one that takes long, as in bfloat16 where a processor has none: of
    2,048 that can take minutes.
    """

    def fastest(size: int) -> float:
        a, took = torch.randn(size, size, device=device, dtype=dtype), math.inf
        for _ in range(7):
            started = time.perf_counter()
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = min(took, time.perf_counter() - started)
        return took

    peak, size, took = 0.0, 128, 0.0
    while size < (8192 if device.type == "cuda" else 2048) and took < LONG:
        size *= 2
        took = fastest(size)
        peak = max(peak, 2 * size**3 / took)
    return peak
