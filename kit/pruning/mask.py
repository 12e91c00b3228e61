"""Masks: a pruned weight is `where(mask, weight, 0)`, on any tensor of any module.

The trained weight keeps its identity (optimizers go on holding it), its gradient is zero where it
is masked, and a quantizer on the same tensor sees the masked weight.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kit.core.steps import Step, Stored, register_step
from kit.core.weights import Weight, weight_of


@register_step("mask")
class Mask(Step):
    """Keeps the entries of a weight where `mask` (bool, shape of the weight) is true."""

    class settings(Stored):
        explicit: Literal[0, 1, 2] = 0  # zeros tell it; it is stored; it is, of the zeros alone

    rank, projection = 0, True

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)

    def encode(self, x: Tensor, stored: Tensor, write) -> dict:
        _check_zeros(stored, self.mask)
        if not (kept := self.mask[stored == 0]).any():
            return {}
        write.tensor(kept[:, None])  # a column: the coder adapts along it
        return {"explicit": 2}

    @classmethod
    def decode(cls, entry: dict, read, weight: Weight, stored: Tensor, parts) -> tuple:
        mask = stored != 0
        if entry.explicit == 1:
            mask = read.tensor(stored.shape, torch.bool)
        elif entry.explicit == 2:
            mask[~mask] = read.tensor((int((~mask).sum()), 1), torch.bool)[:, 0]
        _check_zeros(stored, mask)
        return cls(mask), None

    def resized(self, select, before: Tensor) -> "Mask":
        return Mask(select(self.mask))


def _check_zeros(stored: Tensor, mask: Tensor) -> None:
    rest = stored[~mask]
    if (rest != 0).any() or (rest.is_floating_point() and rest.signbit().any()):
        raise ValueError("entries that are masked are not zero")


def mask_of(weight: Weight) -> Tensor:
    """Bool tensor of the weight's shape, all true where nothing is pruned."""
    step = weight.find(Mask)
    return torch.ones_like(weight.original, dtype=torch.bool) if step is None else step.mask


def put_mask(weight: Weight, mask: Tensor) -> None:
    """Masks a weight wherever the model reads it; a mask that is there is overwritten in place.
    Raises ValueError as `check_prunable`."""
    check_prunable(weight)
    present = weight.find(Mask)
    if present is None:
        weight.put(Mask(mask.to(weight.original.device)))
    else:
        present.mask.copy_(mask)


def check_prunable(weight: Weight) -> None:
    """Raises ValueError for a weight that is kept in another order or basis than it is used in."""
    for step in weight.steps:
        if isinstance(step, Step) and step.rank > 10:
            what = f"{weight.name!r} carries a {step.kind} step"
            raise ValueError(f"{what}: prune or rewind it before that, or leave it out")


def get_mask(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The bool mask on `module.<name>`, or None if it has none."""
    step = weight_of(module, name).find(Mask)
    return None if step is None else step.mask


def set_mask(
    module: nn.Module, name: str, mask: Tensor, model: nn.Module | None = None
) -> nn.Module:
    """Puts `mask` (bool, true: keep) before the other steps of `module.<name>`; returns it.

    model: in all of which a tied tensor is to be masked. Raises ValueError: no such tensor, no mask
    of its shape, or as `check_prunable`.
    """
    weight = weight_of(module, name, model)
    shape, given = tuple(weight.original.shape), tuple(mask.shape)
    if mask.dtype != torch.bool or given != shape:
        said = f"a mask of {name!r} must be bool of shape {shape}, not {mask.dtype} {given}"
        raise ValueError(said)
    put_mask(weight, mask)
    return module
