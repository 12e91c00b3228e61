"""Rate-distortion training: the entropy-coded size of the codes as a term of the loss.

The range coder (kit.core.range_coder) spends on a code about what a two-sided geometric
distribution with the local mean magnitude m would: with theta = (sqrt(1 + m^2) - 1) / m,

    bits(m) = -log2((1 - theta) / (1 + theta)) - m log2(theta).

So the size of a weight matrix is a function of mean |code| in cells of rows x columns, its gradient
an adaptive L1 pull, and the step size, learned with it (LSQ), weighs bits against loss. Loss +
lambda * bits as in Balle et al. 2017 (arXiv:1611.01704) and Oktay et al. 2020 (1906.06624).
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor

from kit import artifact
from kit.artifact import layouts
from kit.core.calibration import gradients
from kit.core.protocols import device_of, tree_map
from kit.core.settings import Count, NotNegative, Positive, Share, settings
from kit.core.weights import MatrixView, Weight, column_view, weights
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize
from kit.quantization.formats import Format

ROW_CELLS = 16
SMALL_FORMAT = Format(8, granularity="tensor")
LOG_LAMBDA = (-9.0, 4.0)
LEAST_SENSITIVITY = 1e-8  # relative to the largest: rows that no gradient reached
PARTIAL = 0.005  # of log size: closer to its bounds than this, steps are left alone


@settings
class RateSettings:
    """Constants of training under a rate, each tuned by experiment on validation text.

    exponent: step ~ sensitivity^-exponent. Minimizing sum(sensitivity * step^2) at fixed bits gives
        1/2 for fine steps; coarse ones, where most codes are zero, want less (notebook 05).
    most_rows: that share a step: frequencies of tokens fall quickly.
    small: weights of fewer values are not worth a rate term: they take SMALL_FORMAT.
    first_step: of FakeQuantize; slow, for the rate would widen steps as long as a run lasts.
    integral, proportional: answers of log lambda to log(size / wanted), over a run and at once.
    most_error: that lambda answers to: one that leaps further empties codes that never fill again.
    aim: times the bytes: codes settle lower as the learning rate falls; `finish` cuts the rest.
    slack: of the wanted bytes, within which steps are left alone.
    ramp: share of the run during which the size falls to the budget.
    """

    exponent: NotNegative = 0.42
    most_rows: Count = 128
    small: Count = 256
    first_step: Positive = 2.0
    integral: NotNegative = 120.0
    proportional: NotNegative = 10.0
    most_error: Positive = 0.175
    aim: Positive = 1.012
    slack: NotNegative = 0.08
    ramp: Share = 0.06


def geometric_ratio(mean: Tensor) -> Tensor:
    """theta, by which probabilities fall in the two-sided geometric distribution with mean
    magnitude `mean` > 0."""
    return (torch.sqrt(1 + mean * mean) - 1) / mean


def geometric_bits(mean: Tensor) -> Tensor:
    """Bits a symbol of the two-sided geometric distribution with mean magnitude `mean` > 0."""
    theta = geometric_ratio(mean)
    return -torch.log2((1 - theta) / (1 + theta)) - mean * torch.log2(theta)


def _magnitude(x: Tensor, scale: Tensor) -> Tensor:
    """|round(x / scale)|, with the gradient of |x / scale|."""
    ratio = (x / scale).abs()
    return ratio + (ratio.round() - ratio).detach()


def _view(weight: Weight) -> MatrixView:
    """A vector is a column: a bias over tokens differs as the rows of their embedding."""
    return column_view(weight.original.shape) if weight.original.ndim == 1 else weight.view


def _row_edges(rows: int) -> list[int]:
    """Cells of rows, finer first: rows of token tables stand by falling frequency."""
    edges = {round(rows * (i / ROW_CELLS) ** 3) for i in range(1, ROW_CELLS + 1)}
    return sorted(edges - {0} | {rows})


def code_bits(weight: Tensor, quantizer: FakeQuantize) -> Tensor:
    """Estimated bits of the range-coded codes of a weight; differentiable in weight and step."""
    scale, _ = quantizer.qparams(weight)
    magnitude = _magnitude(quantizer.blocks(weight), scale)
    size = formats.from_blocks(magnitude, quantizer.shape, quantizer.format)
    edges = _row_edges(len(size))
    counts = torch.tensor([b - a for a, b in zip([0, *edges], edges)], device=weight.device)
    means = torch.stack([cell.mean(0) for cell in size.split(counts.tolist())])
    return (geometric_bits(means.clamp(min=1e-3)) * counts[:, None]).sum()


@torch.no_grad()
def coded_bytes(weight: Tensor, quantizer: FakeQuantize) -> int:
    """Bytes that the codes of a weight take, range-coded (of many, an estimate)."""
    return layouts.coded_bytes(quantizer.codes(weight)[0].cpu().numpy())


def row_sensitivity(model: nn.Module, batches: Iterable, loss: Callable) -> dict[str, Tensor]:
    """Mean squared gradient of loss(model, batch) for each row of each weight, (rows,), or each
    entry of a vector: the diagonal Fisher information, up to a factor, which says how much an error
    there costs. For embeddings it falls with token frequency. Raises ValueError without a batch."""
    views = {weight.name: _view(weight) for weight in weights(model)}
    sums, count = {}, 0
    for grads in gradients(model, batches, loss):
        count += 1
        for name, grad in grads.items():
            sums[name] = sums.get(name, 0) + views[name].matrix(grad).square().mean(1)
    return {name: total / count for name, total in sums.items()}


def _block_sensitivity(name: str, quantizer: FakeQuantize, sensitivity: dict) -> Tensor:
    """Mean sensitivity of the rows that share a step, (blocks, 1), relative to the largest of any
    row. None is zero: a few batches say nothing of a rare row."""
    rows = sensitivity.get(name, torch.zeros(quantizer.shape[0]))[:, None]
    means = formats.to_blocks(rows, quantizer.format, math.nan).nanmean(1, keepdim=True)
    largest = max(float(rows.max()) for rows in sensitivity.values())
    return (means / largest).clamp(min=LEAST_SENSITIVITY)


def set_rate_formats(
    model: nn.Module, sensitivity: dict, target_bytes: float, settings=RateSettings()
) -> None:
    """Gives every large weight 8-bit codes with learned steps, step ~ sensitivity^-exponent by
    blocks of rows, one factor for all found by bisection so that codes take `target_bytes`."""
    members = []
    for weight in weights(model):
        before, view = weight.before(FakeQuantize.rank).detach(), _view(weight)
        large = before.numel() >= settings.small
        size = min(settings.most_rows, -(-view.rows // ROW_CELLS))
        rows = Format(8, granularity="rows", group_size=size, scale="log8")
        format = rows if large else SMALL_FORMAT
        quantizer = FakeQuantize(before, format, view, large, settings.first_step)
        weight.put(quantizer)
        if large:
            largest = quantizer.blocks(before).abs().amax(1, keepdim=True)
            relative = _block_sensitivity(weight.name, quantizer, sensitivity).to(before.device)
            shape = relative**-settings.exponent
            members.append((before, quantizer, shape, largest / format.qmax))  # finer would clip
    low, high = -20.0, 8.0
    for _ in range(18):
        middle = (low + high) / 2
        for _, quantizer, shape, least in members:
            quantizer.set_qparams(torch.maximum(shape * 2.0**middle, least))
        size = sum(coded_bytes(before, quantizer) for before, quantizer, *_ in members)
        low, high = (middle, high) if size > target_bytes else (low, middle)


class RateLoss:
    """loss + lambda * bits / weights for `train`, to a size of the file; `step` is its hook.

    The size falls to aim * `file_bytes` during the first `ramp` of the run, quickly at first, and
    is held there by lambda: log lambda follows log(size / wanted) as a proportional-integral
    controller, from the slope of the loss against bits along a common factor on all steps. Twenty
    times a run the estimate of `code_bits` is set right by what the coder takes, and in the first
    half, further off than `slack`, one factor moves all steps, for zeros do not come back by
    themselves when lambda falls (later many weights lie close to half a step). `finish`, after
    training, fits the file exactly. What is not range-coded is counted too.
    """

    def __init__(
        self, loss, model: nn.Module, file_bytes: int, batches: list, settings=RateSettings()
    ):
        self.loss, self.model, self.file_bytes = loss, model, file_bytes
        self.batches = tree_map(lambda tensor: tensor.to(device_of(model)), batches)
        self.settings = settings
        found = [(weight, weight.find(FakeQuantize)) for weight in weights(model)]
        self.members = [(weight, step) for weight, step in found if step and step.learned]
        if not self.members:
            raise ValueError("the model carries no learned steps: call set_rate_formats first")
        self.weights = sum(weight.original.numel() for weight, _ in self.members)
        self.start, self.history = self.coded(), []
        overhead = artifact.nbytes(model) - self.start
        if file_bytes <= 1.1 * overhead:
            alone = f"header, scales and small tensors alone take {overhead}"
            raise ValueError(f"{file_bytes} bytes are too few: {alone}; ask for less compression")
        self.estimate = float(self._bits().detach()) / 8
        slope = math.log(self._slope())
        # log lambda, its integral part, coded / estimated bytes, bytes that codes may take
        room = settings.aim * file_bytes - overhead
        state = torch.tensor([slope, slope, self.start / self.estimate, room])
        self.state = nn.Parameter(state, requires_grad=False)

    def parameters(self) -> list[nn.Parameter]:
        """What a checkpoint has to keep: pass as `extra_parameters`."""
        return [self.state]

    def coded(self) -> int:
        """Bytes of the range-coded codes as the weights stand."""
        return sum(coded_bytes(weight.before(step.rank), step) for weight, step in self.members)

    def _bits(self) -> Tensor:
        return sum(code_bits(weight.before(step.rank), step) for weight, step in self.members)

    def __call__(self, model: nn.Module, batch) -> Tensor:
        bits = self._bits()
        self.estimate = float(bits.detach()) / 8
        return self.loss(model, batch) + self.state[0].exp() * bits / self.weights

    @torch.no_grad()
    def step(self, step: int, steps: int, model: nn.Module) -> None:
        settings, due = self.settings, step % max(5, steps // 20) == 0
        if due:
            coded = self.coded()
            self.state[2] = coded / float(self._bits() / 8)
        left = max(0.0, 1 - step / (settings.ramp * steps))
        wanted = self.start * (self.state[3].item() / self.start) ** (1 - left**2)
        error = math.log(self.estimate * self.state[2].item() / wanted)
        answer = min(max(error, -settings.most_error), settings.most_error)
        integral = self.state[1] + settings.integral / steps * answer
        self.state[1] = integral.clamp(*LOG_LAMBDA)
        self.state[0] = (self.state[1] + settings.proportional * answer).clamp(*LOG_LAMBDA)
        if due:
            entry = {"step": step, "bytes": wanted * math.exp(error), "wanted": wanted}
            self.history.append({**entry, "lambda": math.exp(self.state[0])})
            if 2 * step <= steps:
                self._bound(coded, wanted * (1 - settings.slack), wanted * (1 + settings.slack))

    def _widen(self, factor: float) -> None:
        for _, quantizer in self.members:
            quantizer.scale.mul_(factor)

    def _bound(self, size: int, least: float, most: float) -> None:
        """Scales all steps until codes, now of `size` bytes, take `least` to `most`: secants in
        log-log."""
        exponent = 1.0
        for _ in range(8):
            excess = math.log(size / min(max(size, least), most))
            if abs(excess) < PARTIAL:
                return
            factor = math.exp(min(max(excess / exponent, -0.4), 0.4))
            self._widen(factor)
            before, size = size, self.coded()
            if size != before:
                exponent = min(max(math.log(before / size) / math.log(factor), 0.4), 4.0)

    @torch.no_grad()
    def _slope(self, factor: float = 1.15) -> float:
        """-d loss / d (bits / weights) along a common factor on all steps."""
        losses, sizes = [], []
        for change in (1 / factor, factor * factor):
            self._widen(change)
            with torch.random.fork_rng(devices=[]):  # the same sample of the vocabulary for both
                torch.manual_seed(0)
                total = sum(float(self.loss(self.model, batch)) for batch in self.batches)
            losses.append(total / len(self.batches))
            sizes.append(8 * self.coded() / self.weights)
        self._widen(1 / factor)
        return max((losses[1] - losses[0]) / max(sizes[0] - sizes[1], 1e-6), 1e-3)

    def finish(self) -> None:
        """After training: sets codes to zero until the file is within its bytes, those first whose
        squared weight times the sensitivity of its block is least."""
        sensitivity = row_sensitivity(self.model, self.batches, self.loss)
        kept = [weight.original.detach().clone() for weight, _ in self.members]
        scores = []
        for (weight, step), values in zip(self.members, kept):
            cost = step.spread(_block_sensitivity(weight.name, step, sensitivity).to(values.device))
            score = cost * step.view.matrix(values).square()
            zero = step.codes(weight.before(step.rank))[0] == 0
            scores.append(step.view.tensor(score.masked_fill(zero, math.inf)))
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
            for (weight, _), values, score in zip(self.members, kept, scores):
                weight.assign(values.masked_fill(score <= ordered[middle], 0.0))
            low, high = (middle, high) if self.coded() > target else (low, middle)
