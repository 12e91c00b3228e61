"""Half-quadratic quantization: grids from the weights alone (Badri and Shaji 2023, HQQ blog)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kit.core.weights import weights
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize, quantize_weights
from kit.quantization.formats import Format

NORM = 0.7  # p of the norm that is minimized: below 1, so that outliers may err
PENALTY, GROWTH = 1.0, 1.2  # beta at first, and its growth a step: soft, then hard


def shrink(x: Tensor, beta: float) -> Tensor:
    """argmin_e |e|^p + beta / 2 (e - x)^2, approximately: the generalized soft threshold, which
    moves entries towards 0 by |x|^(p - 1) / beta and no further."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-6) ** (NORM - 1) / beta).clamp(min=0)


def hqq_qparams(blocks: Tensor, format: Format, steps: int = 20) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (blocks, 1) that make sum |x - scale (q - zero)|^p small, p = 0.7.

    Alternates, in units of the first scale: q = nearest codes, e = shrink(x - scale (q - zero)),
    scale and zero by least squares of x - e. The best pair met is returned, never worse than
    that of `choose_qparams` in this norm. blocks (blocks, length) may be padded with zeros.
    """
    x = blocks.detach().float()
    first, zero = formats.choose_qparams(x, format)
    scale, best, least = first, (first, zero), torch.full_like(first, torch.inf)
    for step in range(steps + 1 if x.numel() else 0):
        codes = formats.quantize(x, scale, zero, format)
        residual = x - formats.dequantize(codes, scale, zero)
        error = residual.abs().pow(NORM).sum(1, keepdim=True)
        parts = zip((scale, zero), best)
        best = tuple(None if p is None else torch.where(error < least, p, b) for p, b in parts)
        least = torch.minimum(error, least)
        wanted = x - first * shrink(residual / first, PENALTY * GROWTH**step)
        level = codes.float() if zero is None else codes.float() - zero
        energy = level.square().sum(1, keepdim=True).clamp(min=1e-12)
        scale = (wanted * level).sum(1, keepdim=True) / energy
        scale = formats.round_scale(torch.where(scale > 0, scale, first), format.scale)
        if zero is not None:
            mean = (codes - wanted / scale).mean(1, keepdim=True)
            zero = torch.round(mean).clamp(format.qmin, format.qmax)
    return formats.round_scale(best[0], format.scale), best[1]


def hqq(model: nn.Module, plan: Format | Mapping[str, Format | None]) -> nn.Module:
    """`quantize_weights` with grids fixed by `hqq_qparams`, in place; returns the model."""
    quantize_weights(model, plan)
    for weight in weights(model):
        quantizer = weight.find(FakeQuantize)
        if quantizer is not None and quantizer.format.bits != 16:
            blocks = quantizer.blocks(weight.before(quantizer.rank).detach())
            quantizer.set_qparams(*hqq_qparams(blocks, quantizer.format))
    return model
