"""Masks as parametrizations: a pruned weight is `where(mask, weight, 0)`, on any tensor of any module.

The stored weight keeps its identity (optimizers go on holding it), its gradient is zero where it is masked,
and a fake quantizer on the same tensor, registered before or after, sees the masked weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kit.core.steps import Step, register_step
from kit.core.weights import copy_model, find_step, matching, named_weights, original_of, set_steps, steps_of
from kit.quantization.fake import matrix_shape


@register_step("mask")
class Mask(Step):
    """Parametrization that keeps the entries of a weight where `mask` (bool, shape of the weight) is true."""

    mask: Tensor
    rank, projection = 0, True

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
    def decode(cls, entry: dict, read, weight, stored: Tensor, parts):
        return cls(read.tensor(stored.shape, torch.bool) if entry else stored != 0), None

    def resized(self, select, before: Tensor):
        return Mask(select(self.mask))


def get_mask(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The bool mask on `module.<name>`, or None if it has none."""
    step = find_step(module, name, Mask)
    return None if step is None else step.mask


def set_mask(module: nn.Module, name: str, mask: Tensor, model: nn.Module | None = None) -> nn.Module:
    """Put `mask` (bool, true = keep) on `module.<name>`, before other parametrizations; returns the module.

    A mask that is there already is overwritten in place. Give `model` to mask a tied tensor everywhere.

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
    present = get_mask(module, name)
    if present is not None:
        present.copy_(mask)
    else:
        set_steps(model or module, module, name, [Mask(mask), *steps_of(module, name)])
    return module


def remove_masks(model: nn.Module) -> nn.Module:
    """Forget every mask of the model, in place; the weights are dense again, with the values stored."""
    for _, module, name in list(named_weights(model)):
        steps = steps_of(module, name)
        if any(isinstance(step, Mask) for step in steps):
            set_steps(model, module, name, [step for step in steps if not isinstance(step, Mask)])
    return model


@dataclass(frozen=True)
class Slot:
    """One trainable tensor of a model: where it lives, what it holds, its mask."""

    model: nn.Module
    module: nn.Module
    attribute: str
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The stored tensor, before any mask or quantizer."""
        return original_of(self.module, self.attribute)

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the parameter's shape, all true where nothing is pruned."""
        mask = get_mask(self.module, self.attribute)
        return torch.ones_like(self.parameter, dtype=torch.bool) if mask is None else mask

    def matrix(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the weight's shape, as (rows, columns): a row holds what feeds one output."""
        return tensor.reshape(matrix_shape(self.module, tensor.shape))

    def stack(self, tensor: Tensor) -> Tensor:
        """`tensor` as (groups, rows, columns), a group for each set of inputs (expert, convolution group)."""
        matrix = self.matrix(tensor)
        groups = getattr(self.module, "groups", self.parameter.shape[0] if self.parameter.dim() == 3 else 1)
        return matrix.unflatten(0, (groups, -1))

    def set_mask(self, mask: Tensor) -> None:
        """Mask the tensor, everywhere the model reads it."""
        set_mask(self.module, self.attribute, mask.view_as(self.parameter), self.model)


def select(model: nn.Module, tensors: str | Iterable[str] = "*") -> dict[str, Slot]:
    """Floating-point weights of two or more dimensions whose dotted name matches a shell pattern, by name.

    The stacked biases of experts (`b_in`, `b_out`) are no weights.

    Raises:
        ValueError: a pattern that matches nothing; the message names the weights there are.
    """
    patterns = [tensors] if isinstance(tensors, str) else list(tensors)
    slots = {name: Slot(model, module, attribute, name)
             for name, module, attribute in matching(model, patterns)}
    chosen = {name: slot for name, slot in slots.items() if slot.parameter.is_floating_point()
              and slot.parameter.dim() >= 2 and not slot.attribute.startswith(("b_", "bias"))}
    if not chosen:
        raise ValueError(f"no weight of two or more dimensions matches {', '.join(patterns)!r}: there is "
                         f"only {', '.join(slots) or 'nothing to prune'}")
    return chosen
