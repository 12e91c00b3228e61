"""The distillation loss over a large vocabulary, chunk by chunk: no full logit tensor, of student or teacher, exists.

Gradients are computed in the forward pass, while a chunk's logits are at hand, in five buffers of (rows, V) that
every chunk reuses; the backward pass only multiplies by the incoming scalar. The soft and the hard loss come from
one product of the student's hidden states with its output matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from kit.distillation.divergences import DIVERGENCES

CPU_BLOCK = 2**19  # logits a buffer: 2 MB in float32, so that all five stay in cache
CUDA_BLOCK = 2**26


class Output(NamedTuple):
    """What a language model's logits are made of: hidden (..., D) @ weight (V, D).T + bias (V,) or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


class SparseTarget(NamedTuple):
    """Cached targets: k tokens of the vocabulary, indices (..., k) int64, and the log of their probabilities, (..., k),
    which sum to 1 and stand for the whole distribution (`cache.sparse`)."""

    indices: torch.Tensor
    log_p: torch.Tensor


class FusedLoss(NamedTuple):
    """Scalars: `total` carries the gradient, `soft` (with its T^2) and `hard` are for the log."""

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor


def linear_distillation(
    student: Output, targets: torch.Tensor, soft, *, temperature: float = 2.0, alpha: float = 0.7,
    kind: str = "forward", skew: float = 0.1, ignore_index: int = -100, chunk: int | None = None,
) -> FusedLoss:  # fmt: skip
    """alpha * soft + (1 - alpha) * hard, mean over the tokens whose target (...) is not `ignore_index`.

    `soft` is a sequence of teachers' `Output`s (the mean of their probabilities is the target), or a `SparseTarget`,
    whose probabilities must belong to the same temperature. `chunk` is the number of tokens a pass.
    Differentiable in the student's hidden, weight and bias. Raises ValueError when the vocabularies differ, when
    no token is left, or when `kind` is unknown or not "forward" with a `SparseTarget`.
    """
    _check(student, soft, kind)
    keep = (targets != ignore_index).flatten()
    if not keep.any():
        raise ValueError(f"every target is {ignore_index}: a batch needs at least one token to learn from")
    rows = slice(None) if keep.all() else keep
    hidden = student.hidden.flatten(0, -2).to(student.weight.dtype)[rows]
    if isinstance(soft, SparseTarget):
        target = _Sparse(*(_flat(x, targets)[rows] for x in soft))
    else:
        target = _FullTarget([Output(t.hidden.detach().flatten(0, -2)[rows], *t[1:]) for t in soft], kind, skew)
    block = CUDA_BLOCK if hidden.is_cuda else CPU_BLOCK
    chunk = chunk or max(16, block // len(student.weight))
    settings = (target, temperature, alpha, chunk)
    return FusedLoss(*_Fused.apply(hidden, student.weight, student.bias, targets.flatten()[rows], settings))


def _flat(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, targets.dim() - 1)


def _check(student: Output, soft, kind: str) -> None:
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence {kind!r} is unknown: choose one of {', '.join(DIVERGENCES)}")
    if isinstance(soft, SparseTarget):
        if kind != "forward":
            raise ValueError(f"cached targets know the forward divergence only, not {kind!r}: use the teacher")
        return
    for teacher in soft:
        if len(teacher.weight) != len(student.weight):
            raise ValueError(f"the student has a vocabulary of {len(student.weight)}, the teacher of "
                             f"{len(teacher.weight)}: soft targets need the same tokenizer")  # fmt: skip


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings):
        with torch.autocast(hidden.device.type, enabled=False):
            grads, soft, hard = _passes(hidden, weight, bias, targets, *settings, ctx.needs_input_grad)
        ctx.save_for_backward(*grads)
        alpha = settings[2]
        total = alpha * soft + (1 - alpha) * hard
        ctx.mark_non_differentiable(soft, hard)
        return total, soft, hard

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):
        return *(None if g is None else g * grad_total for g in ctx.saved_tensors), None, None


