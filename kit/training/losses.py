"""Training losses: next-token cross-entropy that never holds all logits, and classification."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AUXILIARY_WEIGHT = 0.01  # of the load-balancing loss: Fedus et al. 2021, "Switch Transformers", section 2.2
CPU_BLOCK = 30_000_000  # bytes of logits held at once: malloc maps 32 MB or more anew each time
CUDA_BLOCK = 2**29


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Tensor:
    """Mean cross-entropy of softmax(hidden @ weight.T + bias), computed `chunk` tokens at a time.

    The gradients are formed in the forward pass, where the block of logits is in cache, so neither all logits
    nor their gradient are ever in memory. Tensors that need no gradient cost nothing.

    hidden: (..., D) floating; weight: (V, D); bias: (V,) or None; targets: (...) int64 in [0, V) or
    `ignore_index`; chunk: tokens a block, by default what fits the cache. Under bfloat16 autocast (or with
    bfloat16 arguments) the matrix products are bfloat16, the softmax and all sums float32.

    Returns a scalar, the mean over tokens that are not ignored (nan when there is none, as F.cross_entropy).
    Raises ValueError for shapes that do not fit together and targets outside the vocabulary.
    """
    hidden, targets = _valid_tokens(hidden, weight, bias, targets, ignore_index)
    if not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    ):
        return _token_losses(hidden, weight, bias, targets, chunk)[0].mean()
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk)


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of each token in nats (0 where ignored) and whether the token is the most likely one, both shaped
    as `targets`; without gradients. Arguments and errors as in `linear_cross_entropy`."""
    kept = targets != ignore_index
    hidden, valid = _valid_tokens(hidden, weight, bias, targets, ignore_index)
    found, hits = _token_losses(hidden, weight, bias, valid, chunk)
    losses = found.new_zeros(targets.shape).masked_scatter_(kept, found)
    return losses, torch.zeros_like(kept).masked_scatter_(kept, hits)


