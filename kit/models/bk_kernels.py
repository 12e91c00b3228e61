"""The BK mixer on CPU: compiled kernels for the resolvent and its reflection coefficient, the gate
behind it, the causal convolution before it, and their adjoints.

Arrays are C-contiguous and channel-last; a complex number is a (real, imag) pair in the last
dimension. A kernel runs step after step, vectorized over channels, on a tile: batch rows [first,
last) and channels [low, high). torch.get_num_threads() threads share the tiles. LLVM vectorizes a
loop only if at most eight comparisons of pointers tell that its arrays do not overlap: hence the
slices, and short loops over few arrays.
"""

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from kit.core.compiled import compiled, in_threads

GRAIN = 250_000  # elements a thread must get to be worth waking
BLOCK = 32  # fewest channels in a tile, cut only where the batch has too few rows

kernel = compiled(fastmath={"contract", "nsz"})


@kernel
def _resolve(x, p, eta, h, r, first, last, low, high):
    eta = eta[low:high]
    real, imag, one = np.empty_like(eta), np.empty_like(eta), eta.dtype.type(1)
    sign = one if r is None else -one
    for b in range(first, last):
        real[:] = 0
        imag[:] = 0
        for i in range(x.shape[1]):
            x_i, p_i = x[b, i, low:high], p[b, i, low:high]
            for c in range(eta.size):
                d = x_i[c] - sign * p_i[c] * real[c]
                e = eta[c] + p_i[c] * imag[c]
                scale = one / (d * d + e * e)
                real[c] = d * scale
                imag[c] = e * scale
            h_i = h[b, i, 2 * low : 2 * high]
            for c in range(eta.size):
                h_i[2 * c] = real[c]
                h_i[2 * c + 1] = imag[c]
            if r is not None:
                r_i = r[b, i, 2 * low : 2 * high]
                for c in range(eta.size):
                    scale = one / (real[c] * real[c] + (imag[c] + one) * (imag[c] + one))
                    r_i[2 * c] = (real[c] * real[c] + imag[c] * imag[c] - one) * scale
                    r_i[2 * c + 1] = -(real[c] + real[c]) * scale


@kernel
def _resolve_backward(h, p, grad, reflected, dx, dp, deta, first, last, low, high):
    u_real, u_imag = np.empty_like(deta[0, low:high]), np.empty_like(deta[0, low:high])
    one = deta.dtype.type(1)
    sign = -one if reflected else one
    for b in range(first, last):
        deta_b = deta[b, low:high]
        u_real[:] = 0
        u_imag[:] = 0
        for i in range(dx.shape[1] - 1, -1, -1):
            h_i, w_i = h[b, i, 2 * low : 2 * high], grad[b, i, 2 * low : 2 * high]
            dx_i, dp_i, p_i = dx[b, i, low:high], dp[b, i, low:high], p[b, i, low:high]
            if reflected:  # dr/dh = 2j / (h + 1j)^2
                for c in range(u_real.size):
                    real, imag = h_i[2 * c], h_i[2 * c + 1] + one
                    scale = one / (real * real + imag * imag)
                    real, imag = real * scale, imag * scale
                    square, twice = real * real - imag * imag, (real + real) * imag
                    w_real, w_imag = w_i[2 * c] + w_i[2 * c], w_i[2 * c + 1] + w_i[2 * c + 1]
                    u_real[c] += w_real * twice + w_imag * square
                    u_imag[c] += w_real * square - w_imag * twice
            else:
                for c in range(u_real.size):
                    u_real[c] += w_i[2 * c]
                    u_imag[c] -= w_i[2 * c + 1]
            for c in range(u_real.size):  # u = h_i^2 lambda_i
                real, imag = h_i[2 * c], h_i[2 * c + 1]
                square, twice = real * real - imag * imag, (real + real) * imag
                lam_real, lam_imag = u_real[c], u_imag[c]
                u_real[c] = square * lam_real - twice * lam_imag
                u_imag[c] = square * lam_imag + twice * lam_real
            for c in range(u_real.size):
                dx_i[c] = -u_real[c]
                deta_b[c] -= u_imag[c]
            if i == 0:
                dp_i[:] = 0
                continue
            before = h[b, i - 1, 2 * low : 2 * high]
            for c in range(u_real.size):
                dp_i[c] = sign * u_real[c] * before[2 * c] - u_imag[c] * before[2 * c + 1]
            for c in range(u_real.size):  # what step i adds to lambda_{i-1}
                u_real[c] *= sign * p_i[c]
                u_imag[c] *= p_i[c]


