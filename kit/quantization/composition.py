"""Token tables in few bits: rows composed from the rows of the tokens that byte-pair encoding merged, in a basis that suits
the loss.

A BPE token is two shorter tokens side by side ("compression" from "com" and "pression"), so its row is predicted by
theirs and only a residual is left to train and to store:

    c_i = r_i + a * c_left(i) + b * c_right(i)        (elementwise; a and b are two learned vectors a table)

The tokens of one byte have no parts. Where a residual is zero a row costs nothing and still differs from all others.
This is predictive coding (DPCM) along the tree of merges; subword sums as in fastText (Bojanowski et al. 2017,
arXiv:1607.04606) with the segmentation that the tokenizer already has. The merges are the tokenizer's, and stay there.

Rows of the table are c_i B. Codes share one step over all columns, which is right where an error costs the same in each and
no column tells of another (Goyal 2001, "Theoretical foundations of transform coding"). So B undoes two changes of
coordinates: by F^1/2, with F the columns' factor of the Fisher information (Martens and Grosse 2015, arXiv:1503.05671),
and onto the principal axes of what is to be coded (Karhunen-Loeve), after which the energy is in few columns.
"""

import zlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from kit.core.weights import gradients, named_weights, original_of, set_steps
from kit.quantization import kernels
from kit.quantization.fake import FakeQuantize
from kit.quantization.formats import Format

BASIS = Format(4)  # residuals are taken in the rounded basis, so that it may be coarse
LEAST_CURVATURE = 1e-2  # of a direction, relative to their mean: flatter ones are not flat further away
LEAST_SENSITIVITY = 1e-8  # relative to the largest: rows that no gradient reached
LEVEL = 0.15  # power of the sensitivity by which a and b fit a row: it is the many rare ones that live on their parts


def compose_by_levels(residual: Tensor, left: Tensor, right: Tensor, levels) -> Tensor:
    """`kernels.compose` on any device, the shortest tokens first."""
    rows = residual.clone()
    for at, first, second in levels:
        rows[at] += left * rows[first] + right * rows[second]
    return rows


def compose_by_levels_backward(rows: Tensor, left: Tensor, right: Tensor, levels, grad: Tensor) -> tuple[Tensor, ...]:
    """Its adjoint, the longest tokens first."""
    grad, d_left, d_right = grad.clone(), torch.zeros_like(left), torch.zeros_like(right)
    for at, first, second in reversed(levels):
        g = grad[at]
        d_left += (g * rows[first]).sum(0)
        d_right += (g * rows[second]).sum(0)
        grad.index_add_(0, first, left * g).index_add_(0, second, right * g)
    return grad, d_left, d_right


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, left, right, composition):
        ctx.composition, cpu = composition, residual.device.type == "cpu"
        rows = (kernels.compose(residual, left, right, composition.parts) if cpu
                else compose_by_levels(residual, left, right, composition.levels))
        ctx.save_for_backward(rows, left, right)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if grad.device.type == "cpu":
            return *kernels.compose_backward(*ctx.saved_tensors, ctx.composition.parts, grad), None
        return *compose_by_levels_backward(*ctx.saved_tensors, ctx.composition.levels, grad), None


def parts_checksum(parts: np.ndarray) -> int:
    """CRC-32 of the parts, by which a file tells whether it was given the right ones."""
    return zlib.crc32(np.ascontiguousarray(parts, np.int32).tobytes())


