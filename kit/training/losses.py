"""Losses of a large output layer, a block of tokens at a time, and of classifiers.

All logits of a batch are never in memory, nor their gradient: each block's is formed in the forward
pass, while its logits are in cache, and the backward pass only multiplies by the incoming scalar.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kit.core.protocols import TARGETS, Call, LanguageModel, adapt, bare, call_of, tensors_of
from kit.core.settings import Count, settings

IGNORED = -100  # as a target: this token does not count
AUXILIARY_WEIGHT = 0.01  # of the load-balancing loss: Fedus et al. 2021, "Switch Transformers", 2.2
CPU_BLOCK = 30_000_000  # bytes of logits held at once: malloc maps 32 MB or more anew each time
CUDA_BLOCK = 2**29
FUNCTION_BLOCK = 2**22  # bytes on a CPU where autograd holds several: they stay in cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """Mean cross-entropy of softmax(hidden @ weight.T + bias), without holding all logits.

    Args:
        hidden: (..., D). weight: (V, D). bias: (V,) or None. Under bfloat16 autocast, or if these
            are bfloat16, the products are bfloat16; the softmax and all sums are float32.
        targets: (...) integers in [0, V), or -100 for tokens that do not count.
        chunk: tokens a block; by default what fits the cache.

    Returns a scalar, 0 when no token counts: such a batch teaches nothing.
    Raises ValueError for shapes that do not fit together and targets outside the vocabulary.
    """
    trained = any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if not (trained and torch.is_grad_enabled()):
        losses, _ = linear_token_losses(hidden, weight, bias, targets, chunk)
        return losses.sum() / (targets != IGNORED).sum().clamp(min=1)
    hidden, targets = _counted(hidden, weight, bias, targets)

    def block(logits, rows, h, w):
        return _errors_(logits, h, w, targets[rows]).sum()[None], logits

    dtype = _product_dtype(hidden, weight)
    return _Blocks.apply(hidden, weight, bias, block, dtype, chunk)[0] / max(len(targets), 1)


@torch.no_grad()
def linear_token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's loss in nats (0 where it does not count) and whether the target is its most
    likely token, both shaped as `targets`. Arguments and errors as in `linear_cross_entropy`."""
    counted = targets != IGNORED
    hidden, targets = _counted(hidden, weight, bias, targets)
    dtype = torch.promote_types(_product_dtype(hidden, weight), torch.float32)
    h, w = _with_bias(hidden, weight, bias, dtype)
    found = torch.empty(len(targets), dtype=dtype, device=h.device)
    hits = torch.empty(len(targets), dtype=torch.bool, device=h.device)
    with torch.autocast(h.device.type, enabled=False):
        for rows, logits in _logit_blocks(h, w, chunk):
            hits[rows] = _hits(logits, targets[rows])
            found[rows] = _errors_(logits, h[rows], w, targets[rows])
    losses = found.new_zeros(counted.shape).masked_scatter_(counted, found)
    return losses, torch.zeros_like(counted).masked_scatter_(counted, hits)


