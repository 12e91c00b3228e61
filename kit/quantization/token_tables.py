"""Token tables in few bits: rows composed of the rows of the tokens that byte-pair encoding merged,
in a basis that suits the loss, and ordered by frequency.

Composition. A token is two shorter tokens side by side ("compression" from "com" and "pression"),
so its row is predicted by theirs and only a residual r_i is trained and stored (predictive coding
along the tree of merges; subword sums as in fastText, Bojanowski et al. 2017, arXiv:1607.04606):

    c_i = r_i + a * c_left(i) + b * c_right(i)        (elementwise; two learned vectors a table)

Rows of the table are c_i B. Codes share one step over all columns, which is right where an error
costs the same in each and no column tells of another (Goyal 2001). So B undoes two changes of
coordinates: by F^1/2, with F the columns' factor of the Fisher information (Martens and Grosse
2015, arXiv:1503.05671), and onto the principal axes.

Order. What an error in a row costs goes with the token's frequency: rows are kept by class, log4 of
it, and share steps. Where the merges are known they nearly tell the classes: a token occurs as
often as it was merged, less the merges that took it into longer ones,

    n_i = m_i - sum over j made of i of m_j,

and merges come in falling order of m, a curve of which a few points suffice. What is stored is the
difference from the class so expected, in integers, so that a file is read alike everywhere.
"""

import zlib
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from kit.core.calibration import gradients
from kit.core.steps import Step, Stored, register_step
from kit.core.weights import Weight, weights
from kit.models.moe import Permute
from kit.quantization import kernels
from kit.quantization.fake import FakeQuantize
from kit.quantization.formats import Format, round_half

BASIS = Format(4)  # residuals are taken in the rounded basis, so that it may be coarse
LEAST_CURVATURE = 1e-2  # of a direction, relative to the mean: flatter ones are not, further away
LEAST_SENSITIVITY = 1e-8  # relative to the largest: rows that no gradient reached
# power of the sensitivity by which a and b fit a row: the many rare ones live on their parts
LEVEL = 0.15
MOST = 2**31 - 1  # that the coder takes


