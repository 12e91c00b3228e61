"""Compression as parametrization: any tensor of any module may carry a mask, a quantizer, or both in that
order.

torch.nn.utils.parametrize keeps the trained values under `original` and computes the compressed tensor on
access. This file adds what compression needs on top: the order of the steps, tensors shared by several
modules, and recurrent layers, whose cached weight list would otherwise go stale.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch

import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(dotted name, module, attribute) of every parameter, under the names of the uncompressed model.

    A parameter shared by several modules is named once, by the first. The order does not depend on what
    is parametrized.
    """
    seen = set()
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        for attribute in sorted({*module._parameters, *getattr(module, "parametrizations", {})}):
            original = original_of(module, attribute)
            if original is None or id(original) in seen:
                continue
            seen.add(id(original))
            yield (f"{path}.{attribute}" if path else attribute), module, attribute


def weight_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Those of `named_weights` with two or more dimensions; the stacked biases of experts (`b_in`, `b_out`) are none."""
    for name, module, attribute in named_weights(model):
        if original_of(module, attribute).ndim >= 2 and not attribute.startswith(("b_", "bias")):
            yield name, module, attribute


def original_of(module: nn.Module, attribute: str) -> nn.Parameter:
    """The trained values behind a tensor, parametrized or not."""
    if parametrize.is_parametrized(module, attribute):
        return module.parametrizations[attribute].original
    return module._parameters[attribute]


def steps_of(module: nn.Module, attribute: str) -> list[nn.Module]:
    """The parametrizations on a tensor, in order of application; empty when it has none."""
    return list(module.parametrizations[attribute]) if parametrize.is_parametrized(module, attribute) else []


def find_step(module: nn.Module, attribute: str, kind: type) -> nn.Module | None:
    return next((step for step in steps_of(module, attribute) if isinstance(step, kind)), None)


def gradients(model: nn.Module, batches: Iterable, loss: Callable) -> Iterator[dict[str, Tensor]]:
    """For each batch the gradients of loss(model, batch) in the trained values of every weight that has one, by dotted
    name; the model's own gradients are cleared before and after."""
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        found = {name: original_of(module, attribute).grad for name, module, attribute in named_weights(model)}
        model.zero_grad(set_to_none=True)
        yield {name: grad for name, grad in found.items() if grad is not None}


def set_steps(model: nn.Module, module: nn.Module, attribute: str, steps: list[nn.Module]) -> None:
    """Replaces the parametrizations of a tensor, wherever in `model` that tensor is shared, keeping
    trained values.
    """
    original = original_of(module, attribute)
    holders = [(m, a) for m in list(model.modules()) if not isinstance(m, parametrize.ParametrizationList)
               for a in [*m._parameters, *getattr(m, "parametrizations", {})] if original_of(m, a) is original]
    for holder, name in holders:
        _own_class(holder)
        if parametrize.is_parametrized(holder, name):
            parametrize.remove_parametrizations(holder, name, leave_parametrized=False)
        for step in steps:
            parametrize.register_parametrization(holder, name, step, unsafe=True)
        if isinstance(holder, nn.RNNBase):
            if not hasattr(holder, "_weight_hooks"):
                holder._weight_hooks = (holder.register_forward_pre_hook(_read_weights),
                                        holder.register_forward_hook(_forget_weights))
            _forget_weights(holder)


def _own_class(module: nn.Module) -> None:
    """torch puts properties on the module's generated class, or takes them off, and copies share that
    class: part them.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)


def _read_weights(module: nn.RNNBase, *_) -> None:
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _forget_weights(module: nn.RNNBase, *_) -> None:
    """Computed weights belong to one forward pass; kept, they would also forbid copying the model."""
    module._flat_weights = [None] * len(module._flat_weights_names)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with the model; tensors that modules computed and hold leave their
    graph behind.
    """
    held = [value for module in model.modules() for entry in vars(module).values()
            for value in (entry if isinstance(entry, list) else [entry])]
    computed = {id(value): value.detach() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    copied = copy.deepcopy(model, computed)
    for module in copied.modules():
        _own_class(module)
    return copied


def bake(model: nn.Module) -> nn.Module:
    """A copy of the model with every parametrization replaced by the tensor it computes."""
    model = copy_model(model)
    for module in list(model.modules()):
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for attribute in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        if hasattr(module, "_weight_hooks"):
            for hook in module._weight_hooks:
                hook.remove()
            del module._weight_hooks
            _read_weights(module)
    return model


def matching(model: nn.Module, patterns) -> list[tuple[str, nn.Module, str]]:
    """The weights whose dotted name matches any of the shell patterns, in model order.

    Raises ValueError for a pattern that matches nothing, naming what there is.
    """
    weights = list(named_weights(model))
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name, _, _ in weights):
            names = ", ".join(name for name, _, _ in weights)
            raise ValueError(f"no weight is named {pattern!r}: this model has {names}")
    return [w for w in weights if any(fnmatch(w[0], p) for p in patterns)]
