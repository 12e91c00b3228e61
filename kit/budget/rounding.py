"""Rounding to a number of bytes without training or labels, for any model.

A small error E in a weight matrix (R, C) costs about tr(S E H E^T) / 2, with the two factors of the
Fisher information (Martens and Grosse 2015, arXiv:1503.05671). They are taken from gradients G of
the model's own sampled answers, as Shampoo does (Gupta et al. 2018, arXiv:1802.09568), so that
nothing has to be known of a layer:

    S = diagonal of the row means of G^2,    H = sum of G^T G, scaled to a mean diagonal of 1.

Where the error of a column is made up for by the columns after it (`column_sweep`), an error in
column c costs d_c = 1 / U_cc^2, U^T U = H^-1. Entropy-coded codes are fewest where the error of
every code costs the same, so that

    step_rc = k / sqrt(s_r d_c)

with one k for the whole model, found from the bytes. Codes fall to the smaller neighbour where that
saves more than it costs: a bit is worth ln(2) / 6 squared steps (the slope of rate and distortion
at fine steps), and in a geometric distribution each unit of |code| takes log2(1 / theta) bits.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kit import artifact
from kit.core import ans
from kit.core.obs import column_sweep, inverse_factor
from kit.core.protocols import call_of, tensors_of
from kit.core.weights import Weight, gradients, weights
from kit.quantization import formats
from kit.quantization.column_scale import ColumnScale
from kit.quantization.fake import FakeQuantize
from kit.quantization.formats import HALF, Format

TRIALS = 6  # of k, after the first guess
CLOSE = 0.997  # of the bytes asked for: near enough


@dataclass(frozen=True)
class RoundingSettings:
    """Constants of rounding, chosen on validation data of a sentence encoder.

    bit_value: squared steps that a bit is worth. prior: of a row's sensitivity, relative to the
    mean over rows, for a few batches say little of a rare one. damping: of H, relative to its mean
    diagonal. most_blocks: steps of a weight; rows share one where there are more. small: weights
    of fewer values are kept in half precision.
    """

    bit_value: float = math.log(2) / 6
    prior: float = 0.05
    damping: float = 0.01
    most_blocks: int = 4096
    small: int = 1024


class SampledLoss:
    """-log p(y) summed over all predictions, with y sampled from the model's own distribution: the
    gradient's covariance is the Fisher information. No labels are needed.

    outputs: "logits", for a softmax over the last dimension of the first output; "features", for a
        normal distribution around each entry of it (embeddings, regression).
    """

    def __init__(self, outputs: str = "logits", seed: int = 0):
        if outputs not in ("logits", "features"):
            raise ValueError(f"outputs={outputs!r}: choose 'logits' or 'features'")
        self.outputs, self.generator = outputs, torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, batch) -> Tensor:
        out = tensors_of(call_of(batch)(model))[0]
        if self.outputs == "features":
            noise = torch.randn(out.shape, generator=self.generator)
            return (out * noise.to(out)).sum()
        log_p = out.float().log_softmax(-1).flatten(0, -2)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=self.generator)
        return -log_p.gather(1, drawn.to(log_p.device)).sum()


def curvature(
    model: nn.Module, batches: Iterable, loss: Callable
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of the Fisher information of each weight matrix: s (R,), and H (C, C) with a mean
    diagonal of 1; of those that `loss` reaches. Raises ValueError without a batch."""
    views = {weight.name: weight.view for weight in weights(model, matrices=True)}
    sums, count = {}, 0
    for grads in gradients(model, batches, loss):
        count += 1
        for name in views.keys() & grads.keys():
            grad = views[name].matrix(grads[name].detach()).float()
            rows, columns = sums.get(name, (0.0, 0.0))
            sums[name] = rows + grad.square().mean(1), columns + grad.T @ grad
    if not count:
        raise ValueError("rounding got no batch: give at least one")
    for name, (rows, columns) in sums.items():
        if not torch.isfinite(columns).all():
            raise ValueError(f"the gradients of {name!r} hold NaN or infinite values")
        sums[name] = rows / count, columns / columns.diagonal().mean().clamp(min=1e-30)
    return sums


