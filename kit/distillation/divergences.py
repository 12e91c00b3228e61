"""Distillation losses as plain functions of tensors; autograd gives their gradients. A new one is
one function with `@register_divergence` or `@register_feature_loss`, and usable by its name."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.core.settings import checked

DIVERGENCES: dict[str, Callable] = {}
FEATURE_LOSSES: dict[str, Callable] = {}
SKEW = 0.1  # share of the teacher in the mixture of the skewed divergence


def register_divergence(name: str) -> Callable:
    """Decorator: `kind=name` is this function of the student's and the teacher's log-probabilities
    (log_q, log_p), both (..., V), that gives nats (...)."""
    return _register(DIVERGENCES, name)


def register_feature_loss(name: str) -> Callable:
    """Decorator: `feature_loss=name` is this function of real features (student's, teacher's), both
    (..., C), that gives a scalar. Widths may differ if its attribute `same_width` is False."""
    return _register(FEATURE_LOSSES, name)


def _register(known: dict[str, Callable], name: str) -> Callable:
    def register(function: Callable) -> Callable:
        known[name] = function
        return function

    return register


def divergence_of(name: str) -> Callable:
    """The divergence of that name. Raises ValueError when it is unknown."""
    return DIVERGENCES[checked("kind", name, Literal[*DIVERGENCES])]


def soft_targets(logits: Tensor | Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Log of the mean probability at `temperature` (..., V), of one teacher's logits or more."""
    if isinstance(logits, Tensor):
        return F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
    logs = [soft_targets(each, temperature) for each in logits]
    return logs[0] if len(logs) == 1 else torch.stack(logs).logsumexp(0) - math.log(len(logs))


@register_divergence("forward")
def forward(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q): Hinton, Vinyals, Dean 2015, less the teacher's entropy."""
    p = log_p.exp()
    found = torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q)
    if found.isnan().any():  # classes at minus infinity: 0 log 0 is 0
        found = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return found


@register_divergence("reverse")
def reverse(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p): MiniLLM, Gu et al. 2024."""
    return (log_q.exp() * (log_q - log_p).masked_fill(log_q == -torch.inf, 0.0)).sum(-1)


@register_divergence("skewed")
def skewed(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || SKEW p + (1 - SKEW) q): DistiLLM, Ko et al. 2024, eq. 4."""
    log_q = log_q.clamp(min=torch.finfo(log_q.dtype).min)  # of two infinities no gradient is known
    return forward(torch.logaddexp(log_p + math.log(SKEW), log_q + math.log1p(-SKEW)), log_p)


def sparse_divergence(log_q: Tensor, indices: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) of a p on k tokens: log_q (..., V), indices and log_p (..., k) -> (...). For an
    unbiased sample of the teacher's distribution (`cache.sparse`) its gradient is the full
    divergence's in the mean; its value is larger by what the sample lacks in entropy."""
    return forward(log_q.gather(-1, indices), log_p)


def soft_loss(student: Tensor, teacher, temperature: float = 2.0, kind: str = "forward") -> Tensor:
    """T^2 times the divergence of softmax(logits / T), (..., V) -> (...); of teachers' mean.

    T^2 keeps the gradient's size as T grows: for T -> infinity the forward loss tends to half the
    mean-free squared distance of the logits over V (Hinton et al. 2015, section 2.1).
    """
    log_q, log_p = soft_targets(student, temperature), soft_targets(teacher, temperature)
    return temperature**2 * divergence_of(kind)(log_q, log_p)


def as_real(feature: Tensor) -> Tensor:
    """Real features unchanged; complex (..., C) as (..., 2C), real beside imaginary parts."""
    if not feature.is_complex():
        return feature
    return torch.view_as_real(feature.resolve_conj()).flatten(-2)


@register_feature_loss("mse")
def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """mean |s - t|^2 / mean |t|^2: 1 for a student that outputs zeros."""
    scale = teacher.square().mean().clamp_min(torch.finfo(teacher.dtype).tiny)
    return F.mse_loss(student, teacher) / scale


@register_feature_loss("cosine")
def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos(s, t) over the leading dimensions."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


@register_feature_loss("relational")
def relational_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of cosine similarities, of all tokens of a sequence (B, N, C) or all
    examples of a batch (B, C): Park et al. 2019, Tung & Mori 2019. Widths may differ."""
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    return F.mse_loss(s @ s.mT, t @ t.mT)


relational_loss.same_width = False
