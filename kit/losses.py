"""Training losses: next-token cross-entropy that never holds all logits, and classification."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AUXILIARY_WEIGHT = 0.01  # of the load-balancing loss: Fedus et al. 2021, "Switch Transformers", section 2.2
CPU_BLOCK = 2**22  # logits held at once: 16 MB of float32, which stays in a last-level cache
CUDA_BLOCK = 2**27


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
    losses = torch.zeros(targets.shape, dtype=_dtypes(hidden, weight)[1], device=hidden.device)
    correct = torch.zeros_like(kept)
    hidden, targets = _valid_tokens(hidden, weight, bias, targets, ignore_index)
    losses[kept], correct[kept] = _token_losses(hidden, weight, bias, targets, chunk)
    return losses, correct


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a language model (`hidden`, `output`, `auxiliary_loss`) on (inputs, targets), both (B,
    T) int64, plus its weighted auxiliary (load-balancing) loss."""
    inputs, targets = batch
    loss = linear_cross_entropy(model.hidden(inputs), *model.output(), targets)
    return loss + AUXILIARY_WEIGHT * model.auxiliary_loss()


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of `model(inputs)` (B, classes) against labels (B,) int64."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs).float(), labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        product, accumulator = _dtypes(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(product), weight.to(product)
            hidden_grad, weight_grad, bias_grad = grads = [
                torch.zeros_like(t, dtype=accumulator) if needed else None
                for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad)
            ]
            losses = torch.empty(len(targets), dtype=accumulator, device=hidden.device)
            for rows, block in _logit_blocks(h, w, chunk):
                losses[rows], sums = _errors_(block, bias, targets[rows], bias_grad is not None)
                if hidden_grad is not None:
                    hidden_grad[rows] = block @ w
                if weight_grad is not None and product == accumulator:
                    weight_grad.addmm_(block.t(), h[rows])
                elif weight_grad is not None:
                    weight_grad += block.t() @ h[rows]
                if bias_grad is not None:
                    bias_grad += sums
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
    product, accumulator = _dtypes(hidden, weight)
    losses = torch.empty(len(targets), dtype=accumulator, device=hidden.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, block in _logit_blocks(hidden.to(product), weight.to(product), chunk):
            block = _add_bias_(block.to(accumulator), bias)
            correct[rows] = _hits(block, targets[rows])
            losses[rows] = _softmax_(block, targets[rows])
    return losses, correct


def _logit_blocks(h, w, chunk):
    """Yields (rows, h[rows] @ w.T). One buffer serves all: mapping fresh memory costs as much as filling
    it."""
    limit = CUDA_BLOCK if h.is_cuda else CPU_BLOCK
    chunk = min(chunk or max(16, limit // len(w)), max(1, len(h)))
    buffer = torch.empty(chunk, len(w), dtype=h.dtype, device=h.device)
    for start in range(0, len(h), chunk):
        rows = slice(start, start + chunk)
        yield rows, torch.mm(h[rows], w.t(), out=buffer[: len(h[rows])])


def _errors_(block, bias, targets, summed):
    """Turns logits without their bias into softmax - one-hot in place; returns the losses and the column
    sums."""
    if block.dtype == torch.bfloat16 and block.device.type == "cpu":
        from kit.softmax_kernel import softmax_errors_  # numba takes half a second to import

        return softmax_errors_(block, bias, targets)
    errors = _add_bias_(block.to(torch.promote_types(block.dtype, torch.float32)), bias)
    losses = _softmax_(errors, targets)
    errors[torch.arange(len(errors), device=errors.device), targets] -= 1
    if errors is not block:
        block.copy_(errors)
    return losses, errors.t().mv(errors.new_ones(len(errors))) if summed else None


def _add_bias_(block, bias):
    return block if bias is None else block.add_(bias)


def _softmax_(block, targets):
    """Turns logits (n, V) into probabilities in place and returns the losses (n,). Exact however small the
    target's probability: the log-sum-exp comes from the largest probability, which is 1 / sum(exp(x -
    max))."""
    target, largest = block.gather(1, targets[:, None])[:, 0], block.amax(1)
    torch.softmax(block, 1, out=block)
    return largest - target - block.amax(1).log()


def _hits(block, targets):
    """Whether the target is the argmax of each row; argmax, 10x slower than amax, sees only the
    candidates."""
    hits = block.gather(1, targets[:, None])[:, 0] == block.amax(1)
    candidates = hits.nonzero()[:, 0]
    hits[candidates] = block[candidates].argmax(1) == targets[candidates]
    return hits


def _dtypes(hidden, weight):
    """(dtype of the matrix products, dtype of the softmax and the sums)."""
    product = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type):
        product = torch.get_autocast_dtype(hidden.device.type)
    return product, torch.promote_types(product, torch.float32)


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
