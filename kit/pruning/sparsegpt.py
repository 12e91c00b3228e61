"""SparseGPT: one-shot pruning that lets the weights which remain make up for those that go."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kit.core.calibration import input_grams
from kit.core.obs import BLOCK, column_sweep, inverse_factor
from kit.core.weights import weights
from kit.pruning import criteria
from kit.pruning.mask import check_maskable, mask_of, put_mask


def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float = 0.0, *, pattern: tuple[int, int] | None = None,
    allowed: Tensor | None = None, damping: float = 0.01,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prunes matrices and updates what remains so that outputs on the calibration inputs change least.

    The error of removing w_j is spread over the columns to its right by `column_sweep`; a weight's
    saliency is (w_j / U_jj)^2 (Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1). Blocks of 128
    columns choose their masks together.

    Args:
        weight: (R, C), or (G, R, C), a matrix for each set of inputs. gram: X^T X, (C, C) or (G, C, C).
        sparsity: share to remove of each matrix. pattern: (n, m) keeps n of every m in a row instead.
        allowed: bool like weight, entries that may be kept; with sparsity 0 the mask is this, and only
            values change.
        damping: added to the diagonal of the gram matrix, as a share of its mean.
    Returns the new weight, zero where pruned, in the dtype of `weight`, and the bool mask.
    Raises ValueError: sparsity outside [0, 1), a pattern that does not divide C, or bad inputs.
    """
    if weight.ndim == 2:
        one = None if allowed is None else allowed[None]
        stacked = sparsegpt(weight[None], gram[None], sparsity, pattern=pattern, allowed=one, damping=damping)
        return stacked[0][0], stacked[1][0]
    criteria.check_sparsity(sparsity)
    n, m = pattern or (1, 1)
    criteria.check_pattern(weight.shape[2], n, m)
    upper = inverse_factor(gram.double(), damping)
    mask = torch.ones_like(weight, dtype=torch.bool) if allowed is None else allowed.clone()
    width, rows, columns = BLOCK // m * m or m, *weight.shape[1:]

    def saliency(rest: Tensor, at: slice) -> Tensor:
        values = rest[:, :, at] / upper.diagonal(dim1=1, dim2=2)[:, None, at]
        return values.square().masked_fill(~mask[:, :, at], -1)

    def kept(j: int, rest: Tensor) -> Tensor:
        if pattern is None and j % width == 0:
            at = slice(j, min(j + width, columns))
            drop = round(sparsity * rows * at.stop) - round(sparsity * rows * j)
            scores = saliency(rest, at)
            order = scores.flatten(1).argsort(dim=1, stable=True)[:, :drop]
            keep = torch.ones_like(scores, dtype=torch.bool).flatten(1).scatter_(1, order, False)
            mask[:, :, at] &= keep.view_as(scores)
        elif pattern is not None and j % m == 0:
            at = slice(j, j + m)
            mask[:, :, at] &= criteria.nm_mask(saliency(rest, at), n, m)
        return rest[:, :, j] * mask[:, :, j]

    values = column_sweep(weight.detach().double(), upper, kept, width)
    return torch.where(mask, values, 0.0).to(weight.dtype), mask


def prune_sparsegpt(
    model: nn.Module, batches: Sequence, sparsity: float = 0.0, tensors: str | Iterable[str] = "*", *,
    pattern: tuple[int, int] | None = None, damping: float = 0.01,
) -> nn.Module:  # fmt: skip
    """SparseGPT on the selected weights, in place, in the order the model uses them; returns the model.

    Each weight's inputs are collected after everything before it is pruned, one pass a weight over
    `batches` (see `kit.core.protocols.call_of`).
    Raises ValueError: bad sparsity, pattern or names, or inputs that cannot be collected. The model is
    untouched then.
    """
    criteria.check_sparsity(sparsity)
    found = {weight.name: weight for weight in weights(model, tensors, matrices=True)}
    for weight in found.values():
        check_maskable(weight)
        if pattern is not None:
            criteria.check_pattern(weight.view.columns, *pattern)
    for name in input_grams(model, batches, tensors):
        weight, (gram,) = found[name], input_grams(model, batches, name).values()
        view, original = weight.view, weight.original.detach()
        allowed = view.stack(mask_of(weight))
        values, mask = sparsegpt(
            view.stack(original), gram, sparsity, pattern=pattern, allowed=allowed, damping=damping
        )
        weight.assign(view.tensor(values.flatten(0, 1)))
        put_mask(weight, view.tensor(mask.flatten(0, 1)))
    return model
