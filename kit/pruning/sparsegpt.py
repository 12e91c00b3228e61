"""SparseGPT: one-shot pruning that lets the weights which remain make up for those that go."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kit.core.calibration import input_grams, without_inputs
from kit.core.obs import BLOCK, column_sweep, inverse_factor
from kit.core.settings import BelowOne, checks
from kit.core.weights import weights
from kit.pruning import criteria
from kit.pruning.mask import check_prunable, mask_of, put_mask


@checks
def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: BelowOne = 0.0, *,
    pattern: tuple[int, int] | None = None, allowed: Tensor | None = None, damping: float = 0.01,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prunes matrices and updates what remains so that outputs on the given inputs change least.

    The error of removing w_j is spread over the columns to its right by `column_sweep`; a weight's
    saliency is (w_j / U_jj)^2 (Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1). Blocks of
    128 columns choose their masks together.

    Args:
        weight: (G, R, C), a matrix for each set of inputs. gram: their X^T X, (G, C, C).
        sparsity: share to remove of each matrix. pattern: (n, m), n to keep of every m in a row.
        allowed: bool like weight, what may be kept; with sparsity 0 the mask is this.
        damping: added to the diagonal of the gram matrix, as a share of its mean.
    Returns the new weight, zero where pruned, in the dtype of `weight`, and the bool mask.
    Raises ValueError: sparsity outside [0, 1), a pattern that does not divide C, or bad inputs.
    """
    n, m = pattern or (1, 1)
    criteria.check_pattern(weight.shape[2], n, m)
    upper = inverse_factor(gram.double(), damping)
    mask = torch.ones_like(weight, dtype=torch.bool) if allowed is None else allowed.clone()
    (_, rows, columns), width = weight.shape, m if pattern else BLOCK

    def kept(j: int, rest: Tensor) -> Tensor:
        if j % width == 0:
            at = slice(j, min(j + width, columns))
            values = rest[:, :, at] / upper.diagonal(dim1=1, dim2=2)[:, None, at]
            scores = values.square().masked_fill(~mask[:, :, at], -1)
            if pattern:
                keep = criteria.nm_mask(scores, n, m)
            else:
                drop = round(sparsity * rows * at.stop) - round(sparsity * rows * j)
                keep = criteria.without_lowest(scores.flatten(1), drop).view_as(scores)
            mask[:, :, at] &= keep
        return rest[:, :, j] * mask[:, :, j]

    values = column_sweep(weight.detach().double(), upper, kept, BLOCK // m * m or m)
    return torch.where(mask, values, 0.0).to(weight.dtype), mask


@checks
def prune_sparsegpt(
    model: nn.Module, batches: Iterable, sparsity: BelowOne = 0.0,
    tensors: str | Iterable[str] = "*", *, pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
) -> nn.Module:  # fmt: skip
    """SparseGPT on the selected weights, in place, in the order of use; returns the model.

    Each weight's inputs are collected after everything before it is pruned, one pass a weight over
    `batches` (see `kit.core.protocols.call_of`). "*" is every weight whose inputs are known:
    `model.unrepaired` maps the others, which stay as they are, to the reason.
    Raises ValueError, before anything changes: bad sparsity, pattern or names; inputs of a named
    weight that cannot be collected, are not finite or, with a `damping` too small, dependent.
    """
    batches = list(batches)
    for weight in weights(model, tensors, matrices=True) if tensors != "*" else ():
        check_prunable(weight)
    grams = input_grams(model, batches, tensors, strict=tensors != "*")
    found = {w.name: w for w in weights(model, tensors, matrices=True) if w.name in grams}
    for name, weight in found.items():
        check_prunable(weight)
        inverse_factor(grams[name], damping)
        if pattern is not None:
            criteria.check_pattern(weight.view.columns, *pattern, name)
    model.unrepaired = without_inputs(model, grams) if tensors == "*" else {}
    if not grams:
        what = f"{type(model).__name__} shows the inputs of none of its weights"
        raise ValueError(f"{what}: prune it by magnitude")
    for name in grams:
        weight, (gram,) = found[name], input_grams(model, batches, name).values()
        view, allowed = weight.view, weight.view.stack(mask_of(weight))
        settings = {"pattern": pattern, "allowed": allowed, "damping": damping}
        values, mask = sparsegpt(view.stack(weight.original), gram, sparsity, **settings)
        weight.assign(view.tensor(values.flatten(0, 1)))
        put_mask(weight, view.tensor(mask.flatten(0, 1)))
    return model
