"""Masks: a pruned weight is `where(mask, weight, 0)`, on any tensor of any module.

The trained weight keeps its identity (optimizers go on holding it), its gradient is zero where it is
masked, and a quantizer on the same tensor sees the masked weight.
"""

import torch
from torch import Tensor, nn

from kit.core.steps import Step, register_step
from kit.core.weights import Weight, weight_of


@register_step("mask")
class Mask(Step):
    """Keeps the entries of a weight where `mask` (bool, shape of the weight) is true."""

    rank, projection = 0, True
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)

    def encode(self, x: Tensor, stored: Tensor, write) -> dict:
        if torch.equal(self.mask, stored != 0):
            return {}
        write.tensor(self.mask)
        return {"explicit": 1}

    @classmethod
    def decode(cls, entry: dict, read, weight: Weight, stored: Tensor, parts) -> tuple["Mask", None]:
        return cls(read.tensor(stored.shape, torch.bool) if "explicit" in entry else stored != 0), None

    def resized(self, select, before: Tensor) -> "Mask":
        return Mask(select(self.mask))


def mask_of(weight: Weight) -> Tensor:
    """Bool tensor of the weight's shape, all true where nothing is pruned."""
    step = weight.find(Mask)
    return torch.ones_like(weight.original, dtype=torch.bool) if step is None else step.mask


def put_mask(weight: Weight, mask: Tensor) -> None:
    """Masks a weight wherever the model reads it; a mask that is there already is overwritten in place.

    Raises ValueError for a weight that stands in another order or basis than its values.
    """
    mask, present = mask.view_as(weight.original).to(weight.original.device), weight.find(Mask)
    if present is not None:
        present.mask.copy_(mask)
        return
    check_maskable(weight)
    weight.put(Mask(mask))


def check_maskable(weight: Weight) -> None:
    """Raises ValueError for a weight whose entries are not those of what it computes."""
    transform = next((step for step in weight.steps if isinstance(step, Step) and step.rank > 10), None)
    if transform is not None:
        raise ValueError(f"{weight.name!r} carries a {transform.kind} step: mask it before that, or leave it out")


def get_mask(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The bool mask on `module.<name>`, or None if it has none."""
    step = weight_of(module, name).find(Mask)
    return None if step is None else step.mask


def set_mask(module: nn.Module, name: str, mask: Tensor, model: nn.Module | None = None) -> nn.Module:
    """Puts `mask` (bool, true = keep) on `module.<name>`, before other steps; returns the module.

    Give `model` to mask a tied tensor everywhere. Raises ValueError: no such tensor, not a bool mask, or
    another shape than the tensor.
    """
    weight = weight_of(module, name, model)
    shape = tuple(weight.original.shape)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"a mask of {name!r} must be bool of shape {shape}, not {mask.dtype} of {tuple(mask.shape)}")
    put_mask(weight, mask)
    return module
