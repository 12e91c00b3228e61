"""Rate-distortion training: the entropy-coded size of the codes as a differentiable term of the loss.

The range coder (kit.coding) spends on a code about what a two-sided geometric distribution with the local mean
magnitude m would: with theta = (sqrt(1 + m^2) - 1) / m,

    bits(m) = -log2((1 - theta) / (1 + theta)) - m log2(theta).

So the size of a weight matrix is a function of mean |code| in cells of rows x columns, its gradient an adaptive L1
pull, and the step size, learned with it (LSQ), weighs bits against loss. Loss + lambda * bits as in Ball\u00e9 et al. 2017
(arXiv:1611.01704) and, for weights, Oktay et al. 2020 (arXiv:1906.06624).
"""

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from kit import coding
from kit.parametrization import named_weights, original_of, set_steps, steps_of
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize, matrix_shape
from kit.quantization.formats import Format

ROW_CELLS = 16
SMALL = 1024    # tensors below this many values are not worth a rate term: they take SMALL_FORMAT
SMALL_FORMAT = Format(8, granularity="tensor")


def geometric_bits(mean: Tensor) -> Tensor:
    """Entropy, bits a symbol, of the two-sided geometric distribution with mean magnitude `mean` > 0."""
    theta = (torch.sqrt(1 + mean * mean) - 1) / mean
    return -torch.log2((1 - theta) / (1 + theta)) - mean * torch.log2(theta)


class _Magnitude(torch.autograd.Function):
    """|round(x / scale)|, with the gradient of |x / scale|."""

    @staticmethod
    def forward(ctx, x, scale):
        ratio = x / scale
        ctx.save_for_backward(ratio, scale)
        return torch.round(ratio).abs()

    @staticmethod
    def backward(ctx, grad):
        ratio, scale = ctx.saved_tensors
        sign = torch.sign(ratio)
        return grad * sign / scale, -(grad * ratio.abs()).sum(1, keepdim=True) / scale


def _row_edges(rows: int) -> list[int]:
    """Cells of rows, finer where the index is small: embeddings are usually sorted by falling frequency."""
    return sorted({round(rows * (i / ROW_CELLS) ** 3) for i in range(1, ROW_CELLS + 1)} - {0} | {rows})


def code_bits(weight: Tensor, quantizer: FakeQuantize) -> Tensor:
    """Estimated bits of the range-coded codes of a weight; differentiable in weight and step."""
    scale, _ = quantizer.grid(weight)
    blocks = formats.to_blocks(weight.reshape(quantizer.shape), quantizer.format)
    size = formats.from_blocks(_Magnitude.apply(blocks, scale), quantizer.shape, quantizer.format)
    edges = _row_edges(len(size))
    counts = torch.tensor([b - a for a, b in zip([0, *edges], edges)], device=weight.device)
    means = torch.stack([cell.mean(0) for cell in size.split(counts.tolist())])
    return (geometric_bits(means.clamp(min=1e-3)) * counts[:, None]).sum()


@torch.no_grad()
def coded_bytes(weight: Tensor, quantizer: FakeQuantize) -> int:
    """Bytes that the range coder takes for the codes of a weight."""
    return len(coding.encode(quantizer.codes(weight)[0].cpu().numpy()))


def row_sensitivity(model: nn.Module, batches: Iterable, loss: Callable) -> dict[str, Tensor]:
    """Mean squared gradient of the loss for each row of each weight, (rows,): the diagonal Fisher information, up to a
    factor, which says how much an error in that row costs. For embeddings it falls with token frequency."""
    sums, count = {}, 0
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        count += 1
        for name, module, attribute in named_weights(model):
            grad = original_of(module, attribute).grad
            if grad is not None:
                squared = grad.reshape(matrix_shape(module, grad.shape)).square().mean(1)
                sums[name] = sums.get(name, 0) + squared
    model.zero_grad(set_to_none=True)
    if count == 0:
        raise ValueError("row_sensitivity got no batch: expected at least one to measure gradients on")
    return {name: total / count for name, total in sums.items()}


def rate_quantizers(model: nn.Module) -> list[tuple[nn.Module, str, FakeQuantize]]:
    """Where the model carries learned steps that the rate term acts on."""
    found = [(m, a, s) for _, m, a in named_weights(model) for s in steps_of(m, a)]
    return [(m, a, s) for m, a, s in found if isinstance(s, FakeQuantize) and s.learned]