class Rounded:
    """A weight, its steps but for the factor k, and its codes for any k."""

    def __init__(self, weight: Weight, s: Tensor, gram: Tensor, settings: RoundingSettings):
        self.weight, self.settings, view = weight, settings, weight.view
        upper = inverse_factor(gram.double()[None], settings.damping)[0]
        cost = upper.diagonal().square().reciprocal()
        mean = cost.log().mean().exp()
        self.columns = ColumnScale.nearest((mean / cost).sqrt(), view)
        self.matrix = view.matrix(weight.value.detach()).float() / self.columns.scale
        self.upper = (upper / self.columns.scale)[None].float()
        size = -(-view.rows // settings.most_blocks)
        self.format = Format(8, granularity="rows", group_size=size, scale="log8")
        s = formats.to_blocks((s + settings.prior * s.mean())[:, None], self.format, math.nan)
        self.shape = (s.nanmean(1, keepdim=True) * mean.float()).clamp(min=1e-30).rsqrt()
        largest = formats.to_blocks(self.matrix.abs(), self.format).amax(1, keepdim=True)
        self.least = largest / self.format.qmax

    def steps(self, k: float) -> Tensor:
        """(blocks, 1), as stored; none so fine that codes would saturate."""
        return formats.round_scale(torch.maximum(k * self.shape, self.least), "log8")

    def _rows(self, k: float) -> tuple[Tensor, Tensor]:
        """Step and dead zone (R,) of each row."""
        spread = self.steps(k).expand(-1, self.format.group_size * self.matrix.shape[1])
        step = formats.from_blocks(spread, self.matrix.shape, self.format)[:, 0]
        size = (self.matrix.abs().mean(1) / step).clamp(min=1e-3)
        theta = (torch.sqrt(1 + size * size) - 1) / size
        return step, (-torch.log2(theta) * self.settings.bit_value / 2).clamp(max=0.5)

    def _nearest(self, x: Tensor, zone: Tensor) -> Tensor:
        size = torch.floor(x.abs() + 0.5 - zone).clamp(0, self.format.qmax)
        return torch.copysign(size, x)

    def estimate(self, k: float) -> float:
        """Bytes of the codes, without feedback of errors, which changes them little."""
        step, zone = (part[:, None] for part in self._rows(k))
        return ans.estimate(self._nearest(self.matrix / step, zone).int().cpu().numpy())

    def put(self, k: float) -> None:
        """Rounds the weight with the errors made up for, and puts the steps on it."""
        step, zone = self._rows(k)

        def choose(j: int, rest: Tensor) -> Tensor:
            return self._nearest(rest[:, :, j] / step, zone) * step

        values = column_sweep(self.matrix[None], self.upper, choose)[0] + 0.0
        tensor = self.weight.view.tensor(values)
        self.weight.set_steps([])
        self.weight.assign(tensor)
        grid = self.steps(k), None
        self.weight.put(FakeQuantize(tensor, self.format, self.weight.view, grid=grid))
        self.weight.put(self.columns)


def round_to_budget(
    model: nn.Module, batches: Iterable, target_bytes: int, loss: Callable | None = None,
    settings: RoundingSettings = RoundingSettings(),
) -> nn.Module:  # fmt: skip
    """Rounds a trained model, in place, to a file of at most `target_bytes`; returns the model.

    Steps of quantization and codes follow from what an error costs the model's own answers, see
    above. Small tensors become half precision.

    Args:
        batches: calibration inputs (`kit.core.protocols.call_of`); some hundred samples in small
            batches. Their targets are not used.
        loss: of (model, batch), summed over samples; by default `SampledLoss("logits")`.
    Raises ValueError without a batch, for weights with steps, and where the bytes do not suffice.
    """
    found = [w for w in weights(model) if w.original.is_floating_point()]
    if carrying := next((w.name for w in found if w.steps), None):
        raise ValueError(f"{carrying!r} carries steps already: round a plain model (`materialize`)")
    factors = curvature(model, batches, loss or SampledLoss())
    large = [w for w in found if w.name in factors and w.original.numel() >= settings.small]
    rounded = [Rounded(weight, *factors.pop(weight.name), settings) for weight in large]
    if not rounded:
        raise ValueError(f"no weight matrix of {settings.small} values or more has a gradient")
    kept, large = [w.original.detach().clone() for w in found], {w.weight.name for w in rounded}
    for weight in found:
        if weight.name not in large:
            weight.put(FakeQuantize(weight.original.detach(), HALF, weight.view))
    log_k, slope = _first_guess(rounded, target_bytes)
    best = 0, log_k
    for _ in range(TRIALS):
        size = _put(rounded, log_k)
        if size <= target_bytes:
            best = max(best, (size, log_k))
            if size >= CLOSE * target_bytes:
                return model
        log_k += (size - (1 + CLOSE) / 2 * target_bytes) / slope
    if not best[0]:
        for weight, value in zip(found, kept):
            weight.set_steps([])
            weight.assign(value)
        raise ValueError(
            f"{target_bytes} bytes are too few: the file takes {size} where most codes are zero"
        )
    _put(rounded, best[1])
    return model


def _put(rounded: list[Rounded], log_k: float) -> int:
    """Bytes of the file with every weight rounded at k = 2**log_k."""
    for one in rounded:
        one.put(2.0**log_k)
    return artifact.nbytes(rounded[0].weight.model)


def _first_guess(rounded: list[Rounded], target: float) -> tuple[float, float]:
    """log2 k at which the codes are estimated at `target` bytes, and how many bytes fewer they are
    an octave of k further."""

    def estimate(log_k: float) -> float:
        return sum(one.estimate(2.0**log_k) for one in rounded)

    steps = [one.steps(1.0).mean() / one.matrix.abs().mean().clamp(min=1e-20) for one in rounded]
    middle = -math.log2(torch.stack(steps).median())  # where a step is a typical weight
    low, high = middle - 12, middle + 6
    while high - low > 0.1:
        middle = (low + high) / 2
        low, high = (middle, high) if estimate(middle) > target else (low, middle)
    return middle, max(4 * (estimate(middle) - estimate(middle + 0.25)), 1.0)
