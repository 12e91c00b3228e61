"""Number formats and the arithmetic of uniform quantization, as pure functions of tensors.

A tensor is viewed as a matrix (rows, columns), and the matrix as blocks that share one scale: the
whole tensor, a row ("channel"), `group_size` neighbours in a row ("group") or `group_size` whole
rows ("rows"). Every function below works on blocks, shape (blocks, length), with scale and zero
point of shape (blocks, 1). x = scale * (code - zero): Jacob et al. 2018 (arXiv:1712.05877), eq. 1.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.core.settings import Count, settings
from kit.core.weights import check_values
from kit.quantization import kernels

SMALLEST_SCALE = {"float32": 1e-30, "float16": 2.0**-24, "log8": 1e-30}
SHRINKAGES = 65  # ranges that "mse" tries


@settings
class Format:
    """How numbers are stored.

    bits: 2, 3, 4, 5, 6, 8 or 12 for integer codes, "ternary" for {-1, 0, 1}, 16 for IEEE half.
    symmetric: zero point 0 and scale = max|x| / qmax; else the range [min, max] with 0.
    granularity: what shares a scale: "tensor", "channel" (a row), "group" (`group_size` neighbours
        in a row) or "rows" (`group_size` rows); the last group may be shorter.
    range: "minmax", "percentile" (99.9 % of |x|) or "mse" (clipped for the least squared error).
    scale: how a scale is stored: "float32", "float16" or "log8" (8 bits, 16 an octave).

    >>> Format(4, granularity="group", group_size=64).qmax
    7
    """

    bits: Literal[2, 3, 4, 5, 6, 8, 12, 16, "ternary"] = 8
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group", "rows"] = "channel"
    group_size: Count = 128
    range: Literal["minmax", "percentile", "mse"] = "minmax"
    scale: Literal["float32", "float16", "log8"] = "float16"

    def __post_init__(self):
        if self.bits == "ternary" and not self.symmetric:
            raise ValueError("a ternary format is symmetric by definition: drop symmetric=False")

    @property
    def qmin(self) -> int:
        return -1 if self.bits == "ternary" else -(2 ** (self.bits - 1))

    @property
    def integer(self) -> torch.dtype:
        """Of codes and zero points."""
        return torch.int16 if self.bits == 12 else torch.int8

    @property
    def qmax(self) -> int:
        return 1 if self.bits == "ternary" else 2 ** (self.bits - 1) - 1

    def changes(self) -> dict:
        """The fields that differ from those of `Format()`: `Format(**changes)` is this format."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value != getattr(DEFAULT, name)}


HALF, DEFAULT = Format(16), Format()