def set_rate_formats(model: nn.Module, sensitivity: dict[str, Tensor], target_bytes: float, exponent: float = 0.25) -> None:
    """Gives every large weight 8-bit codes with learned steps, step ~ sensitivity^-exponent by blocks of rows, one factor
    for all found by bisection so that the range-coded codes take `target_bytes`; small tensors get 8-bit codes.

    Masks stay in front. Minimizing sum(sensitivity * step^2) at fixed bits gives exponent 1/2 for fine steps; coarse
    steps, where most codes are zero, want less (see notebooks/05).
    """
    members = []
    for name, module, attribute in list(named_weights(model)):
        keep = [s for s in steps_of(module, attribute) if not isinstance(s, FakeQuantize)]
        weight = getattr(module, attribute).detach()
        rows, _ = shape = matrix_shape(module, weight.shape)
        large = weight.numel() >= SMALL
        blocks = Format(8, granularity="rows", group_size=max(1, -(-rows // ROW_CELLS))) if large else SMALL_FORMAT
        quantizer = FakeQuantize(weight, shape, blocks, learned=large)
        set_steps(model, module, attribute, [*keep, quantizer])
        if large:
            fisher = sensitivity.get(name, torch.ones(rows)).to(weight.device)
            means = formats.to_blocks(fisher[:, None].expand(rows, 1), blocks, math.nan).nanmean(1, keepdim=True)
            members.append((weight, quantizer, means.clamp(min=means.max() * 1e-8) ** -exponent))
    low, high = -30.0, 15.0
    for _ in range(18):
        middle = (low + high) / 2
        for weight, quantizer, shape_of_steps in members:
            quantizer.set_grid(shape_of_steps * 2.0**middle)
        size = sum(coded_bytes(weight, quantizer) for weight, quantizer, _ in members)
        low, high = (middle, high) if size > target_bytes else (low, middle)


class RateLoss:
    """loss + lambda * bits / weights, with lambda steered so that the file follows a schedule down to `file_bytes`.

    Wraps the `loss` of kit.training.train; `step` is its hook. The size falls geometrically from where it is to the
    target during the first `ramp` of the run and is held there; `finish`, after training, trims what is over.
    What is not range-coded (header, scales, small tensors) is measured once and counted.
    """

    def __init__(self, loss: Callable, model: nn.Module, file_bytes: int, ramp: float = 0.6, every: int = 5):
        self.loss, self.model, self.ramp, self.every = loss, model, ramp, every
        self.members = rate_quantizers(model)
        if not self.members:
            raise ValueError("the model carries no learned steps: call set_rate_formats first")
        self.weights = sum(original_of(m, a).numel() for m, a, _ in self.members)
        self.multiplier, self.start, self.history = 0.02, self.coded(), []
        overhead = _file_bytes(model) - self.start
        if file_bytes <= 1.1 * overhead:
            raise ValueError(f"{file_bytes} bytes are too few: header, scales and small tensors alone take {overhead}; "
                             "ask for less compression or a model with fewer small tensors")
        self.file_bytes, self.target = file_bytes, file_bytes - overhead

    def coded(self) -> int:
        """Bytes of the range-coded codes as the weights stand."""
        return sum(coded_bytes(_before(m, a, s), s) for m, a, s in self.members)

    def __call__(self, model: nn.Module, batch) -> Tensor:
        bits = sum(code_bits(_before(m, a, s), s) for m, a, s in self.members)
        return self.loss(model, batch) + self.multiplier * bits / self.weights

    def step(self, step: int, steps: int, model: nn.Module) -> None:
        if step % self.every:
            return
        size = self.coded()
        progress = min(1.0, step / (self.ramp * steps))
        wanted = self.start * (self.target / self.start) ** progress
        self.multiplier = min(max(self.multiplier * size / wanted, 1e-4), 100.0)
        self.history.append({"step": step, "bytes": size, "wanted": wanted, "lambda": self.multiplier})

    @torch.no_grad()
    def finish(self) -> None:
        """After training: sets the smallest codes of magnitude 1 to zero until the file is within its target."""
        overhead = _file_bytes(self.model) - self.coded()
        self.target = min(self.target, self.file_bytes - overhead)
        low, high = 0.5, 1.5
        kept = [original_of(m, a).detach().clone() for m, a, _ in self.members]
        for _ in range(12 if self.coded() > self.target else 0):
            threshold = (low + high) / 2
            for (m, a, s), weight in zip(self.members, kept):
                blocks = formats.to_blocks(weight.reshape(s.shape), s.format)
                small = blocks.abs() < threshold * s.grid(blocks)[0]
                small = formats.from_blocks(small, s.shape, s.format).reshape(weight.shape)
                original_of(m, a).copy_(weight.masked_fill(small, 0.0))
            low, high = (threshold, high) if self.coded() > self.target else (low, threshold)


def _file_bytes(model: nn.Module) -> int:
    from kit import artifact

    with tempfile.TemporaryDirectory() as folder:
        return artifact.save(model, Path(folder) / "probe.kit")


def _before(module: nn.Module, attribute: str, quantizer: FakeQuantize) -> Tensor:
    """The masked weight that the quantizer sees."""
    weight = original_of(module, attribute)
    for step in steps_of(module, attribute):
        if step is quantizer:
            return weight
        weight = step(weight)
    return weight