def _passes(hidden, weight, bias, targets, target, temperature, alpha, chunk, wanted):
    """Gradients of (hidden, weight, bias), None where not wanted, and the means of the soft and the hard loss."""
    tensors = (hidden, weight, bias)
    grads = [torch.zeros_like(t) if t is not None and need else None for t, need in zip(tensors, wanted, strict=False)]
    buffers = hidden.new_empty(5, min(chunk, len(hidden)), len(weight))
    soft, hard, n = hidden.new_zeros(()), hidden.new_zeros(()), len(hidden)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        h, own = hidden[rows], targets[rows, None]
        logits, error, q, p, log_p = buffers[:, : len(h)]
        _logits(h, weight, bias, out=logits)
        log_z = _softmax(logits, out=error)
        hard += (log_z - logits.gather(1, own)).sum()
        if alpha == temperature == 1:  # the same softmax, and no other gradient
            soft += target(rows, logits, log_z, error, temperature, p, log_p)
            error.div_(n)
        else:
            error.scatter_add_(1, own, error.new_full((len(h), 1), -1.0)).mul_((1 - alpha) / n)
            if alpha:
                log_z = _softmax(logits.div_(temperature), out=q)
                soft += target(rows, logits, log_z, q, temperature, p, log_p)
                error.add_(q, alpha=alpha * temperature / n)
        _accumulate(grads, rows, h, weight, error)
    return grads, soft.mul_(temperature**2 / n), hard.div_(n)


def _logits(hidden, weight, bias, out):
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def _softmax(logits, out):
    """Fills `out` with softmax(logits), returns the log of its denominator (n, 1), exact for any logits: the
    largest probability is exp(largest - log z)."""
    torch.softmax(logits, 1, out=out)
    return logits.amax(1, keepdim=True) - out.amax(1, keepdim=True).log()


def _accumulate(grads, rows, hidden, weight, error):
    if grads[0] is not None:
        torch.mm(error, weight, out=grads[0][rows])
    if grads[1] is not None:
        grads[1].addmm_(error.T, hidden)
    if grads[2] is not None:
        grads[2].addmv_(error.T, error.new_ones(len(error)))


class _FullTarget:
    """Called with the student's logits / T and their softmax q: returns the summed divergence and leaves its
    gradient with respect to logits / T in q. p and log_p are buffers."""

    def __init__(self, teachers, kind, skew):
        self.teachers, self.kind, self.skew = teachers, kind, skew

    def __call__(self, rows, logits, log_z, q, temperature, p, log_p):
        shift = mean_probabilities(self.teachers, rows, temperature, p, log_p)
        if self.kind == "forward":
            value = torch.dot(p.flatten(), log_p.sub_(logits).flatten()) + (log_z - shift).sum()
            q.sub_(p)
            return value
        if self.kind == "reverse":
            ratio = log_p.neg_().add_(logits).add_(shift - log_z)
            value = (q * ratio).sum(1, keepdim=True)
            q.mul_(ratio.sub_(value))
            return value.sum()
        mixture = (p * self.skew).add_(q, alpha=1 - self.skew).clamp_min_(torch.finfo(p.dtype).tiny)
        value = (p * (log_p - shift - mixture.log())).sum()
        slope = p.div_(mixture).mul_(self.skew - 1)
        q.mul_(slope - (q * slope).sum(1, keepdim=True))
        return value


def mean_probabilities(teachers: Sequence[Output], rows: slice, temperature: float, p, log_p) -> torch.Tensor:
    """Fill p (rows, V) with the mean of the teachers' probabilities for those rows of their hidden states (tokens, D),
    and log_p with its log up to the returned (rows, 1) to subtract; takes no memory for a single teacher."""
    if len(teachers) == 1:
        hidden, weight, bias = teachers[0]
        _logits(hidden[rows], weight, bias, out=log_p)
        return _softmax(log_p.div_(temperature), out=p)
    p.zero_()
    for hidden, weight, bias in teachers:
        _logits(hidden[rows], weight, bias, out=log_p)
        p.add_(torch.softmax(log_p.div_(temperature), 1, out=log_p), alpha=1 / len(teachers))
    torch.log(p.clamp_min_(torch.finfo(p.dtype).tiny), out=log_p)
    return p.new_zeros(len(p), 1)


class _Sparse:
    """As `_FullTarget`, from k probabilities (`losses.sparse_divergence`)."""

    def __init__(self, indices, log_p):
        self.indices, self.log_p = indices, log_p

    def __call__(self, rows, logits, log_z, q, *_):
        indices, log_p = self.indices[rows], self.log_p[rows]
        p = log_p.exp()
        q.scatter_add_(1, indices, -p)
        return (p * (log_p - logits.gather(1, indices) + log_z)).sum()