def to_blocks(matrix: Tensor, format: Format, fill: float = 0.0) -> Tensor:
    """(rows, columns) -> (blocks, length); a short last group is padded with `fill`."""
    rows, columns = matrix.shape
    if format.granularity == "tensor":
        return matrix.reshape(1, -1)
    if format.granularity == "channel":
        return matrix
    if format.granularity == "rows":
        size = min(format.group_size, max(rows, 1))
        padded = F.pad(matrix, (0, 0, 0, -rows % size), value=fill)
        return padded.reshape(-(-rows // size), size * columns)
    size = min(format.group_size, max(columns, 1))
    return F.pad(matrix, (0, -columns % size), value=fill).reshape(-1, size)


def from_blocks(blocks: Tensor, shape: tuple[int, int], format: Format) -> Tensor:
    """The inverse of `to_blocks` for a matrix of `shape`."""
    rows, columns = shape
    if not rows or not columns:
        return blocks.new_zeros(shape)
    if format.granularity == "rows":
        return blocks.reshape(-1, columns)[:rows]
    return blocks.reshape(rows, -1)[:, :columns]


def block_count(shape: tuple[int, int], format: Format) -> int:
    """How many scales a matrix of `shape` needs."""
    return len(to_blocks(torch.empty(shape, device="meta"), format))


@cache
def _log_table() -> Tensor:
    return torch.exp2(-torch.arange(256, dtype=torch.float64) / 16).float()


def stored_scale(scale: Tensor, kind: str) -> list[Tensor]:
    """The tensors that hold a scale (blocks, 1) in a file: for "log8" codes (blocks,) uint8 and the
    largest scale (1,), so that scale = largest * 2**(-code / 16), rounded up."""
    scale = scale.reshape(-1)
    if kind != "log8":
        return [scale.half() if kind == "float16" else scale]
    largest = scale.max().clamp(min=SMALLEST_SCALE[kind]).float()
    codes = torch.floor(-16 * torch.log2(scale.double() / largest.double()) + 1e-3).clamp(0, 255)
    return [codes.to(torch.uint8), largest.reshape(1)]


def stored_shapes(count: int, kind: str) -> list[tuple[tuple[int], torch.dtype]]:
    """Shapes and dtypes of the tensors of `stored_scale` for `count` blocks."""
    return [(part.shape, part.dtype) for part in stored_scale(torch.ones(count, 1), kind)]


def restored_scale(parts: Sequence[Tensor], kind: str) -> Tensor:
    """The scale (blocks, 1), float32, of the tensors of `stored_scale`."""
    if kind == "log8":
        codes, largest = parts
        return (largest * _log_table().to(largest.device)[codes.long()])[:, None]
    return parts[0].float()[:, None]


def round_scale(scale: Tensor, kind: str) -> Tensor:
    """The float32 value that `scale` (blocks, 1) has after being stored as `kind`, up rather than
    down, so that a range is still covered. Raises ValueError for a scale beyond float16's range."""
    if scale.numel() == 0:
        return scale.float()
    if kind == "log8":
        return restored_scale(stored_scale(scale, kind), kind)
    if kind == "float16":
        if scale.max() > 65504:
            advice = "use Format(scale='float32')"
            raise ValueError(f"a scale of {scale.max():.3g} exceeds float16 (65504): {advice}")
        half = scale.float().half()
        scale = (half.view(torch.int16) + (half.float() < scale)).view(torch.float16)
    return scale.float().clamp(min=SMALLEST_SCALE[kind])


def round_half(x: Tensor) -> Tensor:
    """Rounded to half precision, with the gradient straight through; shape and dtype of x."""
    return x + (x.half().to(x.dtype) - x).detach()


def fits_half(x: Tensor) -> bool:
    return not (x.abs() > 65504).any()


def check_weights(x: Tensor, what: str = "tensor", format: Format = DEFAULT) -> None:
    """Raises ValueError for what no real quantizer can hold: complex, integer, without values, NaN
    or infinite; and for what is beyond half precision where that is the format."""
    if x.is_complex():
        why = "a real quantizer would drop the imaginary part; use ComplexQuantizer"
        raise ValueError(f"{what} is complex ({x.dtype}): {why}")
    if not x.is_floating_point():
        raise ValueError(f"{what} has dtype {x.dtype}: quantization expects floating point values")
    check_values(x, what)
    if format.bits == 16 and not fits_half(x):
        high = f"{what} holds {x.abs().max():.3g}, beyond half precision (65504)"
        raise ValueError(f"{high}: leave it in float32, by None in a plan of quantize_weights")


def qparams_of_range(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None if symmetric) of the range [low, high], low <= 0 <= high."""
    if format.symmetric:
        return round_scale(torch.maximum(-low, high) / format.qmax, format.scale), None
    scale = round_scale((high - low) / (format.qmax - format.qmin), format.scale)
    return scale, (format.qmin - torch.round(low / scale)).clamp(format.qmin, format.qmax)


def _percentile(x: Tensor, share: float) -> Tensor:
    """The value (blocks, 1) that `share` of a block does not exceed, at any length."""
    ordered, count = x.sort(dim=1).values, (~x.isnan()).sum(1, keepdim=True)
    return ordered.gather(1, (torch.ceil(share * count).long() - 1).clamp(min=0))


def choose_qparams(blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Scale (blocks, 1) float32, as it will be stored, and zero point (blocks, 1) or None, by
    `format.range`. Blocks may be padded with NaN, which no rule counts."""
    x = blocks.detach().float()
    padded = torch.nan_to_num(x)
    if x.shape[1]:
        low, high = torch.aminmax(padded, dim=1, keepdim=True)
        low, high = low.clamp(max=0), high.clamp(min=0)
    else:
        low = high = x.new_zeros(len(x), 1)
    if format.range == "minmax" or x.numel() == 0:
        return qparams_of_range(low, high, format)
    if format.range == "percentile":
        bound = _percentile(x.abs(), 0.999)
        return qparams_of_range(torch.maximum(low, -bound), torch.minimum(high, bound), format)
    scale, zero = qparams_of_range(low, high, format)
    least = torch.full_like(scale, math.inf)
    for ratio in torch.linspace(1.0, 0.2 if format.qmax > 1 else 0.05, SHRINKAGES).tolist():
        trial, origin = qparams_of_range(low * ratio, high * ratio, format)
        values = dequantize(quantize(padded, trial, origin, format), trial, origin)
        error = (values - padded).square().sum(1, keepdim=True)
        better, least = error < least, torch.minimum(error, least)
        scale = torch.where(better, trial, scale)
        zero = None if zero is None else torch.where(better, origin, zero)
    return round_scale(scale, format.scale), zero


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """Integer codes (`format.integer`) of x: round(x / scale) + zero, saturated at [qmin, qmax]."""
    q = (x.float() / scale).round_()  # in place: of a large table every copy counts
    q = q if zero is None else q.add_(zero)
    return q.clamp_(format.qmin, format.qmax).to(format.integer)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """scale * (codes - zero), float32."""
    return (codes if zero is None else codes.float() - zero) * scale  # as floats, in one pass


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero, qmin, qmax, step_gradient):
        ctx.compiled, ctx.step_gradient = kernels.fits(x, scale, zero), step_gradient
        if ctx.compiled:
            x, scale = x.contiguous(), scale.contiguous()
            ctx.save_for_backward(x, scale)
            ctx.range = qmin, qmax
            return kernels.fake_quantize(x, scale, qmin, qmax)
        ratio = x / scale
        unclipped = torch.round(ratio) if zero is None else torch.round(ratio) + zero
        q = unclipped.clamp(qmin, qmax) + 0.0  # integer codes know no -0.0
        ctx.save_for_backward(ratio if step_gradient else None, q, unclipped, zero)
        return (q if zero is None else q - zero) * scale

    @staticmethod
    def backward(ctx, grad):
        step = ctx.step_gradient
        if ctx.compiled:
            tensors = *ctx.saved_tensors, *ctx.range, grad
            grad_x, grad_scale = kernels.fake_quantize_backward(*tensors)
            return grad_x, grad_scale * step if step else None, None, None, None, None
        ratio, q, unclipped, zero = ctx.saved_tensors
        inside = q == unclipped
        grad_scale = None
        if step:
            slope = (q if zero is None else q - zero) - ratio * inside
            grad_scale = (grad * slope).sum(1, keepdim=True) * step
        return grad * inside, grad_scale, None, None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, format: Format, step_gradient: float = 0.0
) -> Tensor:
    """Quantize and dequantize; gradient straight through, 0 where x saturates (Bengio et al. 2013).

    x (blocks, length); scale (blocks, 1) or any shape that broadcasts. `step_gradient` > 0 also
    gives the scale its gradient, times that factor: learned step size quantization (Esser et al.
    2020, arXiv:1902.08153, eq. 3), which recommends 1 / sqrt(length * qmax).
    """
    return _FakeQuantize.apply(x, scale, zero, format.qmin, format.qmax, step_gradient)
