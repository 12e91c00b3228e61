"""Rounding that repairs: GPTQ (Frantar et al. 2022, arXiv:2210.17323)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kit.core.calibration import input_grams, without_inputs
from kit.core.obs import column_sweep, inverse_factor
from kit.core.weights import MatrixView, weights
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize, packable, planned, quantize_weights
from kit.quantization.formats import Format


def gptq_round(
    weight: Tensor, gram: Tensor, scale: Tensor, zero: Tensor | None, format: Format,
    damping: float = 0.01,
) -> Tensor:  # fmt: skip
    """Values of a fixed grid that make tr (W - Q) H (W - Q)^T small, H = X^T X of the inputs.

    Columns are rounded by falling H_jj (act-order), by `column_sweep`. What is 0 stays 0.

    Args:
        weight: (G, R, C), gram: (G, C, C), one for each set of inputs. scale, zero: (G, R, C).
    Returns (G, R, C) float32: scale * (codes - zero).
    """
    order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    columns = order[:, None, :].expand_as(weight)
    by_row = gram.gather(1, order[:, :, None].expand_as(gram))
    upper = inverse_factor(by_row.gather(2, order[:, None].expand_as(gram)), damping)
    weight, scale = weight.gather(2, columns), scale.gather(2, columns)
    zero = None if zero is None else zero.gather(2, columns)

    def nearest(j: int, rest: Tensor) -> Tensor:
        qparams = scale[:, :, j], None if zero is None else zero[:, :, j]
        values = formats.dequantize(formats.quantize(rest[:, :, j], *qparams, format), *qparams)
        return torch.where(weight[:, :, j] == 0, 0.0, values).double()

    rounded = column_sweep(weight.double(), upper, nearest).float()
    return torch.empty_like(rounded).scatter(2, columns, rounded)


@torch.no_grad()
def gptq(
    model: nn.Module, plan: Format | Mapping[str, Format | None], batches: Iterable,
    damping: float = 0.01,
) -> nn.Module:  # fmt: skip
    """`quantize_weights`, then GPTQ where inputs are known, in place; returns the model.

    Each weight's inputs come from the model with all before it rounded, one pass a weight over
    `batches` (see `kit.core.protocols.call_of`). What is not multiplied with inputs (embeddings)
    or hides them (recurrent layers) keeps the nearest codes: `model.unrepaired` maps its name to
    the reason. Masked weights stay zero. The grids are fixed afterwards.

    Raises ValueError, the model untouched, without a batch, for inputs that are not finite or, with
    too small a `damping`, linearly dependent, and for a weight changed behind its quantizer.
    """
    batches = list(batches)
    grams = input_grams(model, batches, strict=False)
    for gram in grams.values():
        inverse_factor(gram, damping)
    for weight, format in planned(model, plan):
        last = weight.steps[-1:]
        if format and weight.name in grams and last and last[0].rank > FakeQuantize.rank:
            what = f"{weight.name!r} carries a {last[0].kind} step behind its quantizer"
            raise ValueError(f"{what}, which GPTQ cannot see through: leave it out of the plan")
    quantize_weights(model, plan)
    repaired = repairable(model, batches[:1])
    coded = {weight.name for weight, format in planned(model, plan) if format and format.bits != 16}
    reasons = without_inputs(model, repaired)
    model.unrepaired = {name: why for name, why in reasons.items() if name in coded}
    for name in repaired:
        (weight,) = weights(model, name)
        quantizer, view = weight.find(FakeQuantize), weight.view
        (gram,) = input_grams(model, batches, name).values()
        seen = weight.before(quantizer.rank).float()
        scale, zero = quantizer.qparams(seen)
        qparams = [_stacked(quantizer, view, part) for part in (scale, zero)]
        rounded = gptq_round(view.stack(seen), gram, *qparams, quantizer.format, damping)
        weight.assign(view.tensor(rounded.flatten(0, 1)))
        quantizer.set_qparams(scale, zero)
    return model


def repairable(model: nn.Module, batches: Iterable) -> list[str]:
    """Names of the quantized weights whose rounding GPTQ repairs, in the order of their use."""
    fits = [weight.name for weight in weights(model, matrices=True) if packable(weight)]
    return list(input_grams(model, batches, fits, strict=False))


def _stacked(quantizer: FakeQuantize, view: MatrixView, part: Tensor | None) -> Tensor | None:
    """A scale or zero point as (groups, rows, columns): the one of each weight."""
    spread = None if part is None else quantizer.view.tensor(quantizer.spread(part))
    return None if spread is None else view.stack(spread)