@dataclass(frozen=True)
class VocabularySample:
    """A part of a large vocabulary that stands for the whole in one training step.

    The first `frequent` tokens and every target of the batch are always in it (byte-pair numbers follow frequency
    roughly: the first 2,048 of 30,000 are 77 % of the novels' tokens, the most frequent 2,048 would be 83 %); of the
    others one in `every` is, drawn anew each time, its exp(logit) counted `every` times: the softmax's denominator is estimated without bias (importance sampling: Bengio & Senecal 2008). Evaluation
    always takes the whole vocabulary.
    """

    frequent: int = 4096
    every: int = 16

    def draw(self, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Tokens (n,) int64, ascending, and (n,) the log of how often each counts."""
        sure = torch.zeros(vocabulary, dtype=torch.bool, device=targets.device)
        sure[: self.frequent] = True
        sure[targets[targets >= 0]] = True
        drawn = torch.rand(vocabulary, device=targets.device) * self.every < 1
        tokens = (sure | drawn).nonzero()[:, 0]
        return tokens, torch.where(sure[tokens], 0.0, math.log(self.every))

    def restrict(self, output: tuple[Tensor, Tensor | None], tokens: Tensor, log_counts: Tensor) -> tuple[Tensor, Tensor]:
        """An output layer (weight (V, D), bias (V,) or None) cut down to `tokens`."""
        weight, bias = output
        return weight[tokens], log_counts.to(weight.dtype) if bias is None else bias[tokens] + log_counts


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor], sample: VocabularySample | None = None) -> Tensor:
    """Cross-entropy of a language model (`hidden`, `output`, `auxiliary_loss`) on (inputs, targets), both (B,
    T) int64, plus its weighted auxiliary (load-balancing) loss. With a `sample` it is estimated on part of the vocabulary.

    On CPU, bfloat16 autocast is for the product with the vocabulary alone; in narrow layers its casts cost
    more than it saves.
    """
    inputs, targets = batch
    device = inputs.device.type
    with torch.autocast(device, enabled=device != "cpu" and torch.is_autocast_enabled(device)):
        hidden = model.hidden(inputs)
    output = model.output()
    if sample is not None:
        tokens, log_counts = sample.draw(targets, len(output[0]))
        output = sample.restrict(output, tokens, log_counts)
        targets = torch.where(targets < 0, targets, torch.searchsorted(tokens, targets.contiguous()))
    loss = linear_cross_entropy(hidden, *output, targets)
    return loss + AUXILIARY_WEIGHT * model.auxiliary_loss()


def training_loss(model: nn.Module) -> Callable:
    """`next_token_loss`, on a sample of the vocabulary where that is much smaller than the whole."""
    large = len(model.output()[0]) > 4 * VocabularySample.frequent
    return partial(next_token_loss, sample=VocabularySample()) if large else next_token_loss


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of `model(inputs)` (B, classes) against labels (B,) int64."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs).float(), labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        product = _product_dtype(hidden, weight)
        accumulator = torch.promote_types(product, torch.float32)
        h, w = _with_bias(hidden, weight, bias, product)
        hidden_grad, weight_grad, bias_grad = grads = [
            torch.zeros_like(t, dtype=accumulator) if needed else None
            for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad)
        ]
        losses = torch.empty(len(targets), dtype=accumulator, device=h.device)
        width = hidden.shape[1]
        with torch.autocast(h.device.type, enabled=False):
            for rows, block in _logit_blocks(h, w, chunk):
                losses[rows] = _errors_(block, h[rows], w, targets[rows])
                if hidden_grad is not None:
                    hidden_grad[rows] = block @ w[:, :width]
                if weight_grad is not None and product == accumulator:
                    weight_grad.addmm_(block.t(), h[rows, :width])
                elif weight_grad is not None:
                    weight_grad += block.t() @ h[rows, :width]
                if bias_grad is not None:
                    bias_grad += (block.new_ones(1, len(block)) @ block)[0]
        ctx.save_for_backward(*grads)
        ctx.dtypes = [t is not None and t.dtype for t in (hidden, weight, bias)]
        ctx.tokens = len(targets)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scale = grad / ctx.tokens
        grads = [g if g is None else (g * scale).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return *grads, None, None


@torch.no_grad()
def _token_losses(hidden, weight, bias, targets, chunk):
    product = torch.promote_types(_product_dtype(hidden, weight), torch.float32)
    h, w = _with_bias(hidden, weight, bias, product)
    losses = torch.empty(len(targets), dtype=product, device=h.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=h.device)
    with torch.autocast(h.device.type, enabled=False):
        for rows, block in _logit_blocks(h, w, chunk):
            correct[rows] = _hits(block, targets[rows])
            losses[rows] = _errors_(block, h[rows], w, targets[rows])
    return losses, correct


def _product_dtype(hidden, weight):
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _with_bias(hidden, weight, bias, dtype):
    """hidden and weight with the bias as one more column: adding it within the product costs no pass of its
    own."""
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if bias is None:
        return hidden, weight
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1), torch.cat(
        [weight, bias[:, None].to(dtype)], 1
    )


def _logit_blocks(h, w, chunk):
    """Yields (rows, h[rows] @ w.T). One buffer serves all: mapping fresh memory costs as much as filling
    it."""
    fitting = (CUDA_BLOCK if h.is_cuda else CPU_BLOCK) // (len(w) * h.element_size())
    chunk = min(chunk or max(16, fitting), max(1, len(h)))
    buffer = torch.empty(chunk, len(w), dtype=h.dtype, device=h.device)
    for start in range(0, len(h), chunk):
        rows = slice(start, start + chunk)
        yield rows, torch.mm(h[rows], w.t(), out=buffer[: len(h[rows])])


def _errors_(block, h, w, targets):
    """Turns logits (n, V) into softmax - one-hot in place and returns the losses (n,).

    At the target, the error is minus the sum of the others: exact in bfloat16 too, where 1 - p would be
    rounding.
    """
    at_target = torch.arange(len(block), device=block.device), targets  # scatter_ would copy the block
    probability = torch.softmax(block, 1, out=block)[at_target]
    block[at_target] = 0
    others = block.sum(1)
    block[at_target] = -others
    accumulator = torch.promote_types(block.dtype, torch.float32)
    probability, others = probability.to(accumulator), others.to(accumulator)
    losses = torch.where(probability > 0.5, -torch.log1p(-others), -probability.log())
    lost = (probability < 1e-30).nonzero()[
        :, 0
    ]  # too small for its digits: measure from the largest one instead
    if len(lost):
        top, h = block[lost].argmax(1), h[lost].to(accumulator)
        gap = (h * (w[top] - w[targets[lost]])).sum(1)
        losses[lost] = gap - block[lost, top].to(accumulator).log()
    return losses


def _hits(block, targets):
    """Whether the target is the argmax of each row; argmax, 10x slower than amax, sees only the
    candidates."""
    hits = block.gather(1, targets[:, None])[:, 0] == block.amax(1)
    candidates = hits.nonzero()[:, 0]
    hits[candidates] = block[candidates].argmax(1) == targets[candidates]
    return hits


def _valid_tokens(hidden, weight, bias, targets, ignore_index):
    """Flattens to (N, D) and (N,), without the ignored tokens."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit: give (..., D), (V, D) and (...)."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; the weight's {len(weight)} rows need {(len(weight),)}."
        )
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kept = targets != ignore_index
    if not kept.all():
        hidden, targets = hidden[kept], targets[kept]
    if len(targets) and (targets.min() < 0 or targets.max() >= len(weight)):
        raise ValueError(
            f"targets span {targets.min().item()}..{targets.max().item()}, outside the vocabulary of "
            f"{len(weight)}: tokenize with the vocabulary the model was built for."
        )
    return hidden, targets
