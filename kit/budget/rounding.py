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
saves more than it costs: each unit of |code| takes log2(1 / theta) bits in a geometric distribution
(a bit is worth ln(2) / 6 squared steps at fine steps; less where errors are made up for).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from kit import artifact
from kit.budget.rate import geometric_ratio
from kit.core import ans
from kit.core.calibration import gradients
from kit.core.compiled import compiled, in_threads
from kit.core.obs import inverse_factor
from kit.core.protocols import call_of, device_of, tensors_of
from kit.core.settings import Count, NotNegative, settings
from kit.core.weights import Weight, check_values, weights
from kit.quantization import formats
from kit.quantization.column_scale import ColumnScale
from kit.quantization.fake import FakeQuantize
from kit.quantization.formats import HALF, Format

TRIALS = 6  # of k, after the first guess
CLOSE = 0.997  # of the bytes asked for: near enough
PIECE = 256  # rows that a thread rounds at once
SPAN = 2048  # columns, at most, that make up for each other's errors
SAMPLE = 1 << 19  # codes of a weight from which the first k is guessed


@settings
class RoundingSettings:
    """Constants of rounding, chosen on validation data of a sentence encoder.

    bit_value: squared steps that a bit is worth. prior: of a row's sensitivity, relative to the
    mean over rows, for a few batches say little of a rare one. damping: of H, relative to its mean
    diagonal. most_blocks: steps of a weight; rows share one where there are more. small: weights
    of fewer values are kept in half precision.
    """

    bit_value: NotNegative = 0.04
    prior: NotNegative = 0.2
    damping: NotNegative = 0.01
    most_blocks: Count = 4096
    small: Count = 1024


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
        outputs, kind = call_of(batch).to(device_of(model))(model), self.outputs
        if not (found := tensors_of(outputs)):
            what = f"a {type(outputs).__name__} holds no tensor"
            raise ValueError(f"{what}: give a model that returns tensors, or a loss of your own")
        out, least = found[0], 2 if kind == "logits" else 1
        if not out.is_floating_point() or out.ndim < least or out.shape[-1] < least:
            what = f"the first output, {out.dtype} of shape {tuple(out.shape)}, holds no {kind}"
            other = "'features'" if out.is_floating_point() else "a model that gives floats first"
            raise ValueError(f"{what}: choose {other}, or give a loss of your own")
        if kind == "features":
            noise = torch.randn(out.shape, generator=self.generator)
            return (out * noise.to(out)).sum()
        log_p = out.float().log_softmax(-1).flatten(0, -2)
        if log_p.isnan().any():
            raise ValueError("the model's outputs are not finite: look for NaN in the inputs")
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=self.generator)
        return -log_p.gather(1, drawn.to(log_p.device)).sum()


def curvature(model: nn.Module, batches: Iterable, loss: Callable) -> dict[str, tuple]:
    """Factors of the Fisher information of each weight matrix that `loss` reaches: s (R,), and H
    with a mean diagonal of 1, its diagonal blocks of at most SPAN columns (blocks, W, W), the last
    one padded with zeros. Raises ValueError without a batch."""
    views = {weight.name: weight.view for weight in weights(model, matrices=True)}
    sums, count = {}, 0
    for grads in gradients(model, batches, loss):
        count += 1
        for name in views.keys() & grads.keys():
            grad = views[name].matrix(grads[name].detach()).float()
            rows, columns = sums.get(name, (0.0, 0.0))
            reached = _spans(grad[grad.any(1)])  # few rows of an embedding
            sums[name] = rows + grad.square().mean(1), columns + reached.mT @ reached
    if sums and not any(rows.any() for rows, _ in sums.values()):
        raise ValueError("the loss has no gradient but zero in any weight: give another loss")
    for name, (rows, columns) in sums.items():
        if not torch.isfinite(columns).all():
            raise ValueError(f"the gradients of {name!r} hold NaN or infinite values")
        mean = columns.diagonal(dim1=1, dim2=2).sum() / views[name].columns
        sums[name] = rows / count, columns / mean.clamp(min=1e-30)
    return sums


