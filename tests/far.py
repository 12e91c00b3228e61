"""A device that is not there: tensors `far` compute on the CPU, say that they are on "cuda", and
refuse what a GPU refuses, operations with tensors of the CPU (but scalars) and NumPy."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

FAR = torch.device("cuda")
BACK = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__repr__}
MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.copy_}
SET = (
    torch.Tensor.data.__set__,
    torch.Tensor.grad.__set__,
    torch._has_compatible_shallow_copy_type,
)
PLAIN = torch._C.DisableTorchFunctionSubclass


class FarTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})

    def __deepcopy__(self, memo):
        with PLAIN():
            copied = far(self.detach().clone()).requires_grad_(self.requires_grad)
        parameter = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if parameter else copied
        return memo[id(self)]


def far(tensor):
    with PLAIN():
        return tensor if isinstance(tensor, FarTensor) else tensor.as_subclass(FarTensor)


def _named(device):
    return device is not None and torch.device(device).type == "cuda"


def _device_of(args, kwargs):
    """The device that a call to `Tensor.to` names, if any."""
    for value in [*args[1:], kwargs.get("device"), kwargs.get("other")]:
        if isinstance(value, torch.Tensor):
            return FAR if isinstance(value, FarTensor) else torch.device("cpu")
        if isinstance(value, (str, torch.device)):
            return torch.device(value)
    return None


checking = [True]


def _call(function, args, kwargs):
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    is_far = any(isinstance(t, FarTensor) for t in tensors)
    if function == torch.Tensor.device.__get__:
        return FAR
    if function == torch.Tensor.is_cuda.__get__:
        return True
    if function == torch.Tensor.is_cpu.__get__:
        return False
    if function in (torch.Tensor.numpy, torch.Tensor.__array__):
        raise TypeError("can't convert a far tensor to numpy: use .cpu() first")
    if function is torch.Tensor.__format__:
        with PLAIN():
            return format(args[0].detach().as_subclass(torch.Tensor), args[1])
    if function is torch.Tensor.to:
        wanted = _device_of(args, kwargs)
        result = _device_of((None, FAR), {}) if wanted is None and is_far else wanted
        strip = lambda v: "cpu" if isinstance(v, (str, torch.device)) else v
        with PLAIN():
            moved = function(*map(strip, args), **{k: strip(v) for k, v in kwargs.items()})
            if result is not None and result.type == "cuda":
                return far(moved)
            return moved.as_subclass(torch.Tensor) if isinstance(moved, FarTensor) else moved
    goes = _named(kwargs.get("device")) or function is torch.Tensor.cuda
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs = kwargs | {"device": "cpu"}
        is_far = goes
    if function is torch.Tensor.pin_memory:
        return args[0]
    mixing = function not in MOVES and function not in SET and checking[0]
    if is_far and mixing:
        with PLAIN():
            near = [tuple(t.shape) for t in tensors if t.ndim and not isinstance(t, FarTensor)]
        index = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if near and not (index and isinstance(args[0], FarTensor)):  # indices of the CPU are fine
            raise RuntimeError(
                f"{function}: expected all tensors on one device; on the CPU: {near}"
            )
    before, checking[0] = checking[0], checking[0] and function is not torch.Tensor.backward
    try:
        with PLAIN():
            result = function(*args, **kwargs)
    finally:
        checking[0] = before
    if function in BACK:
        return result.as_subclass(torch.Tensor) if isinstance(result, FarTensor) else result
    if (is_far or goes) and not isinstance(result, torch.Size):
        return tree_map_only(torch.Tensor, far, result)
    return result


class _Factories(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = function is torch.Tensor.to and _device_of(args, kwargs) is not None
        if moves or _named(kwargs.get("device")) or function is torch.Tensor.pin_memory:
            return _call(function, args, kwargs)
        return function(*args, **kwargs)


@contextmanager
def pretended():
    """Inside, `.to("cuda")` gives far tensors, and modules move."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    memory = mock.patch("torch.cuda.max_memory_allocated", lambda *_: 1)
    autocast = mock.patch("torch.amp.autocast_mode.warnings.warn")
    try:
        with memory, autocast, _Factories():
            yield FAR
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
