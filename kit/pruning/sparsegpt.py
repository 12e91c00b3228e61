"""SparseGPT: one-shot pruning that lets the weights which remain make up for those that go."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kit.pruning import criteria as score
from kit.core.calibration import input_grams
from kit.pruning.mask import select

BLOCK = 128


def sparsegpt(weight: Tensor, gram: Tensor, sparsity: float = 0.0, *, pattern: tuple[int, int] | None = None,
              allowed: Tensor | None = None, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Prune a matrix and update what remains so that its outputs on the calibration inputs change least.

    Columns go left to right; the error of removing w_j is spread over the columns to its right by the optimal
    brain surgeon step, w_{>j} -= w_j / U_jj * U_{j,>j} with U^T U = (X^T X + damping)^-1, and a weight's
    saliency is (w_j / U_jj)^2 (Frantar and Alistarh 2023, algorithm 1). Blocks of 128 columns choose their
    masks together.

    Args:
        weight: (R, C). gram: X^T X of its inputs, (C, C).
        sparsity: share to remove, over the whole matrix. pattern: (n, m) keeps n of every m in a row instead.
        allowed: bool (R, C), weights that may be kept; with sparsity 0 the mask is this, and only values
        change.
        damping: added to the diagonal of the gram matrix, as a share of its mean.

    Returns:
        the new weight, zero where pruned, in the dtype of `weight`, and the bool mask.

    Raises:
        ValueError: sparsity outside [0, 1), or a pattern that does not divide C.
    """
    score.check_sparsity(sparsity)
    n, m = pattern or (1, 1)
    score.check_pattern(weight.shape[1], n, m)
    rest, upper = weight.detach().double().clone(), _inverse_factor(gram.double(), damping)
    mask = torch.ones_like(weight, dtype=torch.bool) if allowed is None else allowed.clone()
    width = BLOCK // m * m or m
    for first in range(0, weight.shape[1], width):
        block = slice(first, min(first + width, weight.shape[1]))
        factor = upper[block, block]
        drop = round(sparsity * len(rest) * block.stop) - round(sparsity * len(rest) * first)
        if pattern is None:
            mask[:, block] = _choose(rest[:, block], factor.diagonal(), mask[:, block], drop)
        errors = torch.zeros_like(rest[:, block])
        for j in range(block.stop - first):
            column = first + j
            if pattern is not None and j % m == 0:
                group = slice(column, column + m)
                saliency = (rest[:, group] / upper.diagonal()[group]).square()
                mask[:, group] &= score.nm_mask(saliency.masked_fill(~mask[:, group], -1), n, m)
            errors[:, j] = rest[:, column] * ~mask[:, column] / factor[j, j]
            rest[:, column:block.stop] -= errors[:, j:j + 1] * factor[j, j:]
        rest[:, block.stop:] -= errors @ upper[block, block.stop:]
    return torch.where(mask, rest, 0.0).to(weight.dtype), mask


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U with U^T U = (gram + damping * mean diagonal)^-1; silent inputs are independent."""
    diagonal = gram.diagonal()
    extra = damping * diagonal.mean() + (diagonal == 0)
    lower = torch.linalg.cholesky(gram + torch.diag(extra))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _choose(weight: Tensor, diagonal: Tensor, allowed: Tensor, drop: int) -> Tensor:
    saliency = (weight / diagonal).square().masked_fill(~allowed, -1).flatten()
    keep = torch.ones_like(saliency, dtype=torch.bool)
    keep[saliency.argsort(stable=True)[:drop]] = False
    return keep.view_as(allowed) & allowed


def prune_sparsegpt(model: nn.Module, batches: Sequence, sparsity: float = 0.0,
                    tensors: str | Iterable[str] = "*", *, pattern: tuple[int, int] | None = None,
                    damping: float = 0.01) -> nn.Module:
    """SparseGPT on the selected weights, in place, in the order the model uses them; returns the model.

    Each weight's inputs are collected after everything before it is pruned, one pass a weight over `batches`
    (a list of inputs, or of tuples that start with them).

    Raises:
        ValueError: bad sparsity, pattern or names, or inputs that cannot be collected. The model is untouched
        then.
    """
    score.check_sparsity(sparsity)
    slots = select(model, tensors)
    for name, slot in slots.items():
        if pattern is not None:
            score.check_pattern(slot.stack(slot.parameter).shape[-1], *pattern)
    for name in input_grams(model, batches, tensors):
        slot, (gram,) = slots[name], input_grams(model, batches, name).values()
        pruned = [sparsegpt(weight, group, sparsity, pattern=pattern, allowed=allowed, damping=damping)
                  for weight, group, allowed in zip(slot.stack(slot.parameter), gram, slot.stack(slot.mask))]
        with torch.no_grad():
            slot.parameter.copy_(torch.stack([weight for weight, _ in pruned]).view_as(slot.parameter))
        slot.set_mask(torch.stack([mask for _, mask in pruned]))
    return model
