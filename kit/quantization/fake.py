"""Fake quantization of weights: a step that rounds forward, and is straight-through back."""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatch

import torch
import torch.nn as nn
from torch import Tensor

from kit.core.steps import Step, Stored, register_step, without_cast
from kit.core.weights import MatrixView, Weight, column_view, matrix_view, weights
from kit.quantization import formats
from kit.quantization.formats import DEFAULT, Format

FIRST_STEP = 1 / 4  # a power of two, as any other should be, so that units are exact


@register_step("fake_quantize")
class FakeQuantize(Step):
    """Weight -> the nearest values of `format`, same shape and dtype; gradients straight through.

    A "minmax" range follows the weight at every step; "percentile" and "mse", slow to find, are
    fixed from `weight`. With `learned` the step size starts there and is trained (LSQ,
    arXiv:1902.08153), as |scale| * unit with scale at first `first_step`, for optimizers like Adam
    move a parameter by the learning rate however small it is.

    Args:
        weight: the tensor to be quantized, which fixes shape and ranges.
        view: how it is seen as a matrix; by default its rows run along the last dimension.
        first_step: the larger, the slower a learned step size moves.
        qparams: scale and zero point (blocks, 1), to be kept instead of finding a range.
    Raises ValueError when the weight is complex, NaN or infinite.
    """

    class settings(Stored):
        format: dict = {}  # the fields that are not the default's
        rows: int = 0  # of the view, negative if transposed; 0 for the natural one
        learned: float = 0  # first_step
        fixed: int = 0  # 1: a range that does not follow the weight

    rank, projection, carries = 10, True, True

    def __init__(
        self, weight: Tensor, format: Format, view: MatrixView | None = None, learned: bool = False,
        first_step: float = FIRST_STEP, qparams: tuple[Tensor, Tensor | None] | None = None,
    ):  # fmt: skip
        super().__init__()
        formats.check_weights(weight, "weight", format)
        self.format, self.view = format, view or matrix_view(weight.shape)
        self.first_step, self.learned = first_step, learned and format.bits != 16
        if qparams is None and format.bits != 16 and (self.learned or format.range != "minmax"):
            qparams = formats.choose_qparams(self.blocks(weight, fill=math.nan), format)
        scale, zero = qparams or (None, None)
        if scale is not None:
            scale = formats.round_scale(scale, format.scale)
        self.register_buffer("zero", zero)
        if self.learned:
            self.register_buffer("unit", scale / first_step)
            self.scale = nn.Parameter(torch.full_like(scale, first_step))
        else:
            self.register_buffer("scale", scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight as a matrix."""
        return self.view.rows, self.view.columns

    def blocks(self, weight: Tensor, fill: float = 0.0) -> Tensor:
        """The weight as (blocks, length), a block a scale."""
        return formats.to_blocks(self.view.matrix(weight), self.format, fill)

    def spread(self, part: Tensor) -> Tensor:
        """A scale or zero point (blocks, 1) as (rows, columns): the one of each weight."""
        length = self.blocks(part.new_empty(()).expand(self.view.shape)).shape[1]
        return formats.from_blocks(part.expand(-1, length), self.shape, self.format)

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale, exactly as the artifact stores it, and zero point or None; both (blocks, 1)."""
        if self.scale is None:
            return formats.choose_qparams(self.blocks(weight), self.format)
        if not self.learned:
            return self.scale, self.zero
        step = self.scale.abs() * self.unit
        rounded = formats.round_scale(step.detach(), self.format.scale)
        return rounded + (step - step.detach()), self.zero

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero: Tensor | None = None) -> None:
        """Overwrites scale and zero point (blocks, 1), or fixes those that followed the weight."""
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FakeQuantize":
        """A cast of the model leaves scales as files hold them."""
        return super()._apply(without_cast(fn), recurse)

    def forward(self, weight: Tensor) -> Tensor:
        if self.format.bits == 16:
            return formats.round_half(weight)
        scale, zero = self.qparams(weight)
        blocks = self.blocks(weight)
        length = max(blocks.shape[1], 1)
        gradient = 1 / math.sqrt(length * self.format.qmax) if self.learned else 0.0
        values = formats.fake_quantize(blocks.float(), scale, zero, self.format, gradient)
        matrix = formats.from_blocks(values, self.shape, self.format)
        return self.view.tensor(matrix).to(weight.dtype)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes `format.integer` (rows, columns), scale and zero point (blocks, 1)."""
        scale, zero = self.qparams(weight)
        codes = formats.quantize(self.blocks(weight), scale, zero, self.format)
        return formats.from_blocks(codes, self.shape, self.format), scale.detach(), zero

    def encode(self, x: Tensor, stored: Tensor, write) -> dict:
        entry = {"format": self.format.changes()} if self.format != DEFAULT else {}
        natural = matrix_view(stored.shape)
        if self.view.rows != natural.rows or self.view.transposed:
            entry["rows"] = -self.view.rows if self.view.transposed else self.view.rows
        if self.format.bits == 16:
            write.tensor(stored.half())
            return entry
        if self.learned:
            entry["learned"] = self.first_step
        elif self.format.range == "minmax" and not self._follows(stored, self.qparams(x)):
            entry["fixed"] = 1
        codes, scale, zero = (None if t is None else t.cpu() for t in self.codes(x))
        for part in formats.stored_scale(scale, self.format.scale):
            write.tensor(part)
        if zero is not None:
            write.tensor(zero.to(self.format.integer))
            zero = self.spread(zero).to(torch.int32)
        write.codes(codes, self.format.bits, zero)
        return entry

    @classmethod
    def decode(
        cls, entry, read, weight: Weight, stored: None, parts
    ) -> tuple["FakeQuantize", Tensor]:
        format, view = Format(**entry.format), _stored_view(entry.rows, weight)
        dtype = weight.original.dtype
        if format.bits == 16:
            value = read.tensor(view.shape, torch.float16).to(dtype)
            return cls(value, format, view), value
        count = formats.block_count((view.rows, view.columns), format)
        parts = [read.tensor(*part) for part in formats.stored_shapes(count, format.scale)]
        scale, zero = formats.restored_scale(parts, format.scale), None
        if not format.symmetric:
            zero = read.tensor((count,), format.integer).float()[:, None]
        learned, qparams = entry.learned, (scale, zero)
        made = cls(torch.zeros(()), format, view, bool(learned), learned or FIRST_STEP, qparams)
        inside = zero is None or torch.equal(zero.clamp(format.qmin, format.qmax), zero)
        if not inside or not torch.equal(made.qparams(scale)[0], scale):
            raise ValueError(f"its scales or zero points are none of {format}")
        origin = None if zero is None else made.spread(zero).to(torch.int32)
        blocks = formats.to_blocks(read.codes(made.shape, format.bits, origin), format)
        blocks = formats.dequantize(blocks, scale, zero)
        value = view.tensor(formats.from_blocks(blocks, made.shape, format)).to(dtype)
        if format.range == "minmax" and not learned and not entry.fixed:
            made.scale = made.zero = None
            if not made._follows(value, qparams):
                made.scale, made.zero = qparams
        return made, value

    def _follows(self, stored: Tensor, qparams: tuple[Tensor, Tensor | None]) -> bool:
        """Whether the range follows the weight, and that of its stored value is `qparams`."""
        if self.scale is not None:
            return False
        found = self.qparams(stored)
        return all(a is b or torch.equal(a, b) for a, b in zip(found, qparams))

    def resized(self, select, before: Tensor) -> "FakeQuantize":
        view = self.view.like(before.shape)
        if self.scale is None:
            return type(self)(before, self.format, view)

        parts = [self.scale, self.zero, self.unit if self.learned else None]
        for i, part in enumerate(parts):
            if part is None:
                continue
            spread = view.matrix(select(self.view.tensor(self.spread(part.detach()))))
            blocks = formats.to_blocks(spread, self.format, math.nan)
            parts[i] = blocks[:, :1].clone()
            if not ((blocks == parts[i]) | blocks.isnan()).all():
                # entries that shared no scale have come to share one: its range is found anew
                return type(self)(before, self.format, view, self.learned, self.first_step)
        scale, zero, unit = parts
        qparams = (scale if unit is None else scale * unit, zero)
        made = type(self)(before, self.format, view, self.learned, self.first_step, qparams)
        if self.learned:
            made.scale.data.copy_(scale), made.unit.copy_(unit)
        return made


def _stored_view(stated: int, weight: Weight) -> MatrixView:
    """The view that a file means by its number of rows, negative for a transposed weight."""
    shape = tuple(weight.original.shape)
    rows, transposed = abs(stated), stated < 0
    flat = MatrixView(shape, (1, *shape)) if len(shape) > 1 else column_view(shape)
    if not rows:
        return matrix_view(shape)
    for view in (weight.view, flat, matrix_view(shape)):
        if (view.rows, view.transposed) == (rows, transposed):
            return view
    raise ValueError(f"{weight.name!r} of shape {shape} cannot be seen as {rows} rows")


def planned(model: nn.Module, plan: Format | Mapping) -> list[tuple[Weight, Format | None]]:
    """The weights that a plan of `quantize_weights` names, each with its format."""
    if isinstance(plan, Format):
        return [(weight, plan) for weight in weights(model, matrices=True)]
    found = weights(model, plan)
    return [(w, next(f for p, f in plan.items() if fnmatch(w.name, p))) for w in found]


def quantize_weights(
    model: nn.Module, plan: Format | Mapping[str, Format | None], learned: bool = False
) -> nn.Module:
    """Fake-quantizes weights of the model, in place, and returns it.

    Args:
        plan: one format for every `Weight.is_matrix`, or shell patterns of dotted names to formats,
            of which a weight takes the first that matches (None: leave it in float32).
    A weight that is quantized already gets the new format; masks stay in front of it, transforms of
    token tables behind it. Raises ValueError for a pattern without a match and for weights that are
    not finite or carry another quantizer; the model is untouched then.

    >>> model = quantize_weights(nn.Sequential(nn.Linear(8, 4)), Format(4))
    >>> len(model[0].weight.unique()) <= 16 * 4
    True
    """
    chosen = planned(model, plan)
    if not chosen:
        what = f"{type(model).__name__} has no weight to quantize"
        raise ValueError(f"{what}: expected parameters of two or more dimensions")
    for weight, format in chosen:
        weight.check_put(FakeQuantize)
        formats.check_weights(weight.original, weight.name, format or formats.DEFAULT)
    for weight, format in chosen:
        if format is None:
            weight.drop(FakeQuantize)
        else:
            before = weight.before(FakeQuantize.rank).detach()
            weight.put(FakeQuantize(before, format, weight.view, learned))
    return model


def packable(weight: Weight) -> FakeQuantize | None:
    """The quantizer whose codes are the weight; None where there is none, where it keeps floats, or
    where steps behind it change what it gives."""
    last = weight.steps[-1] if weight.steps else None
    return last if isinstance(last, FakeQuantize) and last.format.bits != 16 else None


def quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """The fake quantizer of each quantized weight, by dotted name."""
    found = {weight.name: weight.find(FakeQuantize) for weight in weights(model)}
    return {name: step for name, step in found.items() if step is not None}
