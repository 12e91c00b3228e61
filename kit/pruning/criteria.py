"""Which weights matter: scores, and masks with exact counts from scores. Pure functions of tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|, float, of the weight's shape."""
    return weight.detach().abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform scores of the weight's shape, the control every criterion has to beat."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w_ij| * ||x_j||_2 (Sun et al. 2023, "A Simple and Effective Pruning Approach", eq. 1).

    Args:
        weight: (..., R, C).
        input_norm: (..., C), the norm of each input feature over the calibration tokens.
    """
    return weight.detach().abs() * input_norm.unsqueeze(-2)


def check_sparsity(sparsity: float) -> float:
    """The sparsity, if it is a share of weights that leaves something.

    Raises:
        ValueError: outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1): give the share of weights to remove")
    return float(sparsity)


def prune_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Bool mask that drops exactly round(sparsity * n) of each row's n lowest scores; ties go by position.

    Args:
        scores: (..., n), each row a group of its own. Give a flat tensor to rank the whole of it.

    Raises:
        ValueError: sparsity outside [0, 1).
    """
    drop = round(check_sparsity(sparsity) * scores.shape[-1])
    order = scores.argsort(dim=-1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :drop], False)


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks for all tensors together: round(sparsity * total) weights go, exactly, wherever they stand."""
    flat = torch.cat([tensor.flatten() for tensor in scores.values()])
    parts = prune_mask(flat, sparsity).split([tensor.numel() for tensor in scores.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(scores.items(), parts)}


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool mask that keeps the n highest of every m neighbours along the last dimension (2:4 and the like).

    Raises:
        ValueError: n is not in 1..m, or m does not divide the last dimension.
    """
    check_pattern(scores.shape[-1], n, m)
    groups = scores.unflatten(-1, (-1, m))
    order = groups.argsort(dim=-1, stable=True)
    mask = torch.ones_like(groups, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :m - n], False).flatten(-2)


def check_pattern(width: int, n: int, m: int) -> None:
    """Raises ValueError unless `n` of `m` is a pattern that tiles `width` columns."""
    if not 0 < n <= m:
        raise ValueError(f"the pattern {n}:{m} keeps {n} of {m} weights; it must keep between 1 and {m}")
    if width % m:
        raise ValueError(f"the pattern {n}:{m} needs rows whose length {m} divides, not {width}")


def cubic_sparsity(step: int, start: int, end: int, final: float, initial: float = 0.0) -> float:
    """Sparsity after `step` steps: s_f + (s_i - s_f) (1 - (t - t_0) / (t_n - t_0))^3, flat outside.

    Zhu and Gupta 2017, "To prune, or not to prune", eq. 1: fast while much is redundant, slow near the end.
    """
    if end <= start:
        return final if step >= end else initial
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3