def _spans(matrix: Tensor, fill: float = 0.0) -> Tensor:
    """(R, C) -> (blocks, R, W), side by side, the last one padded."""
    columns = matrix.shape[1]
    width = -(-columns // -(-columns // SPAN))
    padded = nn.functional.pad(matrix, (0, -columns % width), value=fill)
    return padded.unflatten(1, (-1, width)).transpose(0, 1)


class Rounded:
    """A weight, its steps but for the factor k, and its codes for any k."""

    def __init__(self, weight: Weight, s: Tensor, gram: Tensor, settings: RoundingSettings):
        self.weight, self.settings, view = weight, settings, weight.view
        upper = inverse_factor(gram.double(), settings.damping)
        cost = upper.diagonal(dim1=1, dim2=2).flatten()[: view.columns].square().reciprocal()
        mean = cost.log().mean().exp()
        self.columns = ColumnScale.nearest((mean / cost).sqrt(), view)
        self.matrix = view.matrix(weight.value.detach()).float() / self.columns.scale
        upper = upper / _spans(self.columns.scale[None], fill=1.0)
        self.upper = upper.float().flatten(0, 1)[: view.columns].contiguous()
        size = -(-view.rows // settings.most_blocks)
        self.format = Format(12, granularity="rows", group_size=size, scale="log8")
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
        theta = geometric_ratio((self.matrix.abs().mean(1) / step).clamp(min=1e-3))
        return step, (-torch.log2(theta) * self.settings.bit_value / 2).clamp(max=0.5)

    def estimate(self, k: float) -> float:
        """Bytes of the codes, from some rows and without feedback, which changes them little."""
        every = max(1, self.matrix.numel() // SAMPLE)
        x, step, zone = (part[::every] for part in (self.matrix, *self._rows(k)))
        size = torch.floor((x / step[:, None]).abs() + 0.5 - zone[:, None])
        codes = torch.copysign(size.clamp(0, self.format.qmax), x).int().cpu().numpy()
        return ans.estimate(codes) * len(self.matrix) / len(codes)

    def put(self, k: float) -> None:
        """Rounds the weight with the errors made up for, and puts the steps on it."""
        step, zone = self._rows(k)
        codes = self.matrix.cpu().clone(memory_format=torch.contiguous_format)
        pieces = zip(*(part.cpu().split(PIECE) for part in (codes, step, zone)))
        upper, most = self.upper.cpu().numpy(), np.float32(self.format.qmax)

        def work():
            for piece in pieces:
                _sweep(*(part.numpy() for part in piece), upper, most)

        in_threads(work, min(torch.get_num_threads(), -(-len(codes) // PIECE)))
        self.place(codes.to(step) * step[:, None] + 0.0, self.steps(k), int(codes.abs().max()))

    def place(self, matrix: Tensor, steps: Tensor, most: int) -> None:
        """Puts a matrix of whole steps, at most `most` of them, in place of the weight."""
        weight, tensor = self.weight, self.weight.view.tensor(matrix)
        weight.set_steps([])
        weight.assign(tensor)
        format = replace(self.format, bits=8) if most < 128 else self.format
        weight.put(FakeQuantize(tensor, format, weight.view, qparams=(steps, None)))
        weight.put(self.columns)


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _sweep(rest, step, zone, upper, most):
    """`kit.core.obs.column_sweep` row by row; in place of `rest` (R, C) come its codes. upper
    (C, W): each column's row of its diagonal block."""
    width = upper.shape[1]
    for r in range(len(rest)):
        row, least = rest[r], np.float32(0.5) - zone[r]
        for j in range(len(row)):
            size = min(max(np.floor(abs(row[j] / step[r]) + least), np.float32(0)), most)
            code = np.float32(math.copysign(size, row[j]))
            first = j - j % width
            error = (row[j] - code * step[r]) / upper[j, j - first]
            row[j] = code
            for c in range(j + 1, min(first + width, len(row))):
                row[c] -= error * upper[j, c - first]


def round_to_budget(
    model: nn.Module, batches: Iterable, target_bytes: int, loss: Callable | None = None,
    settings: RoundingSettings = RoundingSettings(),
) -> nn.Module:  # fmt: skip
    """Rounds a trained model, in place, to a file of at most `target_bytes`; returns the model.

    Steps and codes follow from what errors cost, see above; small tensors become half precision,
    where that holds their values.

    Args:
        batches: calibration inputs (`kit.core.protocols.call_of`); some hundred samples in small
            batches. Their targets are not used.
        loss: of (model, batch), summed over samples; by default `SampledLoss("logits")`.
    Raises ValueError, and leaves the model as it was: without a batch, for weights with steps, and
    where the bytes do not suffice.
    """
    found = [w for w in weights(model) if w.original.is_floating_point()]
    for weight in found:
        check_values(weight.original, weight.name)
    if carrying := next((w.name for w in found if w.steps), None):
        raise ValueError(f"{carrying!r} carries steps already: round a plain model (`materialize`)")
    factors = curvature(model, batches, loss or SampledLoss())
    large = [w for w in found if w.name in factors and w.original.numel() >= settings.small]
    rounded = [Rounded(weight, *factors.pop(weight.name), settings) for weight in large]
    if not rounded:
        raise ValueError(f"no weight matrix of {settings.small} values or more has a gradient")
    kept, large = [w.original.detach().clone() for w in found], {w.weight.name for w in rounded}
    try:
        for weight in found:
            if weight.name not in large and formats.fits_half(weight.original):
                weight.put(FakeQuantize(weight.original.detach(), HALF, weight.view))
        _fit(model, rounded, target_bytes)
    except BaseException:
        for weight, value in zip(found, kept):
            weight.set_steps([])
            weight.assign(value)
        raise
    return model


def _fit(model: nn.Module, rounded: list[Rounded], target_bytes: int) -> None:
    """Finds k by secants. Raises ValueError where no k suffices."""
    for one in rounded:
        one.place(torch.zeros_like(one.matrix), one.steps(1.0), 0)
    least = artifact.nbytes(model)
    log_k, slope = _first_guess(rounded, target_bytes - least)
    coarse, fine, last = math.inf, -math.inf, (math.nan, math.nan)  # log k that fits, that does not
    for trial in range(4 * TRIALS if least <= target_bytes else 0):
        if trial >= TRIALS:
            log_k = coarse if coarse < math.inf else fine + 4
        for one in rounded:
            one.put(2.0**log_k)
        size = artifact.nbytes(model)
        if size <= target_bytes:
            if log_k == coarse or size >= CLOSE * target_bytes or size == last[1]:
                return  # size == last[1]: as fine as steps become
            coarse = log_k
        else:
            fine = log_k
        seen = (last[1] - size) / (log_k - last[0]) if log_k != last[0] else 0.0
        slope, last = seen if seen > slope / 20 else slope, (log_k, size)
        log_k += (size - (1 + CLOSE) / 2 * target_bytes) / slope
        if not fine < log_k < coarse:
            log_k = min((fine + coarse) / 2, fine + 1)
    what = f"where every code is zero the file takes {least}"
    raise ValueError(f"{target_bytes} bytes are too few: {what}")


def _first_guess(rounded: list[Rounded], target: float) -> tuple[float, float]:
    """log2 k at which the codes are estimated at `target` bytes, and how many bytes fewer they are
    an octave of k further."""
    estimate = lambda log_k: sum(one.estimate(2.0**log_k) for one in rounded)  # noqa: E731
    at = bisect_left(range(-320, 320), -target, key=lambda i: -estimate(i / 8)) / 8 - 40
    return at, max(4 * (estimate(at) - estimate(at + 0.25)), 1.0)
