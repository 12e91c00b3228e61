"""Which weights matter: scores by name, and masks with exact counts from scores."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from kit.core.settings import BelowOne, checked
from kit.core.weights import Weight

CRITERIA: dict[str, tuple[Callable, bool]] = {}  # name -> score, and whether it needs norms


def register_criterion(name: str, needs_norms: bool = False) -> Callable:
    """Decorator for a score, by which `MagnitudePruner(score=name)` finds it.

    criterion(weight, norm, seed) -> scores (rows, columns), the lowest go first. norm (groups,
    columns) holds the norms of the weight's inputs (`kit.core.calibration.input_norms`), which are
    asked for if `needs_norms`, else it is None.
    """

    def register(function: Callable) -> Callable:
        CRITERIA[name] = function, needs_norms
        return function

    return register


@register_criterion("magnitude")
def magnitude(weight: Weight, norm: Tensor | None, seed: int) -> Tensor:
    """|w|."""
    return weight.view.matrix(weight.original.detach().abs())


@register_criterion("random")
def random(weight: Weight, norm: Tensor | None, seed: int) -> Tensor:
    """Uniform, the control that every criterion has to beat; drawn from the seed and the name."""
    scores = random_scores(weight.name, weight.original.shape, seed)
    return weight.view.matrix(scores.to(weight.original.device))


@register_criterion("wanda", needs_norms=True)
def wanda(weight: Weight, norm: Tensor, seed: int) -> Tensor:
    """|w_ij| * ||x_j||_2 (Sun et al. 2023, "A Simple and Effective Pruning Approach", eq. 1)."""
    magnitudes = weight.view.stack(weight.original.detach().abs())
    return (magnitudes * norm.to(magnitudes.device)[:, None]).flatten(0, 1)


def random_scores(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Uniform scores that depend on nothing but these."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    return torch.rand(shape, generator=generator)


def check_sparsity(sparsity: float) -> float:
    """The sparsity. Raises ValueError outside [0, 1): it is the share that goes; not all may."""
    return checked("sparsity", sparsity, BelowOne)


def prune_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Bool mask (..., n) that drops exactly the round(sparsity * n) lowest scores of each row; of
    equal scores the first go."""
    return without_lowest(scores, round(check_sparsity(sparsity) * scores.shape[-1]))


def without_lowest(scores: Tensor, count: int) -> Tensor:
    """Bool mask (..., n) that drops the `count` lowest of each row."""
    order = scores.argsort(dim=-1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :count], False)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool mask that keeps the n highest of every m neighbours along the last dimension (2:4).
    Raises ValueError as `check_pattern`."""
    check_pattern(scores.shape[-1], n, m)
    return without_lowest(scores.unflatten(-1, (-1, m)), m - n).flatten(-2)


def check_pattern(width: int, n: int, m: int, what: str = "the scores") -> None:
    """Raises ValueError unless `n` of `m` is a pattern that tiles the `width` columns of `what`."""
    if not 0 < n <= m:
        raise ValueError(f"the pattern {n}:{m} must keep between 1 and {m} of {m} weights, not {n}")
    if width % m:
        said = f"the pattern {n}:{m} needs rows that {m} divides, not the {width} of {what}"
        raise ValueError(said)


def cubic_sparsity(step: int, start: int, end: int, final: float, initial: float = 0.0) -> float:
    """Sparsity after `step` steps: s_f + (s_i - s_f) (1 - (t - t_0) / (t_n - t_0))^3, flat outside
    (Zhu and Gupta 2017, "To prune, or not to prune", eq. 1)."""
    if end <= start:
        return final if step >= end else initial
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3