@kernel
def _gate(r, gate, y, first, last, low, high):
    for b in range(first, last):
        for i in range(r.shape[1]):
            r_i = r[b, i, 2 * low : 2 * high]
            for part in range(2):
                gate_i, y_i = gate[b, i, part, low:high], y[b, i, part, low:high]
                for c in range(y_i.size):
                    y_i[c] = r_i[2 * c + part] * gate_i[c]


@kernel
def _gate_backward(r, gate, grad, dr, dgate, first, last, low, high):
    for b in range(first, last):
        for i in range(r.shape[1]):
            r_i, dr_i = r[b, i, 2 * low : 2 * high], dr[b, i, 2 * low : 2 * high]
            a_real, a_imag = gate[b, i, 0, low:high], gate[b, i, 1, low:high]
            w_real, w_imag = grad[b, i, 0, low:high], grad[b, i, 1, low:high]
            for c in range(a_real.size):
                dr_i[2 * c] = w_real[c] * a_real[c]
                dr_i[2 * c + 1] = w_imag[c] * a_imag[c]
            da_real, da_imag = dgate[b, i, 0, low:high], dgate[b, i, 1, low:high]
            for c in range(a_real.size):
                da_real[c] = w_real[c] * r_i[2 * c]
                da_imag[c] = w_imag[c] * r_i[2 * c + 1]


@kernel
def _convolve(x, taps, bias, y, first, last, low, high):
    reach = taps.shape[0] - 1
    for b in range(first, last):
        for i in range(x.shape[1]):
            y_i = y[b, i, low:high]
            y_i[:] = bias[low:high]
            for k in range(max(0, reach - i), reach + 1):
                x_k, tap = x[b, i + k - reach, low:high], taps[k, low:high]
                for c in range(y_i.size):
                    y_i[c] += tap[c] * x_k[c]


@kernel
def _convolve_backward(x, taps, grad, dx, dtaps, first, last, low, high):
    steps, reach = x.shape[1], taps.shape[0] - 1
    for b in range(first, last):
        dbias = dtaps[b, reach + 1, low:high]
        for i in range(steps):
            x_i, dx_i, w_i = x[b, i, low:high], dx[b, i, low:high], grad[b, i, low:high]
            dx_i[:] = 0
            for k in range(max(0, reach - (steps - 1 - i)), reach + 1):
                w_k, tap = grad[b, i + reach - k, low:high], taps[k, low:high]
                dtap = dtaps[b, k, low:high]
                for c in range(dx_i.size):
                    dx_i[c] += tap[c] * w_k[c]
                    dtap[c] += x_i[c] * w_k[c]
            for c in range(dx_i.size):
                dbias[c] += w_i[c]


