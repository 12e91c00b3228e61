"""Half-quadratic quantization: grids refined without data (Badri and Shaji 2023, mobiusml.github.io/hqq_blog)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kit.core.weights import matching
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize, quantize_weights, quantizers, seen_by
from kit.quantization.formats import Format

NORM = 0.7       # p of the norm that is minimized: below 1, so that outliers may err
GROWTH = 1.05    # of the penalty beta, a step


def hqq_grid(blocks: Tensor, format: Format, steps: int = 20) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (blocks, 1) that make sum |x - scale (q - zero)|^p small, p = 0.7.

    Alternates, in units of the first scale: e = shrink(x - scale (q - zero)), the generalized soft threshold of the
    residual; q = the nearest codes; scale and zero by least squares of x - e. The best grid met is returned, so the result
    is never worse than `choose_grid` in this norm. blocks (blocks, length) may be padded with zeros.
    """
    x = blocks.detach().float()
    first, zero = formats.choose_grid(x, format)
    scale, beta = first, 10.0
    best, best_error = (scale, zero), _error(x, scale, zero, format)
    for _ in range(steps if x.numel() else 0):
        codes = formats.quantize(x, scale, zero, format)
        rest = (x - formats.dequantize(codes, scale, zero)) / first
        outlier = first * rest.sign() * (rest.abs() - rest.abs().clamp(min=1e-6) ** (NORM - 1) / beta).clamp(min=0)
        wanted, level = x - outlier, codes.float() if zero is None else codes.float() - zero
        scale = (wanted * level).sum(1, keepdim=True) / level.square().sum(1, keepdim=True).clamp(min=1e-12)
        scale = formats.round_scale(torch.where(scale > 0, scale, first), format.scale)
        if zero is not None:
            zero = torch.round((codes - wanted / scale).mean(1, keepdim=True)).clamp(format.qmin, format.qmax)
        error = _error(x, scale, zero, format)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = (torch.where(better, scale, best[0]), None if zero is None else torch.where(better, zero, best[1]))
        beta *= GROWTH
    return formats.round_scale(best[0], format.scale), best[1]


def _error(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    rounded = formats.dequantize(formats.quantize(x, scale, zero, format), scale, zero)
    return (rounded - x).abs().pow(NORM).sum(1, keepdim=True)


def hqq(model: nn.Module, plan: Format | Mapping[str, Format | None]) -> nn.Module:
    """`quantize_weights` with grids fixed by `hqq_grid`, in place; returns the model."""
    quantize_weights(model, plan)
    for name, quantizer in quantizers(model).items():
        if quantizer.format.bits != 16:
            ((_, module, attribute),) = matching(model, [name])
            blocks = quantizer.blocks(seen_by(quantizer, module, attribute).detach())
            quantizer.set_grid(*hqq_grid(blocks, quantizer.format))
    return model
