"""The distillation loss over a large vocabulary, chunk by chunk: no full logit tensor, of student or teacher, exists.

Gradients are computed in the forward pass, while a chunk's logits are at hand, in four buffers of (rows, V) that
every chunk reuses; the backward pass only multiplies by the incoming scalar. The soft and the hard loss come from
one product of the student's hidden states with its output matrix.
"""

from typing import NamedTuple

import torch

from kit.distillation.losses import DIVERGENCES

CHUNK_ELEMENTS = 1 << 22  # logits a buffer: 16 MB in float32


class Output(NamedTuple):
    """What a language model's logits are made of: hidden (..., D) @ weight (V, D).T + bias (V,) or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


class TopK(NamedTuple):
    """Cached targets: indices (..., k) int64, log_p (..., k), and the log of the remaining mass, log_tail (...)."""

    indices: torch.Tensor
    log_p: torch.Tensor
    log_tail: torch.Tensor


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

    `soft` is a sequence of teachers' `Output`s (the mean of their probabilities is the target), or a `TopK`, whose
    probabilities must belong to the same temperature. `chunk` is the number of tokens a pass.
    Differentiable in the student's hidden, weight and bias. Raises ValueError when the vocabularies differ, when
    no token is left, or when `kind` is unknown or not "forward" with a `TopK`.
    """
    _check(student, soft, kind)
    keep = (targets != ignore_index).flatten()
    if not keep.any():
        raise ValueError(f"every target is {ignore_index}: a batch needs at least one token to learn from")
    rows = slice(None) if keep.all() else keep
    hidden = student.hidden.flatten(0, -2).to(student.weight.dtype)[rows]
    if isinstance(soft, TopK):
        target = _TopKTarget(*(_flat(x, targets)[rows] for x in soft))
    else:
        target = _FullTarget([Output(t.hidden.detach().flatten(0, -2)[rows], *t[1:]) for t in soft], kind, skew)
    chunk = chunk or max(16, CHUNK_ELEMENTS // len(student.weight))
    settings = (target, temperature, alpha, chunk)
    return FusedLoss(*_Fused.apply(hidden, student.weight, student.bias, targets.flatten()[rows], settings))


def _flat(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, targets.dim() - 1)


def _check(student: Output, soft, kind: str) -> None:
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence {kind!r} is unknown: choose one of {', '.join(DIVERGENCES)}")
    if isinstance(soft, TopK):
        if kind != "forward":
            raise ValueError(f"cached top-k targets know the forward divergence only, not {kind!r}: use the teacher")
        return
    for teacher in soft:
        if len(teacher.weight) != len(student.weight):
            raise ValueError(f"the student has a vocabulary of {len(student.weight)}, the teacher of "
                             f"{len(teacher.weight)}: soft targets need the same tokenizer")  # fmt: skip


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings):
        target, temperature, alpha, chunk = settings
        wants = ctx.needs_input_grad
        grads = [torch.empty_like(hidden), torch.zeros_like(weight) if wants[1] else None,
                 torch.zeros_like(bias) if wants[2] else None]  # fmt: skip
        buffers = hidden.new_empty(4, min(chunk, len(hidden)), len(weight))
        soft, hard = hidden.new_zeros(()), hidden.new_zeros(())
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows]
            logits, grad, log_q, scratch = buffers[:, : len(h)]
            _logits(h, weight, bias, out=logits)
            hard += _hard(logits, targets[rows], grad, 1 - alpha)
            if alpha:
                torch.log_softmax(logits.div_(temperature), -1, out=log_q)
                soft += target(rows, log_q, temperature, logits, scratch)
                grad.add_(log_q, alpha=alpha * temperature)
            _accumulate(grads, rows, h, weight, grad)
        n = len(hidden)
        ctx.save_for_backward(*(None if g is None else g.div_(n) for g in grads))
        soft.mul_(temperature**2 / n), hard.div_(n)
        total = alpha * soft + (1 - alpha) * hard
        ctx.mark_non_differentiable(soft, hard)
        return total, soft, hard

    @staticmethod
    def backward(ctx, grad_total, *_):
        return *(None if g is None else g * grad_total for g in ctx.saved_tensors), None, None


def _logits(hidden, weight, bias, out):
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def _hard(logits, targets, grad, share):
    """Sum of the cross-entropy; `grad` becomes `share` times its gradient."""
    torch.log_softmax(logits, -1, out=grad)
    loss = -grad.gather(1, targets[:, None]).sum()
    if not share:
        grad.zero_()
        return loss
    grad.exp_().mul_(share)
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -share))
    return loss


def _accumulate(grads, rows, hidden, weight, grad):
    torch.mm(grad, weight, out=grads[0][rows])
    if grads[1] is not None:
        grads[1].addmm_(grad.T, hidden)
    if grads[2] is not None:
        grads[2].add_(grad.sum(0))


class _FullTarget:
    """Called with log q in a buffer: returns the summed divergence, leaves its gradient for logits / T there."""

    def __init__(self, teachers, kind, skew):
        self.teachers, self.kind, self.skew = teachers, kind, skew

    def __call__(self, rows, log_q, temperature, p, log_p):
        self._probabilities(rows, temperature, p, log_p)
        if self.kind == "forward":
            value = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
            log_q.exp_().sub_(p)
            return value
        if self.kind == "reverse":
            ratio, q = log_p.neg_().add_(log_q), log_q.exp_()
            value = (q * ratio).sum(-1, keepdim=True)
            q.mul_(ratio.sub_(value))
            return value.sum()
        q = log_q.exp_()
        mixture = torch.add(p * self.skew, q, alpha=1 - self.skew)
        value = torch.xlogy(p, log_p.exp_().div_(mixture)).sum()
        slope = p.div_(mixture).mul_(self.skew - 1)
        q.mul_(slope - (q * slope).sum(-1, keepdim=True))
        return value

    def _probabilities(self, rows, temperature, p, log_p):
        """Fill `p` and `log_p` with the mean of the teachers' probabilities and its logarithm."""
        for i, (hidden, weight, bias) in enumerate(self.teachers):
            _logits(hidden[rows], weight, bias, out=log_p)
            if len(self.teachers) == 1:
                log_p.copy_(torch.log_softmax(log_p.div_(temperature), -1, out=p))
                p.exp_()
                return
            mean = torch.softmax(log_p.div_(temperature), -1).div_(len(self.teachers))
            p.copy_(mean) if i == 0 else p.add_(mean)
        torch.log(p.clamp_min_(torch.finfo(p.dtype).tiny), out=log_p)


class _TopKTarget:
    """As `_FullTarget`, from k probabilities and the mass of the rest (`losses.top_k_divergence`)."""

    def __init__(self, indices, log_p, log_tail):
        self.indices, self.log_p, self.log_tail = indices, log_p, log_tail

    def __call__(self, rows, log_q, temperature, *_):
        indices, log_p, log_tail = self.indices[rows], self.log_p[rows], self.log_tail[rows]
        p, tail = log_p.exp(), log_tail.exp()
        known = log_q.gather(1, indices)
        q = log_q.exp_().scatter_(1, indices, 0)
        rest = q.sum(1).clamp_min_(torch.finfo(q.dtype).tiny)
        q.mul_((1 - tail / rest)[:, None]).scatter_(1, indices, known.exp() - p)
        return (p * (log_p - known)).sum() + torch.where(tail > 0, tail * (log_tail - rest.log()), 0).sum()
