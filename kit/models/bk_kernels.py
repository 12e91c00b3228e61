"""The BK mixer on CPU: numba kernels for the left resolvent, its reflection coefficient, the causal convolution before
it, and their adjoints,
sequential over N and vectorized over the channels.

Arrays are C-contiguous and channel-last; complex numbers lie as (real, imag) pairs in the last dimension. The work is
cut into tiles (batch rows x channels) that torch.get_num_threads() threads draw from one iterator: no
barrier, so a busy machine costs little, and nothing that a forked process could inherit broken.
"""

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

GRAIN = 250_000  # elements a thread must get to be worth waking
BLOCK = 32  # fewest channels in a tile, cut only where the batch has too few rows


def _compile(function):
    """Compile at first use; kept on disk where numba finds a writable place for it."""
    settings = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # no writable cache directory
        return numba.njit(**settings)(function)


# Slices of rows and short loops over few arrays: LLVM vectorizes a loop only if it can prove in at most eight pointer
# comparisons that its arrays do not overlap.
@_compile
def _forward(x, p, eta, g, first, last, low, high):
    eta = eta[low:high]
    real, imag = np.empty_like(eta), np.empty_like(eta)
    one = eta.dtype.type(1)
    for b in range(first, last):
        real[:] = 0
        imag[:] = 0
        for i in range(x.shape[1]):
            x_i, p_i, g_i = x[b, i, low:high], p[b, i, low:high], g[b, i, 2 * low : 2 * high]
            for c in range(eta.size):
                d = x_i[c] - p_i[c] * real[c]
                e = eta[c] + p_i[c] * imag[c]
                scale = one / (d * d + e * e)
                real[c] = d * scale
                imag[c] = e * scale
            for c in range(eta.size):
                g_i[2 * c] = real[c]
                g_i[2 * c + 1] = imag[c]


@_compile
def _backward(g, p, grad, dx, dp, deta, first, last, low, high):
    u_real, u_imag = np.empty_like(deta[0, low:high]), np.empty_like(deta[0, low:high])  # u_i = g_i^2 lambda_i
    c_real, c_imag = np.empty_like(u_real), np.empty_like(u_real)  # carry p_{i+1} u_{i+1}
    for b in range(first, last):
        c_real[:] = 0
        c_imag[:] = 0
        deta_b = deta[b, low:high]
        for i in range(dx.shape[1] - 1, -1, -1):
            g_i, w_i, dx_i = g[b, i, 2 * low : 2 * high], grad[b, i, 2 * low : 2 * high], dx[b, i, low:high]
            for c in range(u_real.size):
                real, imag = g_i[2 * c], g_i[2 * c + 1]
                square, twice = real * real - imag * imag, (real + real) * imag
                lam_real, lam_imag = c_real[c] + w_i[2 * c], c_imag[c] - w_i[2 * c + 1]
                u_real[c] = square * lam_real - twice * lam_imag
                u_imag[c] = square * lam_imag + twice * lam_real
            for c in range(u_real.size):
                dx_i[c] = -u_real[c]
                deta_b[c] -= u_imag[c]
            dp_i = dp[b, i, low:high]
            if i == 0:
                dp_i[:] = 0
                break
            p_i, before = p[b, i, low:high], g[b, i - 1, 2 * low : 2 * high]
            for c in range(u_real.size):
                dp_i[c] = u_real[c] * before[2 * c] - u_imag[c] * before[2 * c + 1]
                c_real[c] = p_i[c] * u_real[c]
                c_imag[c] = p_i[c] * u_imag[c]


@_compile
def _reflect(g, r, first, last, low, high):  # r = (g - 1j) / (g + 1j), its conjugate at odd steps
    one = r.dtype.type(1)
    for b in range(first, last):
        sign = one
        for i in range(g.shape[1]):
            g_i, r_i = g[b, i, 2 * low : 2 * high], r[b, i, 2 * low : 2 * high]
            for c in range(high - low):
                real, imag = g_i[2 * c], g_i[2 * c + 1]
                scale = one / (real * real + (imag + one) * (imag + one))
                r_i[2 * c] = (real * real + imag * imag - one) * scale
                r_i[2 * c + 1] = -(real + real) * scale * sign
            sign = -sign