class Composition(nn.Module):
    """Parametrization: residuals (V, D) -> rows (V, D), float32. The basis (D, D) begins as the identity and is not trained.

    Args:
        parts: int (V, 2), the two tokens that each token is made of, both before it, or -1 twice (`BPETokenizer.parts`).
        width: D.
    Raises ValueError for parts that do not precede their token.
    """

    def __init__(self, parts: np.ndarray, width: int):
        super().__init__()
        self.parts = np.ascontiguousarray(parts, np.int32)
        made = self.parts[:, 0] >= 0
        if self.parts.ndim != 2 or (self.parts.max(1) >= np.arange(len(self.parts))).any():
            raise ValueError("a token's parts must come before it: pass the `parts` of a BPETokenizer")
        depth = np.zeros(len(self.parts), np.int64)
        for token in np.flatnonzero(made):
            depth[token] = 1 + depth[self.parts[token]].max()
        self.levels = [tuple(torch.from_numpy(x.astype(np.int64)) for x in (at, *self.parts[at].T))
                       for at in (np.flatnonzero(depth == d) for d in range(1, depth.max() + 1))]
        self.left, self.right = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("basis", torch.eye(width))
        self.rounding = FakeQuantize(self.basis, (width, width), BASIS)

    def _apply(self, function, recurse: bool = True):
        self.levels = [tuple(function(x) for x in level) for level in self.levels]
        return super()._apply(function, recurse)

    def forward(self, residual: Tensor) -> Tensor:
        rows = _Compose.apply(residual, _half(self.left), _half(self.right), self)
        return rows @ self.rounding(self.basis)

    @torch.no_grad()
    def fit(self, rows: Tensor, sensitivity: Tensor, curvature: Tensor) -> Tensor:
        """Sets basis, a and b, and returns the residuals of `rows` (V, D).

        sensitivity (V,) and curvature (D, D): Kronecker factors of the Fisher information of the table.
        """
        weights = (sensitivity / sensitivity.max()).clamp(min=LEAST_SENSITIVITY)
        residual = self._factors(rows, weights**LEVEL)
        scale, axes = torch.linalg.eigh(curvature)
        scale = (scale / scale.mean()).clamp(min=LEAST_CURVATURE).sqrt()
        weighed = residual @ (axes * scale)
        _, turn = torch.linalg.eigh(weighed.T @ (weights.sqrt()[:, None] * weighed))
        size = (weighed.square().mean() / residual.square().mean()).sqrt()  # the learning rate meets weights of a usual size
        self.basis.copy_(size * turn.flip(1).T @ (axes / scale).T)
        return self._factors(rows @ torch.linalg.inv(self.rounding(self.basis)), weights**LEVEL)

    @torch.no_grad()
    def _factors(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sets a and b by least squares, each row weighted (V,), and returns the residuals of rows (V, D)."""
        at, first, second = (torch.cat(x) for x in zip(*self.levels))
        y, x = rows[at], torch.stack([rows[first], rows[second]], -1)
        w = weights[at][:, None, None]
        gram = torch.einsum("ndi,ndj->dij", w * x, x)
        gram += 1e-6 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(2, device=x.device)
        solution = torch.linalg.solve(gram, torch.einsum("ndi,nd->di", w * x, y))
        self.left.copy_(solution[:, 0]), self.right.copy_(solution[:, 1])
        residual = rows.clone()
        residual[at] -= _half(self.left) * rows[first] + _half(self.right) * rows[second]
        return residual


def _half(x: Tensor) -> Tensor:
    """Rounded to half precision, as the file holds it, with the gradient straight through."""
    return x + (x.half().float() - x).detach()


def compose_tables(model: nn.Module, parts: np.ndarray, batches: Iterable, loss: Callable) -> nn.Module:
    """Puts a `Composition` on every matrix with a row for each token (embedding, output layer), in place, and returns
    the model. What it computes stays the same; masks and formats of these matrices are dropped.

    batches, loss: loss(model, batch) -> scalar, whose gradients say what an error in a row or a column costs.
    Raises ValueError when no matrix has as many rows as `parts`.
    """
    tables = {name: (m, a) for name, m, a in named_weights(model)
              if original_of(m, a).ndim == 2 and len(original_of(m, a)) == len(parts)}
    if not tables:
        raise ValueError(f"no matrix of {type(model).__name__} has the {len(parts):,} rows of a token table: "
                         "pass the parts of the tokenizer it was trained with")
    for module, attribute in tables.values():
        rows = getattr(module, attribute).detach()
        set_steps(model, module, attribute, [])
        original_of(module, attribute).data.copy_(rows)
    factors = dict.fromkeys(tables, (0.0, 0.0))
    for grads in gradients(model, batches, loss):
        for name in tables:
            rows, columns = factors[name]
            factors[name] = rows + grads[name].square().mean(1), columns + grads[name].T @ grads[name]
    for name, (module, attribute) in tables.items():
        weight = original_of(module, attribute)
        composition = Composition(parts, weight.shape[1]).to(weight.device)
        weight.data.copy_(composition.fit(weight.detach(), *factors[name]))
        set_steps(model, module, attribute, [composition])
    return model