def chunked_linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: Callable, chunk: int | None = None
) -> tuple[Tensor, ...]:
    """Any loss of the logits hidden @ weight.T + bias, without holding all of them.

    Args:
        hidden: (N, D). weight: (V, D). bias: (V,) or None. Products are at least float32.
        loss: (logits (n, V), rows), with `rows` the slice of the N tokens, returns a tuple of
            scalars, each a sum over these tokens: the loss, and whatever else is to be known.
        chunk: tokens a block; by default what fits the cache.

    Returns the tuple summed over all tokens. Its first entry carries gradients, by autograd.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if chunk is None and not hidden.is_cuda:
        chunk = max(16, FUNCTION_BLOCK // (len(weight) * dtype.itemsize))

    def block(logits, rows, h, w):
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            values = loss(logits, rows)
        (error,) = torch.autograd.grad(values[0], logits)
        return torch.stack([value.detach() for value in values]), error

    total, values = _Blocks.apply(hidden, weight, bias, block, dtype, chunk)
    return total, *values[1:]


class _Blocks(torch.autograd.Function):
    """Sums of block(logits (n, V), rows, h[rows], w) -> (values (k,), error (n, V)) over all
    tokens; error is the gradient of values[0] by the logits h[rows] @ w.T."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, block, dtype, chunk):
        width, high = hidden.shape[1], torch.promote_types(dtype, torch.float32)
        needed = zip((hidden, weight, bias), ctx.needs_input_grad)
        grads = [torch.zeros_like(t, dtype=high) if need else None for t, need in needed]
        h, w = _with_bias(hidden, weight, bias, dtype)
        total = hidden.new_zeros(1, dtype=high)
        with torch.autocast(h.device.type, enabled=False):
            for rows, logits in _logit_blocks(h, w, chunk):
                values, error = block(logits, rows, h[rows], w)
                total = total + values
                _accumulate(grads, rows, error, h[rows, :width], w[:, :width])
        ctx.save_for_backward(*grads)
        ctx.dtypes = [t is not None and t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(total)
        return total[0].clone(), total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        grads = zip(ctx.saved_tensors, ctx.dtypes)
        return *(g if g is None else (g * scale).to(dtype) for g, dtype in grads), None, None, None


def _accumulate(grads, rows, error, h, w):
    hidden_grad, weight_grad, bias_grad = grads
    if hidden_grad is not None:
        hidden_grad[rows] = error @ w
    if weight_grad is not None and error.dtype == weight_grad.dtype:
        weight_grad.addmm_(error.t(), h)
    elif weight_grad is not None:
        weight_grad += error.t() @ h
    if bias_grad is not None:
        bias_grad += (error.new_ones(1, len(error)) @ error)[0]


def _product_dtype(hidden, weight):
    half = torch.is_autocast_enabled(kind := hidden.device.type) and torch.get_autocast_dtype(kind)
    return half if half == torch.bfloat16 else torch.promote_types(hidden.dtype, weight.dtype)


def _with_bias(hidden, weight, bias, dtype):
    """The bias as one more column of the weight: within the product it costs no pass of its own."""
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if bias is None:
        return hidden, weight
    ones = hidden.new_ones(len(hidden), 1)
    return torch.cat([hidden, ones], 1), torch.cat([weight, bias[:, None].to(dtype)], 1)


def _logit_blocks(h: Tensor, w: Tensor, chunk: int | None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, h[rows] @ w.T), block by block, in one buffer: fresh memory is as slow."""
    fitting = (CUDA_BLOCK if h.is_cuda else CPU_BLOCK) // (len(w) * h.element_size())
    chunk = min(chunk or max(16, fitting), max(1, len(h)))
    buffer = torch.empty(chunk, len(w), dtype=h.dtype, device=h.device)
    for start in range(0, len(h), chunk):
        rows = slice(start, start + chunk)
        yield rows, torch.mm(h[rows], w.t(), out=buffer[: len(h[rows])])


def _errors_(logits, h, w, targets):
    """Turns logits (n, V) into softmax - one-hot in place and returns the losses (n,). At the
    target, the error is minus the sum of the others: exact where bfloat16 loses 1 - p."""
    at_target = torch.arange(len(logits), device=logits.device), targets
    probability = torch.softmax(logits, 1, out=logits)[at_target]
    logits[at_target] = 0  # scatter_ would copy the block
    others = logits.sum(1)
    logits[at_target] = -others
    high = torch.promote_types(logits.dtype, torch.float32)
    probability, others = probability.to(high), others.to(high)
    losses = torch.where(probability > 0.5, -torch.log1p(-others), -probability.log())
    lost = (probability < 1e-30).nonzero()[:, 0]
    if len(lost):  # too small for its digits: measure from the largest probability instead
        top, h = logits[lost].argmax(1), h[lost].to(high)
        gap = (h * (w[top] - w[targets[lost]])).sum(1)
        losses[lost] = gap - logits[lost, top].to(high).log()
    return losses


def _hits(logits, targets):
    """Whether the target is each row's argmax, which is slow: it sees only the candidates."""
    hits = logits.gather(1, targets[:, None])[:, 0] == logits.amax(1)
    candidates = hits.nonzero()[:, 0]
    hits[candidates] = logits[candidates].argmax(1) == targets[candidates]
    return hits


def _counted(hidden, weight, bias, targets):
    """Flattens to (N, D) and (N,), without the tokens that do not count."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, weight, targets))
        need = "hidden (..., D), weight (V, D) and targets (...)"
        raise ValueError(f"shapes {shapes} do not fit: give {need}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be {(len(weight),)}.")
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    counted = targets != IGNORED
    if not counted.all():
        hidden, targets = hidden[counted], targets[counted]
    check_range(targets, len(weight))
    return hidden, targets


def check_range(targets: Tensor, classes: int) -> None:
    """Raises ValueError for targets that count, (n,) int64, and are no class."""
    if len(targets) and (targets.min() < 0 or targets.max() >= classes):
        span = f"{targets.min()}..{targets.max()}, outside the vocabulary of {classes}"
        raise ValueError(f"targets span {span}: use its own, {IGNORED} for what does not count.")


@settings
class VocabularySample:
    """A part of a large vocabulary that stands for the whole in one training step.

    The first `frequent` tokens and every target of the batch are always in it (numbers of byte
    pairs follow frequency roughly: the first 2,048 of 30,000 are 77 % of the novels' tokens). Of
    the others one in `every` is, drawn anew each time, its exp(logit) counted `every` times: the
    softmax's denominator is estimated without bias (importance sampling, Bengio & Senecal 2008).
    """

    frequent: Count = 4096
    every: Count = 16

    def draw(self, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Tokens (n,) int64, ascending, and (n,) the log of how often each counts."""
        sure = torch.zeros(vocabulary, dtype=torch.bool, device=targets.device)
        sure[: self.frequent] = True
        sure[targets[targets >= 0]] = True
        drawn = torch.rand(vocabulary, device=targets.device) * self.every < 1
        tokens = (sure | drawn).nonzero()[:, 0]
        return tokens, torch.where(sure[tokens], 0.0, math.log(self.every))

    def restrict(self, targets: Tensor, *layers: tuple[Tensor, Tensor | None]) -> tuple:
        """The targets as numbers within a new sample, then each output layer cut to it."""
        tokens, logs = self.draw(targets, len(layers[0][0]))
        own = torch.where(targets < 0, targets, torch.searchsorted(tokens, targets.contiguous()))
        return own, *((w[tokens], logs.to(w) if b is None else b[tokens] + logs) for w, b in layers)


def next_token_loss(model: LanguageModel, batch, sample: VocabularySample | None = None) -> Tensor:
    """Cross-entropy of a language model on a batch (inputs, targets), both (B, T) int64, or any
    that `call_of` understands, plus its weighted auxiliary loss; on a `sample` if there is one. On
    a CPU, bfloat16 autocast is for the product with the vocabulary alone: its casts cost."""
    if not isinstance(model := adapt(model), LanguageModel):
        what = f"{type(model).__name__} is no LanguageModel"
        raise ValueError(f"{what}: adapt it, or pass loss=classification_loss.")
    call = labelled(batch, model)
    targets, device = call.targets, call.targets.device.type
    with torch.autocast(device, enabled=device != "cpu" and torch.is_autocast_enabled(device)):
        hidden = call(model.hidden)
    output = model.output()
    if sample is not None:
        targets, output = sample.restrict(targets, output)
    loss = linear_cross_entropy(hidden, *output, targets)
    return loss + AUXILIARY_WEIGHT * model.auxiliary_loss()


def classification_loss(model: nn.Module, batch) -> Tensor:
    """Mean cross-entropy of a model's logits (`logits_of`) against labels, integers of the same
    shape without the classes, -100 where they do not count, or probabilities of the same shape.

    A model whose forward takes the labels of a batch that is a mapping, and returns its `loss`, is
    trained with that. Raises ValueError for other targets.
    """
    if own := _takes_labels(model, batch):
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            what = f"{type(model).__name__} takes {own!r} and returns no loss"
            raise ValueError(f"{what}: pass loss=, or give (inputs, targets).")
        return loss
    call = labelled(batch, model)
    logits = logits_of(call(model), call.targets)
    targets = flat_targets(call.targets, logits.shape)
    counted = len(targets) if targets.ndim > 1 else int((targets != IGNORED).sum())
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, targets, reduction="sum") / max(counted, 1)


def _takes_labels(model: nn.Module, batch) -> str | None:
    """The entry of a mapping that is its targets, if the model's forward has such an argument."""
    names = [name for name in TARGETS if isinstance(batch, Mapping) and name in batch]
    found = names and names[0] in inspect.signature(model.forward).parameters
    return names[0] if found else None


def flat_targets(targets: Tensor, shape: Sequence[int]) -> Tensor:
    """Targets of logits of `shape` (..., C): class numbers as int64 (N,), or probabilities as
    float32 (N, C). Raises ValueError for targets that are neither."""
    *leading, classes = shape
    if targets.shape == (*leading,) and not targets.is_floating_point():
        flat = targets.reshape(-1).long()
        check_range(flat[flat != IGNORED], classes)
        return flat
    if targets.shape == (*leading, classes) and classes > 1 and leading:
        flat = targets.reshape(-1, classes).float()
        if ((flat.sum(-1) - 1).abs() < 1e-3).all() and (flat >= 0).all():
            return flat
    found = f"{targets.dtype} of shape {tuple(targets.shape)} for logits {tuple(shape)}"
    need = "class numbers, or probabilities over the last axis, or pass a loss of your own"
    raise ValueError(f"targets are {found}: give {need}.")


def training_loss(model: nn.Module) -> Callable:
    """What trains a model on labels: for a language model `next_token_loss`, on a sample of the
    vocabulary where that is much smaller, and for any other `classification_loss`."""
    if not isinstance(model := adapt(model), LanguageModel):
        return classification_loss
    large = len(model.output()[0]) > 4 * VocabularySample.frequent
    return partial(next_token_loss, sample=VocabularySample()) if large else next_token_loss


def labelled(batch, model: nn.Module | None = None) -> Call:
    """`call_of` a batch, class numbers as int64. Raises ValueError without, and for a model of
    transformers whose outputs are no logits of classes."""
    call, config = call_of(batch, model), getattr(bare(model), "config", None)
    problem = getattr(config, "problem_type", None)
    if getattr(config, "num_labels", 0) == 1 and not isinstance(model, LanguageModel):
        problem = "regression"  # as transformers reads it
    if problem in ("regression", "multi_label_classification"):
        what = f"{type(bare(model)).__name__} solves a {problem}, whose outputs are no class logits"
        raise ValueError(f"{what}: train it on mappings by its own loss, and measure that")
    if not isinstance(targets := call.targets, Tensor):
        found = "no targets" if targets is None else f"a {type(targets).__name__} of targets"
        raise ValueError(f"a batch holds {found}: give (inputs, targets) or a dict with labels.")
    return call if targets.is_floating_point() else replace(call, targets=targets.long())


def logits_of(output, targets: Tensor | None = None) -> Tensor:
    """The logits (..., C) in what a model returned: a tensor, the entry called `logits`, or else
    the first tensor. The classes come last, also of (B, C, ...) for targets (B, ...); where both
    would fit, (B, T, V) are tokens and (B, C, H, W) pixels."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    logits = tensors_of(output)[0] if named is None else named
    if targets is None or logits.ndim < 3 or targets.shape != (len(logits), *logits.shape[2:]):
        return logits
    tokens = logits.ndim == 3 and targets.shape == logits.shape[:-1]
    return logits if tokens else logits.movedim(1, -1)
