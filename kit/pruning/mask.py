"""Masks as parametrizations: a pruned weight is `where(mask, weight, 0)`, on any tensor of any module.

The stored weight keeps its identity (optimizers go on holding it), its gradient is zero where the mask is, and a fake
quantizer registered on the same tensor, before or after, always sees the masked weight.
"""

import copy
import difflib
import fnmatch
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Mask(nn.Module):
    """Parametrization that keeps the entries of a weight where `mask` (bool, shape of the weight) is true."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Slot:
    """One trainable tensor of a model and every place `(module, attribute)` that reads it (several if it is tied)."""

    def __init__(self, name: str, places: list[tuple[nn.Module, str]]) -> None:
        self.name, self.places = name, places

    @property
    def parameter(self) -> nn.Parameter:
        """The stored tensor, before any mask or quantizer."""
        return original(*self.places[0])

    @property
    def mask(self) -> Tensor:
        """Bool tensor, all true where nothing is pruned."""
        mask = get_mask(*self.places[0])
        return torch.ones_like(self.parameter, dtype=torch.bool) if mask is None else mask

    def set_mask(self, mask: Tensor) -> None:
        for module, name in self.places:
            set_mask(module, name, mask)


def original(module: nn.Module, name: str) -> nn.Parameter:
    """The stored tensor behind `module.<name>`, whether or not it carries parametrizations."""
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original
    return getattr(module, name)


def get_mask(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The bool mask on `module.<name>`, or None if it has none."""
    found = _find(module, name)
    return None if found is None else found.mask


def set_mask(module: nn.Module, name: str, mask: Tensor) -> nn.Module:
    """Put `mask` (bool, true = keep) on `module.<name>`, in front of any other parametrization; returns the module.

    A mask that is there already is overwritten in place.

    Raises:
        ValueError: no such tensor, not a bool mask, or another shape than the tensor.
    """
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{type(module).__name__} has no tensor {name!r} to mask")
    if mask.dtype != torch.bool or mask.shape != tensor.shape:
        raise ValueError(f"a mask of {name!r} must be bool of shape {tuple(tensor.shape)}, "
                         f"not {mask.dtype} of shape {tuple(mask.shape)}")
    mask = mask.to(tensor.device)
    found = _find(module, name)
    if found is not None:
        found.mask.copy_(mask)
    elif parametrize.is_parametrized(module, name):
        module.parametrizations[name].insert(0, Mask(mask))
    else:
        parametrize.register_parametrization(module, name, Mask(mask))
    return module


def remove_masks(model: nn.Module) -> nn.Module:
    """Forget every mask of the model, in place; the stored weights become dense again with the values they hold."""
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})) if parametrize.is_parametrized(module) else ():
            chain = module.parametrizations[name]
            kept = [step for step in chain if not isinstance(step, Mask)]
            if not kept:
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            elif len(kept) < len(chain):
                chain.pop(0)
    return model


def select(model: nn.Module, tensors: str | Iterable[str] = "*", min_dim: int = 2) -> dict[str, Slot]:
    """Floating-point parameters with at least `min_dim` dimensions whose name matches a glob pattern.

    Args:
        tensors: one pattern or several, on names such as `layers.0.moe.w_in` (as in `named_parameters()` of the model
            without parametrizations). Tied tensors appear once, under their first name, and match by any of them.

    Raises:
        ValueError: a pattern that matches nothing; the message names tensors that exist.
    """
    patterns = [tensors] if isinstance(tensors, str) else list(tensors)
    aliases: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for full_name, module, name in _places(model):
        parameter = original(module, name)
        if parameter.is_floating_point() and parameter.dim() >= min_dim:
            aliases.setdefault(id(parameter), []).append((full_name, module, name))
    names = [full_name for group in aliases.values() for full_name, _, _ in group]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:5]
            raise ValueError(f"no tensor matches {pattern!r}; there are {', '.join(near) or 'none to prune'}"
                             + (f" and {len(names) - len(near)} more" if len(names) > len(near) else ""))
    return {group[0][0]: Slot(group[0][0], [(module, name) for _, module, name in group])
            for group in aliases.values()
            if any(fnmatch.fnmatchcase(full_name, p) for full_name, _, _ in group for p in patterns)}


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, even when modules hold computed tensors (recurrent layers cache their weights, MoE its loss)."""
    held = [value for module in model.modules() for entry in vars(module).values()
            for value in (entry if isinstance(entry, list) else [entry])]
    return copy.deepcopy(model, {id(value): value.detach() for value in held
                                 if isinstance(value, Tensor) and not value.is_leaf})


def _find(module: nn.Module, name: str) -> Mask | None:
    if not parametrize.is_parametrized(module, name):
        return None
    return next((step for step in module.parametrizations[name] if isinstance(step, Mask)), None)


def _places(model: nn.Module):
    inside = {id(part) for module in model.modules() if parametrize.is_parametrized(module)
              for part in module.parametrizations.modules()}
    for prefix, module in model.named_modules():
        if id(module) in inside:
            continue
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        if parametrize.is_parametrized(module):
            names += [name for name, chain in module.parametrizations.items() if chain.is_tensor]
        for name in names:
            yield f"{prefix}.{name}" if prefix else name, module, name
