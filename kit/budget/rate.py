"""Rate-distortion training: the entropy-coded size of the codes as a differentiable term of the loss.

The range coder (kit.core.range_coder) spends on a code about what a two-sided geometric distribution with the local mean
magnitude m would: with theta = (sqrt(1 + m^2) - 1) / m,

    bits(m) = -log2((1 - theta) / (1 + theta)) - m log2(theta).

So the size of a weight matrix is a function of mean |code| in cells of rows x columns, its gradient an adaptive L1
pull, and the step size, learned with it (LSQ), weighs bits against loss. Loss + lambda * bits as in Ball\u00e9 et al. 2017
(arXiv:1611.01704) and, for weights, Oktay et al. 2020 (arXiv:1906.06624).
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor

from kit import artifact
from kit.core import range_coder as coding
from kit.core.weights import gradients, named_weights, original_of, set_steps, steps_of
from kit.quantization import formats, kernels
from kit.quantization.composition import LEAST_SENSITIVITY, Composition
from kit.quantization.fake import FakeQuantize, matrix_shape, seen_by
from kit.quantization.formats import Format
from kit.quantization.ordering import RowOrder

ROW_CELLS = 16
MOST_ROWS = 128  # that share a step: frequencies of tokens fall quickly
SMALL = 256    # tensors below this many values are not worth a rate term: they take SMALL_FORMAT
SMALL_FORMAT = Format(8, granularity="tensor")
SLOW = 2.0    # `first_step` of FakeQuantize: the rate would widen steps for as long as a run lasts, and coarse ones are worse
INTEGRAL, PROPORTIONAL = 120.0, 10.0    # of log lambda for log(size / wanted): over a whole run, and at once
MOST_ERROR = 0.175    # that lambda answers to: one that leaps further empties codes that never fill again
LOG_LAMBDA = (-9.0, 4.0)
AIM = 1.012  # times the bytes: codes settle lower as the learning rate falls, and `finish` cuts what is over
SLACK = 0.08  # of the wanted bytes


def geometric_bits(mean: Tensor) -> Tensor:
    """Entropy, bits a symbol, of the two-sided geometric distribution with mean magnitude `mean` > 0."""
    theta = (torch.sqrt(1 + mean * mean) - 1) / mean
    return -torch.log2((1 - theta) / (1 + theta)) - mean * torch.log2(theta)


class _Magnitude(torch.autograd.Function):
    """|round(x / scale)|, with the gradient of |x / scale|."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return kernels.magnitude(x, scale) if kernels.fits(x, scale, None) else torch.round(x / scale).abs()

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        if kernels.fits(x, scale, None):
            return kernels.magnitude_backward(x, scale, grad)
        return grad * torch.sign(x) / scale, -(grad * x.abs()).sum(1, keepdim=True) / scale**2


