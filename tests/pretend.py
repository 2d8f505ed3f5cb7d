"""A device that is none: its tensors are the CPU's, but say that they are elsewhere.

What a GPU would refuse (tensors of two places in one operation) fails, and whatever would make the host wait is listed.
"""

from collections import Counter
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
ELSEWHERE = torch.device("privateuseone", 0)
READ = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}
"""What needs the values of a tensor on the host."""
MOVES = {"to", "_to_copy", "copy_"}


class Module:
    """What torch asks of a device of its own kind."""

    is_available = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: True)
    is_in_bad_fork = _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    device_count = staticmethod(lambda: 0)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


@cache
def register():
    """Make the kind of device known, once in a process; torch wants no second one beside a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/training/test_cuda.py")
    _setup_privateuseone_for_python_backend(NAME, Module())


class There(torch.Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=ELSEWHERE,
        )  # fmt: skip

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function}: a tensor of the device is used outside `elsewhere`")


class Elsewhere(TorchDispatchMode):
    """Computes what is asked of the device, and counts what waits for it."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function._schema.name.removeprefix("aten::")
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [t for t in leaves if torch.is_tensor(t)]
        there = [t for t in tensors if isinstance(t, There)]
        to = next((one for one in leaves if isinstance(one, torch.device)), None)
        stays = bool(there) if to is None else to == ELSEWHERE
        if name == "copy_":
            stays = isinstance(args[0], There)
        indices = [t for t in args[1] if t is not None] if name in ("index", "index_put", "index_put_") else []
        mixed = [t for t in tensors if t.ndim and not isinstance(t, There)] if there else []
        assert name in MOVES or all(any(t is one for one in indices) for t in mixed), f"{name} mixes two devices"
        read = name in READ or any(t.dtype == torch.bool or not isinstance(t, There) for t in indices)
        if there and (read or not stays):
            self.waits[name] += 1
        here = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        args_here, kwargs_here = tree_map_only(There, lambda t: t.here, here)
        found = function(*args_here, **kwargs_here)
        if not stays:
            return found.clone() if torch.is_tensor(found) and there and name != "copy_" else found
        known = {id(t.here): t for t in there}
        return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else There(t), found)


@contextmanager
def elsewhere(lm):
    """A model on the device, meanwhile; what it is entered with counts waits."""
    register()
    kept = {module: dict(module._parameters) for module in lm.modules()}
    try:
        with Elsewhere() as device, torch.inference_mode():
            for module, parameters in kept.items():
                for name, parameter in parameters.items():
                    if parameter is not None:
                        there = There(parameter.detach())
                        module._parameters[name] = nn.Parameter(there, requires_grad=False)
            yield device
    finally:
        for module, parameters in kept.items():
            module._parameters.update(parameters)