@_compile
def _reflect_backward(g, grad, dg, first, last, low, high):  # dr/dg = 2j / (g + 1j)^2
    one = dg.dtype.type(1)
    for b in range(first, last):
        sign = one
        for i in range(g.shape[1]):
            g_i, w_i, dg_i = g[b, i, 2 * low : 2 * high], grad[b, i, 2 * low : 2 * high], dg[b, i, 2 * low : 2 * high]
            for c in range(high - low):
                real, imag = g_i[2 * c], g_i[2 * c + 1] + one
                scale = one / (real * real + imag * imag)
                real, imag = real * scale, imag * scale  # conj(1 / (g + 1j))
                square, twice = real * real - imag * imag, (real + real) * imag
                w_real, w_imag = w_i[2 * c] + w_i[2 * c], (w_i[2 * c + 1] + w_i[2 * c + 1]) * sign
                dg_i[2 * c] = w_real * twice + w_imag * square
                dg_i[2 * c + 1] = w_imag * twice - w_real * square
            sign = -sign


@_compile
def _gate(r, gate, y, first, last, low, high):  # y = [Re r, Im r] * gate
    channels = r.shape[2] // 2
    for b in range(first, last):
        for i in range(r.shape[1]):
            r_i = r[b, i, 2 * low : 2 * high]
            a_i, y_i = gate[b, i, low:high], y[b, i, low:high]
            for c in range(a_i.size):
                y_i[c] = r_i[2 * c] * a_i[c]
            a_i, y_i = gate[b, i, channels + low : channels + high], y[b, i, channels + low : channels + high]
            for c in range(a_i.size):
                y_i[c] = r_i[2 * c + 1] * a_i[c]


@_compile
def _gate_backward(r, gate, grad, dr, dgate, first, last, low, high):
    channels = r.shape[2] // 2
    for b in range(first, last):
        for i in range(r.shape[1]):
            r_i, dr_i = r[b, i, 2 * low : 2 * high], dr[b, i, 2 * low : 2 * high]
            for part in range(2):
                start, stop = part * channels + low, part * channels + high
                a_i, w_i, da_i = gate[b, i, start:stop], grad[b, i, start:stop], dgate[b, i, start:stop]
                for c in range(a_i.size):
                    da_i[c] = w_i[c] * r_i[2 * c + part]
                    dr_i[2 * c + part] = w_i[c] * a_i[c]


@_compile
def _convolve(x, taps, bias, y, first, last, low, high):
    steps, reach = x.shape[1], taps.shape[0] - 1
    for b in range(first, last):
        for i in range(steps):
            y_i = y[b, i, low:high]
            y_i[:] = bias[low:high]
            for k in range(max(0, reach - i), reach + 1):
                x_k, tap = x[b, i + k - reach, low:high], taps[k, low:high]
                for c in range(y_i.size):
                    y_i[c] += tap[c] * x_k[c]


@_compile
def _convolve_backward(x, taps, grad, dx, dtaps, first, last, low, high):  # dtaps[:, -1] is the gradient of the bias
    steps, reach = x.shape[1], taps.shape[0] - 1
    for b in range(first, last):
        dbias = dtaps[b, reach + 1, low:high]
        for i in range(steps):
            x_i, dx_i, w_i = x[b, i, low:high], dx[b, i, low:high], grad[b, i, low:high]
            dx_i[:] = 0
            for k in range(max(0, reach - (steps - 1 - i)), reach + 1):
                w_k, tap, dtap = grad[b, i + reach - k, low:high], taps[k, low:high], dtaps[b, k, low:high]
                for c in range(dx_i.size):
                    dx_i[c] += tap[c] * w_k[c]
                    dtap[c] += x_i[c] * w_k[c]
            for c in range(dx_i.size):
                dbias[c] += w_i[c]


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bk_core")