class _Compose(torch.autograd.Function):
    """Row after row, on the CPU wherever the table is: little to compute, in many steps."""

    @staticmethod
    def forward(ctx, residual, left, right, parts):
        ctx.parts = parts
        rows = kernels.compose(residual.cpu(), left.cpu(), right.cpu(), parts)
        ctx.save_for_backward(rows, left.cpu(), right.cpu())
        return rows.to(residual.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = kernels.compose_backward(*ctx.saved_tensors, ctx.parts, grad.cpu())
        return *(part.to(grad.device) for part in grads), None


def checksum(parts: np.ndarray) -> int:
    """CRC-32 of the parts, by which a file tells whether it was given the right ones."""
    return zlib.crc32(np.ascontiguousarray(parts, np.int32).tobytes())


def _check_parts(stated: int, parts: np.ndarray | None, rows: int) -> None:
    if parts is None:
        raise ValueError("it is made of merges: pass load(path, parts=tokenizer.parts)")
    if checksum(parts) != stated or len(parts) != rows:
        raise ValueError("it was made with another tokenizer's merges: pass its own parts")


@register_step("composition")
class Composition(Step):
    """Residuals (V, D) -> rows (V, D), float32. The basis (D, D) is not trained.

    Args:
        parts: int (V, 2), two earlier tokens each is made of, or -1 twice (`BPETokenizer.parts`).
        width: D.
    Raises ValueError for parts that do not precede their token.
    """

    class settings(Stored):
        parts: int
        basis: FakeQuantize.settings

    rank = 30

    def __init__(self, parts: np.ndarray, width: int):
        super().__init__()
        self.parts = np.ascontiguousarray(parts, np.int32)
        if self.parts.ndim != 2 or (self.parts.max(1) >= np.arange(len(self.parts))).any():
            raise ValueError("a token's parts must come before it: pass BPETokenizer.parts")
        if width > max(len(parts), 4096):  # what of it no file's bytes would justify
            raise ValueError(f"a basis for {width} columns is larger than its {len(parts)} rows")
        self.left, self.right = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("basis", torch.eye(width))
        self.rounding = FakeQuantize(self.basis, BASIS)

    def forward(self, residual: Tensor) -> Tensor:
        rows = _Compose.apply(residual, round_half(self.left), round_half(self.right), self.parts)
        return rows @ self.rounding(self.basis)

    def encode(self, x: Tensor, stored: Tensor, write) -> dict:
        if x.dtype != torch.float32:
            raise ValueError(f"a composed table in {x.dtype} has no file: save it in float32")
        for factor in (self.left, self.right):
            write.tensor(factor.half())
        basis = self.rounding.encode(self.basis, self.rounding(self.basis), write)
        return {"parts": checksum(self.parts), "basis": basis}

    @classmethod
    def decode(cls, entry, read, weight, stored: Tensor, parts) -> tuple["Composition", None]:
        _check_parts(entry.parts, parts, len(stored))
        if stored.ndim != 2 or stored.dtype != torch.float32:
            raise ValueError(f"a {stored.dtype} of {stored.ndim} axes is no composed table")
        made = cls(parts, stored.shape[1])
        for factor in (made.left, made.right):
            factor.data.copy_(read.tensor(factor.shape, torch.float16))
        square = Weight(made, nn.Linear(*made.basis.shape, bias=False), "weight", "basis")
        made.rounding, basis = FakeQuantize.decode(entry.basis, read, square, None, None)
        made.basis.copy_(basis)
        return made, None

    @torch.no_grad()
    def fit(self, rows: Tensor, sensitivity: Tensor, curvature: Tensor) -> Tensor:
        """Sets basis, a and b, and returns the residuals of `rows` (V, D).

        sensitivity (V,) and curvature (D, D): Kronecker factors of the table's Fisher information.
        """
        importance = (sensitivity / sensitivity.max()).clamp(min=LEAST_SENSITIVITY)
        residual = self._factors(rows, importance**LEVEL)
        scale, axes = torch.linalg.eigh(curvature)
        scale = (scale / scale.mean()).clamp(min=LEAST_CURVATURE).sqrt()
        weighed = residual @ (axes * scale)
        _, turn = torch.linalg.eigh(weighed.T @ (importance.sqrt()[:, None] * weighed))
        # so that the learning rate meets weights of a usual size
        size = (weighed.square().mean() / residual.square().mean()).sqrt()
        self.basis.copy_(size * turn.flip(1).T @ (axes / scale).T)
        inverse = torch.linalg.inv(self.rounding(self.basis))
        return self._factors(rows @ inverse, importance**LEVEL)

    @torch.no_grad()
    def _factors(self, rows: Tensor, importance: Tensor) -> Tensor:
        """Sets a and b by least squares, rows weighted (V,); returns the residuals."""
        at = torch.from_numpy(np.flatnonzero(self.parts[:, 0] >= 0)).to(rows.device)
        first, second = torch.from_numpy(self.parts).to(rows.device)[at].long().unbind(1)
        y, x = rows[at], torch.stack([rows[first], rows[second]], -1)
        w = importance[at][:, None, None]
        gram = torch.einsum("ndi,ndj->dij", w * x, x)
        damping = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean()
        gram += damping * torch.eye(2, device=x.device)
        solution = torch.linalg.solve(gram, torch.einsum("ndi,nd->di", w * x, y))
        self.left.copy_(solution[:, 0]), self.right.copy_(solution[:, 1])
        residual = rows.clone()
        residual[at] -= round_half(self.left) * rows[first] + round_half(self.right) * rows[second]
        return residual


def _tables(model: nn.Module, size: int, matrices: bool, allowed: type | None) -> list[Weight]:
    """The weights with an entry for each of `size` tokens, without other steps than `allowed`."""
    found = [w for w in weights(model) if w.original.shape[:1] == (size,)]
    found = [w for w in found if w.original.ndim == 2 or not matrices]
    if not found:
        what = f"no weight of {type(model).__name__} has the {size:,} rows of a token table"
        raise ValueError(f"{what}: pass what belongs to its own vocabulary")
    for weight in found:
        for step in weight.steps:
            if allowed is None or not isinstance(step, allowed):
                raise ValueError(f"{weight.name!r} carries a {step.kind} step: arrange it before")
    return found


def compose_tables(model: nn.Module, parts: np.ndarray, batches: Iterable, loss) -> nn.Module:
    """Puts a `Composition` on every matrix with a row for each token (embedding, output layer), in
    place, and returns the model. What it computes stays the same.

    Args:
        loss: loss(model, batch) -> scalar, whose gradients on `batches` say what errors cost.
    Raises ValueError when no matrix has as many rows as `parts`, and for one that carries steps.
    """
    tables = {weight.name: weight for weight in _tables(model, len(parts), True, None)}
    factors = dict.fromkeys(tables, (0.0, 0.0))
    for grads in gradients(model, batches, loss):
        for name in tables:
            (rows, columns), grad = factors[name], grads[name]
            factors[name] = rows + grad.square().mean(1), columns + grad.T @ grad
    for name, weight in tables.items():
        composition = Composition(parts, weight.original.shape[1]).to(weight.original.device)
        weight.assign(composition.fit(weight.original.detach(), *factors[name]))
        weight.put(composition)
    return model


def frequency_classes(counts: np.ndarray, top: int) -> np.ndarray:
    """round(log4((top + 1) / (count + 1))) for counts (V,): int64, halves up."""
    return sum((top + 1) >> (2 * j + 1) >= counts + 1 for j in range(16)).astype(np.int64)


def _points(size: int) -> np.ndarray:
    """Tokens whose merges the file tells: eight in each doubling, and the last."""
    octaves = range(size.bit_length() + 1)
    return np.unique([min(size - 1, 2**o + 2**o * i // 8) for o in octaves for i in range(8)])


def merge_curve(counts: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Largest count, and how often the tokens of `_points` were merged (0 for bytes)."""
    merged = np.array(counts, np.int64)
    for token in range(len(parts) - 1, -1, -1):
        for part in parts[token]:
            if part >= 0:
                merged[part] += merged[token]
    points = _points(len(parts))
    told = np.where(parts[points, 0] >= 0, merged[points], 0)
    return np.minimum([max(counts), *told], MOST)


def expected_classes(curve: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Class of each token from `merge_curve` and parts; m * number is linear between points."""
    (top, *merged), ids, points = curve, np.arange(len(parts)), _points(len(parts))
    right = np.searchsorted(points, np.maximum(ids, 1)).clip(1)
    (a, b), (m_a, m_b) = ((x[right - 1], x[right]) for x in (points, np.array(merged)))
    m = (m_a * a * (b - ids) + m_b * b * (ids - a)) // ((b - a) * np.maximum(ids, 1))
    m[parts[:, 0] < 0] = 0
    left = m.copy()
    for column in parts.T:
        np.subtract.at(left, column[column >= 0], m[column >= 0])
    return frequency_classes(left.clip(0), top)


@register_step("row_order")
class RowOrder(Step):
    """Rows by class, (V, ...) -> rows by token, the same shape and dtype.

    classes: int64 (V,), of each token; parts: int (V, 2), its merge, and `merge_curve`, or None.
    """

    class settings(Stored):
        parts: int | None = None

    rank = 20

    def __init__(self, classes: np.ndarray, parts: np.ndarray | None = None, curve=None):
        super().__init__()
        self.classes, self.parts, self.curve = classes, parts, curve
        tokens = torch.from_numpy(classes.argsort(kind="stable"))
        self.register_buffer("tokens", tokens)  # of each row
        self.register_buffer("rows", tokens.argsort())  # of each token

    def forward(self, rows: Tensor) -> Tensor:
        return Permute.apply(rows, self.rows, self.tokens)

    def encode(self, x: Tensor, stored: Tensor, write) -> dict:
        if self.parts is None:
            write.integers(self.classes)
            return {}
        surprise = self.classes - expected_classes(self.curve, self.parts)
        write.integers(np.concatenate([self.curve, surprise]))
        return {"parts": checksum(self.parts)}

    @classmethod
    def decode(cls, entry, read, weight, stored: Tensor, parts) -> tuple["RowOrder", None]:
        count = len(stored)
        if entry.parts is None:
            return cls(read.integers(count)), None
        _check_parts(entry.parts, parts, count)
        size = 1 + len(_points(count))
        values = read.integers(size + count)
        curve = values[:size]
        return cls(values[size:] + expected_classes(curve, parts), parts, curve), None


def order_rows(model: nn.Module, counts: np.ndarray) -> nn.Module:
    """Puts one `RowOrder` on every weight with an entry for each token (embedding, output layer and
    its bias), in place, and returns the model. What it computes stays the same.

    counts: (V,), how often each token occurs in the training data.
    Raises ValueError when no weight has as many rows, and for steps but a composition.
    """
    counts = np.asarray(counts, np.int64)
    tables = _tables(model, len(counts), False, Composition)
    composed = [step for weight in tables for step in weight.steps]
    parts = composed[0].parts if composed else None
    curve = None if parts is None else merge_curve(counts, parts)
    order = RowOrder(frequency_classes(counts, counts.max()), parts, curve)
    order.to(tables[0].original.device)
    for weight in tables:
        weight.assign(weight.original.detach()[order.tokens])
        weight.put(order)
    return model
