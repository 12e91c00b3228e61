"""Fake quantization of weights: a parametrization that rounds in the forward pass and is straight-through behind."""

import math
from collections.abc import Mapping
from fnmatch import fnmatch

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from kit.core.weights import (bake, find_step, matching, named_weights, original_of, set_steps, steps_of,
                                 weight_matrices)
from kit.quantization import formats
from kit.quantization.formats import Format


FIRST_STEP = 1 / 4  # a power of two, as any other should be, so that units are exact


def matrix_shape(module: nn.Module, shape: torch.Size) -> tuple[int, int]:
    """How a weight is viewed as (rows, columns): a convolution's row is one output channel, any other tensor's row
    runs along its last dimension (so each expert's output unit of an (E, out, in) stack is a row); a vector is a row.
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    rows = shape[0] if isinstance(module, _ConvNd) else math.prod(shape[:-1])
    return rows, math.prod(shape) // rows if rows else 0


class FakeQuantize(nn.Module):
    """Parametrization: weight -> the nearest values of `format`, same shape and dtype; gradients straight through.

    A "minmax" range follows the weight at every step. "percentile" and "mse" ranges are fixed from `weight` when
    the quantizer is made, because searching at each step is slow. With `learned` the step starts there and is trained
    (LSQ, arXiv:1902.08153), as |scale| * unit with scale at first `first_step`, because optimizers like Adam move a parameter
    by the learning rate however small it is: an INT8 step of 0.001 would be gone at once.

    Args:
        weight: the tensor to be quantized, which fixes shape and ranges.
        shape: (rows, columns) to view it as.
        first_step: the larger, the slower a learned step moves.
    Raises ValueError when the weight is complex, NaN or infinite.
    """

    def __init__(self, weight: Tensor, shape: tuple[int, int], format: Format, learned: bool = False,
                 first_step: float = FIRST_STEP):
        super().__init__()
        formats.check_weights(weight, "weight")
        self.format, self.shape, self.first_step = format, shape, first_step
        self.learned = learned and format.bits != 16
        scale = zero = None
        if format.bits != 16 and (self.learned or format.range != "minmax"):
            scale, zero = formats.choose_grid(self.blocks(weight, fill=math.nan), format)
        self.register_buffer("zero", zero)
        if self.learned:
            self.register_buffer("unit", scale / first_step)
            self.scale = nn.Parameter(torch.full_like(scale, first_step))
        else:
            self.register_buffer("scale", scale)

    def blocks(self, weight: Tensor, fill: float = 0.0) -> Tensor:
        """The weight as (blocks, length), a block a scale."""
        return formats.to_blocks(weight.reshape(self.shape), self.format, fill)

    def spread(self, part: Tensor) -> Tensor:
        """A scale or zero point (blocks, 1) as (rows, columns): the one of each weight."""
        length = self.blocks(part.new_empty(()).expand(self.shape)).shape[1]
        return formats.from_blocks(part.expand(-1, length), self.shape, self.format)

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale (blocks, 1), exactly as the artifact stores it, and zero point (blocks, 1) or None."""
        if self.scale is None:
            return formats.choose_grid(self.blocks(weight), self.format)
        if not self.learned:
            return self.scale, self.zero
        step = self.scale.abs() * self.unit
        return formats.round_scale(step.detach(), self.format.scale) + (step - step.detach()), self.zero

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero: Tensor | None = None) -> None:
        """Overwrites a fixed or learned grid, or fixes one that followed the weight; both of shape (blocks, 1)."""
        scale = formats.round_scale(scale, self.format.scale)
        if self.scale is None:
            self.scale, self.zero = scale, zero
            return
        if self.learned:
            self.unit.copy_(scale / self.first_step)
            scale = self.first_step
        self.scale.copy_(torch.as_tensor(scale))
        if zero is not None:
            self.zero.copy_(zero)

    def forward(self, weight: Tensor) -> Tensor:
        if self.format.bits == 16:
            return _half(weight)
        scale, zero = self.grid(weight)
        blocks = self.blocks(weight)
        gradient = 1 / math.sqrt(max(blocks.shape[1], 1) * self.format.qmax) if self.learned else 0.0
        values = formats.fake_quantize(blocks.float(), scale, zero, self.format, gradient)
        return formats.from_blocks(values, self.shape, self.format).reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes int8 (rows, columns), scale and zero point (blocks, 1): what `forward` multiplies out again."""
        scale, zero = self.grid(weight)
        codes = formats.quantize(self.blocks(weight), scale, zero, self.format)
        return formats.from_blocks(codes, self.shape, self.format), scale.detach(), zero


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


_half = _Half.apply


def quantize_weights(model: nn.Module, plan: Format | Mapping[str, Format | None], learned: bool = False) -> nn.Module:
    """Fake-quantizes weights of the model, in place, and returns it.

    plan: one format for every weight of two or more dimensions (stacked biases are none), or shell patterns of dotted
        names to formats, of which a weight takes the first that matches (None: leave it in float32).
    A weight that is quantized already gets the new format; masks stay in front.
    Raises ValueError for a pattern without a match and for weights that are not finite.

    >>> model = quantize_weights(nn.Sequential(nn.Linear(8, 4)), Format(4, granularity="group", group_size=4))
    >>> len(model[0].weight.unique()) <= 16 * 8
    True
    """
    if isinstance(plan, Format):
        chosen = [(w, plan) for w in weight_matrices(model)]
    else:
        weights = matching(model, plan)
        chosen = [(w, next(f for p, f in plan.items() if fnmatch(w[0], p))) for w in weights]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no weight to quantize: expected parameters of two or more "
                         "dimensions")
    for (name, module, attribute), _ in chosen:
        formats.check_weights(original_of(module, attribute), name)
    for (name, module, attribute), format in chosen:
        keep = [step for step in steps_of(module, attribute) if not isinstance(step, FakeQuantize)]
        set_steps(model, module, attribute, keep)
        if format is not None:
            weight = getattr(module, attribute).detach()
            step = FakeQuantize(weight, matrix_shape(module, weight.shape), format, learned)
            set_steps(model, module, attribute, [*keep, step])
    return model


def seen_by(quantizer: FakeQuantize, module: nn.Module, attribute: str) -> Tensor:
    """The tensor that a fake quantizer rounds: the trained values after the steps before it, such as a mask."""
    weight = original_of(module, attribute)
    for step in steps_of(module, attribute):
        if step is quantizer:
            return weight
        weight = step(weight)
    raise ValueError(f"{type(module).__name__}.{attribute} does not carry this quantizer: take it from find_step")


def quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """The fake quantizer of each quantized weight, by dotted name."""
    found = {name: find_step(module, attribute, FakeQuantize) for name, module, attribute in named_weights(model)}
    return {name: step for name, step in found.items() if step is not None}


remove_compression = bake
