"""The distillation loss; over a large vocabulary in chunks: no full logit tensor exists."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.core.protocols import Call, LanguageModel
from kit.distillation.divergences import divergence_of, soft_targets, sparse_divergence
from kit.training.losses import IGNORED, chunked_linear_loss, flat_targets, logits_of


class Output(NamedTuple):
    """What a model's logits are made of: hidden (..., D) @ weight (V, D).T + bias (V,) or None;
    without a weight, `hidden` are the logits (..., V) themselves."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def classes(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else len(self.weight)

    def tokens(self, rows) -> "Output":
        """That of some tokens, hidden (n, D): `rows` counts them through all leading dimensions."""
        return Output(self.hidden.flatten(0, -2)[rows], *self[1:])

    def logits(self, rows: slice) -> Tensor:
        """(n, V), of a slice of the tokens (N, D)."""
        if self.weight is None:
            return self.hidden[rows]
        return F.linear(self.hidden[rows].to(self.weight.dtype), self.weight, self.bias)


def output_of(model: nn.Module, call: Call) -> Output:
    """Runs a model; the logits of a language model are not formed."""
    if isinstance(model, LanguageModel):
        return Output(call(model.hidden), *model.output())
    return Output(logits_of(call(model), call.targets))


class SparseTarget(NamedTuple):
    """k tokens of the vocabulary that stand for a teacher's whole distribution (`cache.sparse`)."""

    indices: Tensor  # (..., k) int64
    log_p: Tensor  # (..., k), log-probabilities that sum to 1


class Losses(NamedTuple):
    """Scalars: `total` carries the gradient, `soft` (with its T^2) and `hard` are for the log."""

    total: Tensor
    soft: Tensor
    hard: Tensor


def linear_distillation(
    student: Output, targets: Tensor, soft: Sequence[Output] | SparseTarget, *,
    temperature: float = 2.0, alpha: float = 0.7, kind: str = "forward", chunk: int | None = None,
) -> Losses:  # fmt: skip
    """alpha * T^2 * divergence + (1 - alpha) * cross-entropy, mean over tokens whose target counts.

    Args:
        targets: (...) int64, -100 for tokens that do not count, or probabilities (..., V).
        soft: teachers, the mean of whose probabilities is the target; or a `SparseTarget`, which
            must belong to the same temperature.
        kind: of `divergences.DIVERGENCES`. chunk: tokens a block; by default what fits the cache.

    Raises ValueError for other vocabularies, an unknown `kind`, a `SparseTarget` not "forward".
    """
    targets = flat_targets(targets, (*student.hidden.shape[:-1], student.classes))
    labels, keep = targets.ndim == 1, slice(None)
    if labels and (targets == IGNORED).any():
        keep = targets != IGNORED
    student, targets = student.tokens(keep), targets[keep]
    divergence, count = _divergence(student, soft, keep, kind, temperature), max(len(targets), 1)

    def loss(logits, rows):
        log_q, y = F.log_softmax(logits, -1), targets[rows]
        hard = (F.nll_loss(log_q, y, reduction="sum") if labels else -(y * log_q).sum()) / count
        if not alpha:
            return hard, torch.zeros_like(hard), hard
        log_q = log_q if temperature == 1 else F.log_softmax(logits / temperature, -1)
        soft = divergence(log_q, rows).sum() * (temperature**2 / count)
        return soft if alpha == 1 else alpha * soft + (1 - alpha) * hard, soft, hard

    if student.weight is None or not len(targets):
        total, *parts = loss(student.logits(slice(None)), slice(None))
        return Losses(total, *(part.detach() for part in parts))
    return Losses(*chunked_linear_loss(*student, loss, chunk))


def _divergence(student: Output, soft, keep, kind: str, temperature: float):
    """(log_q (n, V), rows) -> (n,), between student and teachers at this temperature."""
    function = divergence_of(kind)
    if isinstance(soft, SparseTarget):
        if kind != "forward":
            raise ValueError(f"cached targets know the forward divergence only, not {kind!r}")
        flat = [part.flatten(0, -2)[keep] for part in soft]
        return lambda log_q, rows: sparse_divergence(log_q, *(part[rows] for part in flat))
    check_classes(student.classes, *(teacher.classes for teacher in soft))
    soft = [teacher.tokens(keep) for teacher in soft]

    def divergence(log_q, rows):
        with torch.no_grad():
            log_p = soft_targets([teacher.logits(rows) for teacher in soft], temperature)
        return function(log_q, log_p)

    return divergence


def check_classes(own: int, *others: int) -> None:
    """Raises ValueError for a teacher of another vocabulary."""
    for other in others:
        if other != own:
            advice = "soft targets need the same vocabulary on both sides"
            raise ValueError(f"the student has {own} classes, the teacher {other}: {advice}")