def _cuts(size: int, pieces: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(size * k // pieces for k in range(pieces + 1)))


def _run(function, shape: tuple[int, int, int], *arguments: Tensor | bool | None) -> None:
    """Runs a kernel over all tiles of (B, N, C)."""
    batch, steps, channels = shape
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    threads = max(1, min(torch.get_num_threads(), batch * steps * channels // GRAIN))
    rows = min(batch, 4 * threads) if threads > 1 else 1
    blocks = max(1, min(threads // batch, channels // BLOCK))
    tiles = itertools.product(_cuts(batch, rows), _cuts(channels, blocks))

    def work():
        for (first, last), (low, high) in tiles:
            function(*arrays, first, last, low, high)

    in_threads(work, threads)


class Kernel(torch.autograd.Function):
    """A kernel with its adjoint: `forward(*tensors)` returns the result and what
    `backward(*saved, gradient)` needs to return a gradient for each tensor."""

    @staticmethod
    def forward(ctx, forward, backward, *tensors):
        out, *saved = forward(*(tensor.resolve_conj().contiguous() for tensor in tensors))
        ctx.adjoint = backward
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.resolve_conj().contiguous()
        return None, None, *ctx.adjoint(*ctx.saved_tensors, gradient)


def apply(*arguments) -> Tensor:
    """`Kernel.apply`, which torch.compile leaves alone, for its code is compiled already."""
    compiling, run = torch.compiler.is_compiling(), Kernel.apply
    return (torch.compiler.disable(run) if compiling else run)(*arguments)


def _pairs(z: Tensor) -> Tensor:
    """(B, N, 2 C) real of z (B, N, C) complex, in the same memory."""
    return torch.view_as_real(z).flatten(2)


def resolve(x: Tensor, p: Tensor, eta: Tensor, reflected: bool = False) -> tuple[Tensor, ...]:
    """g_i = 1 / (x_i - 1j*eta - p_i g_{i-1}), (B, N, C) complex, of x, p (B, N, C) and eta (C,).

    reflected: r_i = (h_i - 1j) / (h_i + 1j) with h_i = 1 / (x_i - 1j*eta + p_i conj(h_{i-1})).
        Where g is that of the diagonal (-1)^i x_i, h_i is g_i at even i and -conj(g_i) at odd i.
    """
    h = torch.empty(x.shape, dtype=x.dtype.to_complex())
    r = torch.empty_like(h) if reflected else None
    _run(_resolve, x.shape, x, p, eta, _pairs(h), _pairs(r) if reflected else None)
    return r if reflected else h, h, p


def resolve_backward(h: Tensor, p: Tensor, grad: Tensor, reflected=False) -> tuple[Tensor, ...]:
    """From the last step to the first, lambda_i = conj(grad_i) + p_{i+1} g_{i+1}^2 lambda_{i+1};
    real parts of dx_i = -g_i^2 lambda_i, dp_i = g_i^2 g_{i-1} lambda_i, deta = 1j sum_i -dx_i.

    reflected: lambda_i = conj(grad_i) 2j / (h_i + 1j)^2 - p_{i+1} conj(h_{i+1}^2 lambda_{i+1}),
        dp_i = -h_i^2 conj(h_{i-1}) lambda_i.
    """
    dx, dp, deta = torch.empty_like(p), torch.empty_like(p), p.new_zeros(p.shape[0], p.shape[2])
    _run(_resolve_backward, p.shape, _pairs(h), p, _pairs(grad), reflected, dx, dp, deta)
    return dx, dp, deta.sum(0)


reflect = functools.partial(resolve, reflected=True)
reflect_backward = functools.partial(resolve_backward, reflected=True)


def gate(r: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """[Re r, Im r] * gate of r (B, N, C) complex and gate (B, N, 2 C)."""
    y = torch.empty_like(gate)
    _run(_gate, r.shape, _pairs(r), *(t.unflatten(2, (2, -1)) for t in (gate, y)))
    return y, r, gate


def gate_backward(r: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    dr, dgate = torch.empty_like(r), torch.empty_like(gate)
    gate, grad, out = (t.unflatten(2, (2, -1)) for t in (gate, grad, dgate))
    _run(_gate_backward, r.shape, _pairs(r), gate, grad, _pairs(dr), out)
    return dr, dgate


def convolve(x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """y_i = bias + sum_k taps_k x_{i-K+1+k} of x (B, N, D), taps (K, D), bias (D,)."""
    y = torch.empty_like(x)
    _run(_convolve, x.shape, x, taps, bias, y)
    return y, x, taps


def convolve_backward(x: Tensor, taps: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    dx, dtaps = torch.empty_like(x), x.new_zeros(x.shape[0], len(taps) + 1, x.shape[2])
    _run(_convolve_backward, x.shape, x, taps, grad, dx, dtaps)
    dtaps = dtaps.sum(0)  # the last row is the bias
    return dx, dtaps[:-1], dtaps[-1]
