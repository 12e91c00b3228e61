"""Symmetric fake quantization and composed rows on CPU, each way in one pass over memory.

Torch's operators take ten. x (blocks, length) float32 contiguous, scale (blocks, 1): the arithmetic
of kit.quantization.formats, to the last bit in the forward pass.
"""

import numpy as np
import torch
from torch import Tensor

from kit.core.compiled import compiled

exact = compiled()
sums = compiled(fastmath={"contract", "nsz", "reassoc"})  # in any order, so that they vectorize


def fits(x: Tensor, scale: Tensor, zero: Tensor | None) -> bool:
    """Whether the kernels take these arguments."""
    shaped = x.ndim == 2 and x.numel() > 0 and scale.shape == (len(x), 1)
    single = x.device.type == "cpu" and x.dtype == scale.dtype == torch.float32
    return zero is None and shaped and single and not torch.compiler.is_compiling()


@exact
def _round(x, scale, low, high, out):
    for b in range(x.shape[0]):
        step, row, to = scale[b, 0], x[b], out[b]
        for i in range(row.size):
            to[i] = (min(max(np.rint(row[i] / step), low), high) + np.float32(0)) * step


@sums
def _round_backward(x, scale, low, high, grad, dx, dscale):
    for b in range(x.shape[0]):
        step, row, g, to, total = scale[b, 0], x[b], grad[b], dx[b], np.float32(0)
        for i in range(row.size):
            ratio = row[i] / step
            code = np.rint(ratio)
            inside = low <= code <= high
            to[i] = g[i] if inside else np.float32(0)
            total += g[i] * (code - ratio if inside else min(max(code, low), high))
        dscale[b, 0] = total


@exact
def _compose(rows, left, right, parts):
    for i in range(rows.shape[0]):
        if parts[i, 0] >= 0:
            row, first, second = rows[i], rows[parts[i, 0]], rows[parts[i, 1]]
            for d in range(row.size):
                row[d] += left[d] * first[d] + right[d] * second[d]


@exact
def _compose_backward(rows, left, right, parts, grad, dleft, dright):
    for i in range(rows.shape[0] - 1, -1, -1):
        if parts[i, 0] >= 0:
            g, first, second = grad[i], rows[parts[i, 0]], rows[parts[i, 1]]
            for d in range(g.size):
                dleft[d] += g[d] * first[d]
                dright[d] += g[d] * second[d]
            first, second = grad[parts[i, 0]], grad[parts[i, 1]]
            for d in range(g.size):
                first[d] += left[d] * g[d]
            for d in range(g.size):
                second[d] += right[d] * g[d]


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def fake_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """round(x / scale), clamped to [low, high], times scale."""
    out = torch.empty_like(x)
    _round(*_arrays(x, scale), np.float32(low), np.float32(high), out.numpy())
    return out


def fake_quantize_backward(x: Tensor, scale: Tensor, low: int, high: int, grad: Tensor):
    """Gradients of x and scale: grad in the range, and sums of grad * (code - x / scale inside)."""
    dx, dscale = torch.empty_like(x), torch.empty_like(scale)
    limits = np.float32(low), np.float32(high)
    _round_backward(*_arrays(x, scale), *limits, *_arrays(grad.contiguous(), dx, dscale))
    return dx, dscale


def compose(residual: Tensor, left: Tensor, right: Tensor, parts: np.ndarray) -> Tensor:
    """Rows r_i + left * e_first(i) + right * e_second(i) of residuals (V, D).

    parts (V, 2) has the numbers of two earlier rows, or -1 where a row is its residual alone.
    """
    rows = residual.clone(memory_format=torch.contiguous_format)
    _compose(*_arrays(rows, left, right), parts)
    return rows


def compose_backward(rows: Tensor, left: Tensor, right: Tensor, parts: np.ndarray, grad: Tensor):
    """Gradients of residual, left and right."""
    grad = grad.clone(memory_format=torch.contiguous_format)
    dleft, dright = torch.zeros_like(left), torch.zeros_like(right)
    _compose_backward(*_arrays(rows, left, right), parts, *_arrays(grad, dleft, dright))
    return grad, dleft, dright