def _cuts(size: int, pieces: int) -> list[tuple[int, int]]:
    edges = [size * k // pieces for k in range(pieces + 1)]
    return list(zip(edges, edges[1:]))


def _run(kernel, shape: tuple[int, int, int], *tensors: torch.Tensor) -> None:
    batch, steps, channels = shape
    arrays = [tensor.detach().numpy() for tensor in tensors]
    threads = max(1, min(torch.get_num_threads(), batch * steps * channels // GRAIN))
    if threads == 1:
        return kernel(*arrays, 0, batch, 0, channels)
    rows, blocks = min(batch, 4 * threads), max(1, min(threads // batch, channels // BLOCK))
    tiles = itertools.product(_cuts(batch, rows), _cuts(channels, blocks))

    def work():
        for (first, last), (low, high) in tiles:
            kernel(*arrays, first, last, low, high)

    helpers = [_pool(os.getpid(), threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


def forward(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """g (B, N, C) complex of contiguous x, p (B, N, C) and eta (C,)."""
    g = x.new_empty(*x.shape, 2)
    _run(_forward, x.shape, x, p, eta, g.flatten(2))
    return torch.view_as_complex(g)


def backward(g: torch.Tensor, p: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for x, p and eta; ``grad`` (B, N, C) complex and contiguous is torch's gradient of g."""
    dx, dp, deta = torch.empty_like(p), torch.empty_like(p), p.new_zeros(p.shape[0], p.shape[2])
    _run(_backward, p.shape, torch.view_as_real(g).flatten(2), p, torch.view_as_real(grad).flatten(2), dx, dp, deta)
    return dx, dp, deta.sum(0)


def reflect(g: torch.Tensor) -> torch.Tensor:
    """(g - 1j) / (g + 1j) of contiguous g (B, N, C) complex, conjugated at odd steps."""
    r = torch.empty_like(g)
    _run(_reflect, g.shape, torch.view_as_real(g).flatten(2), torch.view_as_real(r).flatten(2))
    return r


def reflect_backward(g: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient for g; ``grad`` (B, N, C) complex and contiguous is torch's gradient of ``reflect(g)``."""
    dg = torch.empty_like(g)
    _run(_reflect_backward, g.shape, *(torch.view_as_real(t).flatten(2) for t in (g, grad, dg)))
    return dg


def gate(r: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """[Re r, Im r] * gate of contiguous r (B, N, C) complex and gate (B, N, 2 C)."""
    y = torch.empty_like(gate)
    _run(_gate, r.shape, torch.view_as_real(r).flatten(2), gate, y)
    return y


def gate_backward(r: torch.Tensor, gate: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for r and gate; ``grad`` (B, N, 2 C) contiguous."""
    dr, dgate = torch.empty_like(r), torch.empty_like(gate)
    _run(_gate_backward, r.shape, torch.view_as_real(r).flatten(2), gate, grad, torch.view_as_real(dr).flatten(2), dgate)
    return dr, dgate


def convolve(x: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y_i = bias + sum_k taps_k x_{i-K+1+k} of contiguous x (B, N, D), taps (K, D), bias (D,)."""
    y = torch.empty_like(x)
    _run(_convolve, x.shape, x, taps, bias, y)
    return y


def convolve_backward(
    x: torch.Tensor, taps: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for x, taps and bias; ``grad`` (B, N, D) contiguous."""
    dx, dtaps = torch.empty_like(x), x.new_zeros(x.shape[0], len(taps) + 1, x.shape[2])
    _run(_convolve_backward, x.shape, x, taps, grad, dx, dtaps)
    dtaps = dtaps.sum(0)
    return dx, dtaps[:-1], dtaps[-1]
