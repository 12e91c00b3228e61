"""What of a model a file holds, and a model to fill, held against what the header says."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kit.artifact.header import Header
from kit.artifact.layouts import MOST, ArtifactError
from kit.core.weights import Weight, weights
from kit.models import build_model
from kit.quantization.activations import ACTIVATION_MODULES

BUILDING, REGISTER = threading.RLock(), nn.Module.register_parameter
SPARSEST = 2**10  # entries a byte of a file, beyond MOST in all: larger ones need `load(model=)`


def kind_of(tensor: Tensor) -> dict:
    dtype = {} if tensor.dtype == torch.float32 else {"dtype": _name(tensor.dtype)}
    return {"shape": list(tensor.shape), **dtype}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def targets_of(model: nn.Module) -> dict[str, Weight | Tensor]:
    """Everything that a file holds, by name: weights and buffers."""
    return {weight.name: weight for weight in weights(model)} | dict(buffers_of(model))


def buffers_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


def fill_buffer(model: nn.Module, name: str, value: Tensor, taken: set[int]) -> None:
    """In place, as modules may share a buffer; a view of a weight (`taken`: where these are in
    memory), or with entries in one place, is parted."""
    path, _, leaf = name.rpartition(".")
    buffers = model.get_submodule(path)._buffers
    storage = buffers[leaf].untyped_storage()
    if storage.nbytes() < buffers[leaf].nbytes or storage.data_ptr() in taken:
        buffers[leaf] = value
    else:
        buffers[leaf].copy_(value)


def activation_modules(model: nn.Module) -> dict:
    kinds = tuple(ACTIVATION_MODULES.values())
    found = {path: module for path, module in model.named_modules() if type(module) in kinds}
    outer = {path: m for path, m in found.items() if path.rpartition(".")[0] not in found}
    return {path: {"class": type(m).__name__, **m.settings()} for path, m in outer.items()}


def extra_state(model: nn.Module) -> dict:
    found = {}
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[path] = module.get_extra_state()
            try:
                same = json.loads(json.dumps(found[path], allow_nan=False)) == found[path]
            except (TypeError, ValueError):
                same = False
            if not same:  # keys that are numbers and tuples would come back as others
                what = f"the extra state of {path!r} is no plain JSON, all that a file holds"
                raise ValueError(f"{what}: keep texts as keys, and lists")
    return found


def prepared(header: Header, model: nn.Module | None) -> nn.Module:
    """The model to fill, with modules and extra state, after all that the header says was held
    against it, or against a skeleton that takes no memory."""
    shown = _skeleton(header) if model is None else model
    with torch.device("meta"):
        modules = {name: _quantizer(stated) for name, stated in header.modules.items()}
    kinds = (nn.Identity, *ACTIVATION_MODULES.values())
    for name in modules:
        path, _, leaf = name.rpartition(".")
        holder = shown.get_submodule(path)
        if not isinstance(holder._modules.get(leaf), kinds) and (not leaf or hasattr(holder, leaf)):
            raise ArtifactError(f"the model has no place for a quantizer at {name!r}")
    for name in header.extra.keys() ^ extra_state(shown).keys():
        raise ArtifactError(f"extra state of {name!r} is in one of file and model only")
    _check_tensors(header, shown, modules)
    for name, buffer in () if model is None else model.named_buffers():
        if buffer.is_meta:
            advice = "make the model within kit.artifact.without_values()"
            raise ArtifactError(f"buffer {name!r} is on the meta device, without values: {advice}")
    if model is None:
        with torch.random.fork_rng(devices=[]), without_values():
            model = build_model(header.model.kind, header.model.config)
    for name, stated in header.modules.items():
        model.set_submodule(name, _quantizer(stated))
    for name, state in header.extra.items():
        model.get_submodule(name).set_extra_state(state)
    return model


@contextmanager
def without_values() -> Iterator[None]:
    """Parameters that this thread gives to modules are on the meta device, and take no memory until
    `load` fills the model. Other threads that want the same wait.

    >>> with without_values():
    ...     model = nn.Linear(50_000, 50_000)
    """
    here = threading.get_ident()

    def register(module, name, parameter):
        if parameter is not None and not parameter.is_meta and threading.get_ident() == here:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        REGISTER(module, name, parameter)

    with BUILDING, patch.object(nn.Module, "register_parameter", register):
        yield


def _quantizer(stated: dict) -> nn.Module:
    """The activation quantizer that the header states: a class of the kit's and its settings."""
    made = ACTIVATION_MODULES[stated["class"]](**{k: v for k, v in stated.items() if k != "class"})
    if json.dumps({"class": stated["class"], **made.settings()}) != json.dumps(stated):
        raise ArtifactError(f"{stated} are not the settings of a {stated['class']}")
    return made


class _Calls(TorchFunctionMode):
    """Ends the building of a model that calls torch more often than its tensors can need, and
    writes to none of them, as a skeleton holds no values."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.left -= 1
        if self.left < 0:
            raise ArtifactError("its config describes more layers than it holds tensors of")
        name, options = getattr(function, "__name__", ""), options or {}
        if name.endswith("_") and not name.endswith("__"):
            return (*arguments, *options.values())[0]
        return function(*arguments, **options)


def _skeleton(header: Header) -> nn.Module:
    """The kit's own model of the header, on the meta device. No size in its config can exceed the
    entries of its tensors, and these not by far the bytes that are there."""
    if header.model is None:
        raise ArtifactError("it holds a model that is not the kit's: pass load(path, model=...)")
    entries = sum(math.prod(entry.shape) for entry in header.tensors)
    held = sum(size for entry in header.tensors for size in entry.sizes)
    if entries > MOST + SPARSEST * held:
        much = f"{entries:,} entries in {held:,} bytes"
        raise ArtifactError(f"{much} are hardly a model: pass load(path, model=...) if they are")
    for name, value in header.model.config.items():
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and size > entries:
                raise ArtifactError(f"its config has {name} = {value} for {entries:,} entries")
    grad = torch.set_grad_enabled(torch.is_grad_enabled())  # stays, wherever the building ends
    with grad, torch.device("meta"), _Calls(100 * (len(header.tensors) + 10)):
        return build_model(header.model.kind, header.model.config)


def _check_tensors(header: Header, model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Raises ArtifactError unless the file has the tensors of the model and these modules."""
    inside = tuple(f"{name}." for name in modules)
    targets = {k: v for k, v in targets_of(model).items() if not k.startswith(inside)}
    targets |= {f"{k}.{name}": b for k, m in modules.items() for name, b in m.named_buffers()}
    stored = {entry.name: entry for entry in header.tensors}
    if len(stored) < len(header.tensors):
        raise ArtifactError("it has two tensors of one name")
    for name in stored.keys() ^ targets.keys():
        here, there = ("file", "model") if name in stored else ("model", "file")
        where = f"in the {here} but not in the {there}"
        advice = "make the model as the saved one was: config, pruning, quick_quantize"
        raise ArtifactError(f"it does not fit: {name!r} is {where}; {advice}")
    for name, target in targets.items():
        tensor, entry = target.original if isinstance(target, Weight) else target, stored[name]
        ours = _name(tensor.dtype), list(tensor.shape)
        theirs = entry.dtype or ours[0], entry.shape
        if ours != theirs:
            kinds = "{} of shape {}, the model expects {} of shape {}".format(*theirs, *ours)
            resized = theirs[1] != ours[1]
            advice = "make it of the saved one's sizes" if resized else "convert it first"
            raise ArtifactError(f"it holds {name!r} as {kinds}: {advice}")
