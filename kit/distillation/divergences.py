"""Distillation losses as pure functions of tensors. Logits are (..., V); every divergence is returned per token, (...)."""

import math

import torch
import torch.nn.functional as F

DIVERGENCES = ("forward", "reverse", "skewed")


def soft_targets(teacher_logits, temperature: float = 1.0) -> torch.Tensor:
    """Log of the teachers' mean probability at `temperature`: one tensor (..., V), or a sequence of them."""
    if torch.is_tensor(teacher_logits):
        return F.log_softmax(teacher_logits / temperature, dim=-1)
    logs = torch.stack([F.log_softmax(logits / temperature, dim=-1) for logits in teacher_logits])
    return torch.logsumexp(logs, dim=0) - math.log(len(logs))


def divergence(log_q: torch.Tensor, log_p: torch.Tensor, kind: str = "forward", skew: float = 0.1) -> torch.Tensor:
    """Divergence between student `log_q` and teacher `log_p`, log-probabilities (..., V) -> (...), in nats.

    forward: KL(p || q) (Hinton, Vinyals, Dean 2015, up to the teacher's entropy); reverse: KL(q || p) (MiniLLM,
    Gu et al. 2024); skewed: KL(p || skew p + (1 - skew) q) (DistiLLM, Ko et al. 2024, eq. 4).
    Raises ValueError for another `kind`.
    """
    if kind == "forward":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "skewed":
        mixture = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
        return (log_p.exp() * (log_p - mixture)).sum(-1)
    raise ValueError(f"divergence {kind!r} is unknown: choose one of {', '.join(DIVERGENCES)}")


def soft_loss(student_logits, teacher_logits, temperature: float = 2.0, kind: str = "forward", skew: float = 0.1):
    """T^2 times the divergence of the distributions softmax(logits / T), per token (...).

    T^2 keeps the gradient's size as T grows: for T -> infinity the forward loss tends to half the mean-free
    squared distance of the logits over V, 1/(2V) ||z_s - z_t||^2 (Hinton et al. 2015, section 2.1).
    """
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    return temperature**2 * divergence(log_q, soft_targets(teacher_logits, temperature), kind, skew)


def hard_loss(student_logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Cross-entropy (...) of logits (..., V) with class indices (...), 0 where the target is `ignore_index`."""
    flat = F.cross_entropy(student_logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none")
    return flat.view_as(targets)


def sparse_divergence(log_q: torch.Tensor, indices: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of a p that is 0 outside k tokens: log_q (..., V), indices and log_p (..., k) -> (...).

    For an unbiased sample of the teacher's distribution (`cache.sparse`) its gradient is the full divergence's in the
    mean; its value is larger by what the sample lacks in entropy, the same for every student. Equal for k = V.
    """
    return (log_p.exp() * (log_p - log_q.gather(-1, indices))).sum(-1)


def _tiny(x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def as_real(feature: torch.Tensor) -> torch.Tensor:
    """Real features unchanged; complex (..., C) as (..., 2C), each channel's real and imaginary part apart."""
    return torch.view_as_real(feature.resolve_conj()).flatten(-2) if feature.is_complex() else feature


def feature_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """mean |s - t|^2 / mean |t|^2, a scalar: 1 for a student that outputs zeros, whatever the layer's scale.

    Both (..., C), real, or complex (real and imaginary part compared alike).
    """
    s, t = as_real(student), as_real(teacher)
    return F.mse_loss(s, t) / t.square().mean().clamp_min(_tiny(t))


def feature_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos(s, t) over the leading dimensions of (..., C), a scalar."""
    return 1 - F.cosine_similarity(as_real(student), as_real(teacher), dim=-1).mean()


def relational_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the token-token cosine similarities, a scalar; widths may differ.

    (B, N, C): the N x N similarities inside each sequence; (B, C): the B x B similarities of the batch
    (relational distillation, Park et al. 2019; similarity-preserving, Tung & Mori 2019).
    """
    s, t = (F.normalize(as_real(x), dim=-1) for x in (student, teacher))
    return F.mse_loss(s @ s.mT, t @ t.mT)


FEATURE_LOSSES = {"mse": feature_mse, "cosine": feature_cosine, "relational": relational_loss}