def _shape(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """As `matrix_shape`, but a vector is a column: the entries of a bias over tokens differ as the rows of their embedding do."""
    return (len(weight), 1) if weight.ndim == 1 else matrix_shape(module, weight.shape)


def _row_edges(rows: int) -> list[int]:
    """Cells of rows, finer where the index is small: rows of token tables stand by falling frequency."""
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
    """Mean squared gradient of the loss for each row of each weight, (rows,), or each entry of a vector: the diagonal
    Fisher information, up to a factor, which says how much an error there costs. For embeddings it falls with token
    frequency."""
    shapes = {name: _shape(m, original_of(m, a)) for name, m, a in named_weights(model)}
    sums, count = {}, 0
    for grads in gradients(model, batches, loss):
        count += 1
        for name, grad in grads.items():
            sums[name] = sums.get(name, 0) + grad.reshape(shapes[name]).square().mean(1)
    if count == 0:
        raise ValueError("row_sensitivity got no batch: expected at least one to measure gradients on")
    return {name: total / count for name, total in sums.items()}


def rate_quantizers(model: nn.Module) -> list[tuple[nn.Module, str, FakeQuantize]]:
    """Where the model carries learned steps that the rate term acts on."""
    found = [(m, a, s) for _, m, a in named_weights(model) for s in steps_of(m, a)]
    return [(m, a, s) for m, a, s in found if isinstance(s, FakeQuantize) and s.learned]


def _block_sensitivity(name: str, quantizer: FakeQuantize, sensitivity: dict[str, Tensor]) -> Tensor:
    """Mean sensitivity of the rows that share a step, (blocks, 1), relative to the largest of any row. None is zero: a few
    batches say nothing of a rare row."""
    rows = sensitivity.get(name, torch.zeros(quantizer.shape[0]))[:, None]
    means = formats.to_blocks(rows, quantizer.format, math.nan).nanmean(1, keepdim=True)
    return (means / max(float(rows.max()) for rows in sensitivity.values())).clamp(min=LEAST_SENSITIVITY)


def set_rate_formats(model: nn.Module, sensitivity: dict[str, Tensor], target_bytes: float, exponent: float = 0.42) -> None:
    """Gives every large weight 8-bit codes with learned steps, step ~ sensitivity^-exponent by blocks of rows, one factor
    for all found by bisection so that the range-coded codes take `target_bytes`; small tensors get 8-bit codes.

    Masks stay in front. Minimizing sum(sensitivity * step^2) at fixed bits gives exponent 1/2 for fine steps; coarse
    steps, where most codes are zero, want less (see notebooks/05).
    """
    members = []
    for name, module, attribute in list(named_weights(model)):
        others = [s for s in steps_of(module, attribute) if not isinstance(s, FakeQuantize)]
        before, after = ([s for s in others if isinstance(s, (Composition, RowOrder)) == last] for last in (False, True))
        weight = original_of(module, attribute).detach()
        for step in before:
            weight = step(weight)
        rows, _ = shape = _shape(module, weight)
        large = weight.numel() >= SMALL
        size = min(MOST_ROWS, -(-rows // ROW_CELLS))
        format = Format(8, granularity="rows", group_size=size, scale="log8") if large else SMALL_FORMAT
        quantizer = FakeQuantize(weight, shape, format, learned=large, first_step=SLOW)
        set_steps(model, module, attribute, [*before, quantizer, *after])
        if large:
            least = quantizer.blocks(weight).abs().amax(1, keepdim=True) / format.qmax  # finer steps would clip
            relative = _block_sensitivity(name, quantizer, sensitivity).to(weight.device)
            members.append((weight, quantizer, relative**-exponent, least))
    low, high = -20.0, 8.0
    for _ in range(18):
        middle = (low + high) / 2
        for _, quantizer, shape_of_steps, least in members:
            quantizer.set_grid(torch.maximum(shape_of_steps * 2.0**middle, least))
        size = sum(coded_bytes(weight, quantizer) for weight, quantizer, *_ in members)
        low, high = (middle, high) if size > target_bytes else (low, middle)


class RateLoss:
    """loss + lambda * bits / weights for kit.training.train, with the size of the file on a schedule; `step` is its hook.

    The size falls to AIM * `file_bytes` during the first `ramp` of the run, quickly at first, and is held there by lambda: log
    lambda follows log(size / wanted) as a proportional-integral controller. Most of the learning happens at the final size,
    so the way there is short. Steps are learned, with the rate's own gradient. Twenty times a run the estimate of
    `code_bits` is set right by what the coder really takes, and in the first half, where lambda has not had the time to do it
    (further off than SLACK), one factor widens or narrows all steps: zeros, once there, do not come back by themselves when
    lambda falls. Later that would do harm, for many weights end up close to half a step. lambda begins as the slope of the
    loss against bits along such a factor. `finish`, after training, fits the file exactly.
    What is not range-coded (header, scales, small tensors) is measured and counted.
    """

    def __init__(self, loss: Callable, model: nn.Module, file_bytes: int, batches: list, ramp: float = 0.06):
        self.loss, self.model, self.file_bytes, self.batches, self.ramp = loss, model, file_bytes, batches, ramp
        self.members = rate_quantizers(model)
        if not self.members:
            raise ValueError("the model carries no learned steps: call set_rate_formats first")
        self.weights = sum(original_of(m, a).numel() for m, a, _ in self.members)
        self.start, self.history = self.coded(), []
        overhead = artifact.nbytes(model) - self.start
        if file_bytes <= 1.1 * overhead:
            raise ValueError(f"{file_bytes} bytes are too few: header, scales and small tensors alone take {overhead}; "
                             "ask for less compression or a model with fewer small tensors")
        self.estimate = float(self._bits().detach()) / 8
        slope = math.log(self._slope())
        # log lambda, its integral part, coded / estimated bytes, bytes that codes may take
        state = torch.tensor([slope, slope, self.start / self.estimate, AIM * file_bytes - overhead])
        self.state = nn.Parameter(state, requires_grad=False)

    def parameters(self) -> list[nn.Parameter]:
        """What a checkpoint has to keep: pass as `extra_parameters`."""
        return [self.state]

    def coded(self) -> int:
        """Bytes of the range-coded codes as the weights stand."""
        return sum(coded_bytes(seen_by(s, m, a), s) for m, a, s in self.members)

    def _bits(self) -> Tensor:
        return sum(code_bits(seen_by(s, m, a), s) for m, a, s in self.members)

    def __call__(self, model: nn.Module, batch) -> Tensor:
        bits = self._bits()
        self.estimate = float(bits.detach()) / 8
        return self.loss(model, batch) + self.state[0].exp() * bits / self.weights

    @torch.no_grad()
    def step(self, step: int, steps: int, model: nn.Module) -> None:
        due = step % max(5, steps // 20) == 0
        if due:
            coded = self.coded()
            self.state[2] = coded / float(self._bits() / 8)
            self.state[3] = AIM * self.file_bytes - artifact.nbytes(self.model) + coded
        wanted = self.start * (self.state[3].item() / self.start) ** (1 - max(0.0, 1 - step / (self.ramp * steps)) ** 2)
        error = math.log(self.estimate * self.state[2].item() / wanted)
        answer = min(max(error, -MOST_ERROR), MOST_ERROR)
        self.state[1] = (self.state[1] + INTEGRAL / steps * answer).clamp(*LOG_LAMBDA)
        self.state[0] = (self.state[1] + PROPORTIONAL * answer).clamp(*LOG_LAMBDA)
        if due:
            self.history.append({"step": step, "bytes": wanted * math.exp(error), "wanted": wanted,
                                 "lambda": math.exp(self.state[0])})
            if 2 * step <= steps:
                self._bound(wanted * (1 - SLACK), wanted * (1 + SLACK))

    def _widen(self, factor: float) -> None:
        for _, _, quantizer in self.members:
            quantizer.scale.mul_(factor)

    def _bound(self, least: float, most: float) -> None:
        """Widens or narrows all steps until the codes take `least` to `most` bytes, by the secant method in log-log."""
        exponent, size = 1.0, self.coded()
        for _ in range(8):
            excess = math.log(size / min(max(size, least), most))
            if abs(excess) < 0.005:
                return
            factor = math.exp(min(max(excess / exponent, -0.4), 0.4))
            self._widen(factor)
            before, size = size, self.coded()
            if size != before:
                exponent = min(max(math.log(before / size) / math.log(factor), 0.4), 4.0)

    @torch.no_grad()
    def _slope(self, factor: float = 1.15) -> float:
        """-d loss / d (bits / weights) along a common factor on all steps, on the calibration batches."""
        losses, sizes = [], []
        for change in (1 / factor, factor * factor):
            self._widen(change)
            with torch.random.fork_rng(devices=[]):  # the same sample of the vocabulary for both
                torch.manual_seed(0)
                losses.append(sum(float(self.loss(self.model, batch)) for batch in self.batches) / len(self.batches))
            sizes.append(8 * self.coded() / self.weights)
        self._widen(1 / factor)
        return max((losses[1] - losses[0]) / max(sizes[0] - sizes[1], 1e-6), 1e-3)

    def finish(self) -> None:
        """After training: sets codes to zero until the file is within its bytes, those first whose squared weight times
        the sensitivity of its block is least."""
        sensitivity = row_sensitivity(self.model, self.batches, self.loss)
        names = {id(original_of(m, a)): name for name, m, a in named_weights(self.model)}
        kept = [original_of(m, a).detach().clone() for m, a, _ in self.members]
        scores = []
        for (m, a, s), weight in zip(self.members, kept):
            cost = s.spread(_block_sensitivity(names[id(original_of(m, a))], s, sensitivity).to(weight.device))
            score = (cost * weight.reshape(s.shape).square()).reshape(weight.shape)
            scores.append(score.masked_fill(s.codes(seen_by(s, m, a))[0].reshape(weight.shape) == 0, math.inf))
        target = self.coded()
        while (over := artifact.nbytes(self.model) - self.file_bytes) > 0:
            target -= over
            self._trim(kept, scores, target)

    @torch.no_grad()
    def _trim(self, kept: list[Tensor], scores: list[Tensor], target: int) -> None:
        """Zeroes the weights of lowest score, as few as reach the target."""
        ordered = torch.cat([score[score < math.inf] for score in scores]).sort().values
        low, high = 0, len(ordered) - 1
        for left in reversed(range(17)):
            middle = (low + high) // 2 if left else high
            for (m, a, _), weight, score in zip(self.members, kept, scores):
                original_of(m, a).copy_(weight.masked_fill(score <= ordered[middle], 0.0))
            low, high = (middle, high) if self.coded() > target else (low, middle)
