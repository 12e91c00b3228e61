"""The BK mixer on CPU: numba kernels for the left resolvent, its reflection coefficient, the gate behind it, the causal
convolution before it, and their adjoints, sequential over N and vectorized over the channels.

Arrays are C-contiguous and channel-last; complex numbers lie as (real, imag) pairs in the last dimension. The work is
cut into tiles (batch rows x channels) that torch.get_num_threads() threads draw from one iterator: no
barrier, so a busy machine costs little, and nothing that a forked process could inherit broken.
"""

import itertools

import numpy as np
import torch

from kit.core.compiled import compiled, in_threads

GRAIN = 250_000  # elements a thread must get to be worth waking
BLOCK = 32  # fewest channels in a tile, cut only where the batch has too few rows


kernel = compiled(fastmath={"contract", "nsz"})


# Slices of rows and short loops over few arrays: LLVM vectorizes a loop only if it can prove in at most eight pointer
# comparisons that its arrays do not overlap. What both recursions share is inlined, or the proof fails. With `sign` 1 it is
# g_i = 1 / (x_i - 1j*eta - p_i g_{i-1}), with -1 h_i = 1 / (x_i - 1j*eta + p_i conj(h_{i-1})).
@compiled(inline="always")
def _resolve(x_i, p_i, eta, sign, real, imag):
    """(real, imag) from step i-1 to step i."""
    one = eta.dtype.type(1)
    for c in range(eta.size):
        d = x_i[c] - sign * p_i[c] * real[c]
        e = eta[c] + p_i[c] * imag[c]
        scale = one / (d * d + e * e)
        real[c] = d * scale
        imag[c] = e * scale


@compiled(inline="always")
def _resolve_backward(g, p, sign, u_real, u_imag, dx, dp, deta, b, i, low, high):
    """Gradients of step i from u = g_i^2 lambda_i, and u made what step i adds to lambda_{i-1}."""
    dx_i, dp_i, deta_b = dx[b, i, low:high], dp[b, i, low:high], deta[b, low:high]
    for c in range(u_real.size):
        dx_i[c] = -u_real[c]
        deta_b[c] -= u_imag[c]
    if i == 0:
        dp_i[:] = 0
    else:
        p_i, before = p[b, i, low:high], g[b, i - 1, 2 * low : 2 * high]
        for c in range(u_real.size):
            dp_i[c] = sign * u_real[c] * before[2 * c] - u_imag[c] * before[2 * c + 1]
        for c in range(u_real.size):
            u_real[c] *= sign * p_i[c]
            u_imag[c] *= p_i[c]


@kernel
def _forward(x, p, eta, g, first, last, low, high):
    eta = eta[low:high]
    real, imag = np.empty_like(eta), np.empty_like(eta)
    one = eta.dtype.type(1)
    for b in range(first, last):
        real[:] = 0
        imag[:] = 0
        for i in range(x.shape[1]):
            _resolve(x[b, i, low:high], p[b, i, low:high], eta, one, real, imag)
            g_i = g[b, i, 2 * low : 2 * high]
            for c in range(eta.size):
                g_i[2 * c] = real[c]
                g_i[2 * c + 1] = imag[c]


@kernel
def _backward(g, p, grad, dx, dp, deta, first, last, low, high):
    u_real, u_imag = np.empty_like(deta[0, low:high]), np.empty_like(deta[0, low:high])
    one = deta.dtype.type(1)
    for b in range(first, last):
        u_real[:] = 0
        u_imag[:] = 0
        for i in range(dx.shape[1] - 1, -1, -1):
            g_i, w_i = g[b, i, 2 * low : 2 * high], grad[b, i, 2 * low : 2 * high]
            for c in range(u_real.size):
                real, imag = g_i[2 * c], g_i[2 * c + 1]
                square, twice = real * real - imag * imag, (real + real) * imag
                lam_real, lam_imag = u_real[c] + w_i[2 * c], u_imag[c] - w_i[2 * c + 1]
                u_real[c] = square * lam_real - twice * lam_imag
                u_imag[c] = square * lam_imag + twice * lam_real
            _resolve_backward(g, p, one, u_real, u_imag, dx, dp, deta, b, i, low, high)


@kernel
def _reflection(x, p, eta, h, r, first, last, low, high):
    eta = eta[low:high]
    real, imag = np.empty_like(eta), np.empty_like(eta)
    one = eta.dtype.type(1)
    for b in range(first, last):
        real[:] = 0
        imag[:] = 0
        for i in range(x.shape[1]):
            _resolve(x[b, i, low:high], p[b, i, low:high], eta, -one, real, imag)
            h_i, r_i = h[b, i, 2 * low : 2 * high], r[b, i, 2 * low : 2 * high]
            for c in range(eta.size):
                h_i[2 * c] = real[c]
                h_i[2 * c + 1] = imag[c]
            for c in range(eta.size):
                scale = one / (real[c] * real[c] + (imag[c] + one) * (imag[c] + one))
                r_i[2 * c] = (real[c] * real[c] + imag[c] * imag[c] - one) * scale
                r_i[2 * c + 1] = -(real[c] + real[c]) * scale


@kernel
def _reflection_backward(h, p, grad, dx, dp, deta, first, last, low, high):
    u_real, u_imag = np.empty_like(deta[0, low:high]), np.empty_like(deta[0, low:high])
    one = deta.dtype.type(1)
    for b in range(first, last):
        u_real[:] = 0
        u_imag[:] = 0
        for i in range(dx.shape[1] - 1, -1, -1):
            h_i, w_i = h[b, i, 2 * low : 2 * high], grad[b, i, 2 * low : 2 * high]
            for c in range(u_real.size):  # dr/dh = 2j / (h + 1j)^2
                real, imag = h_i[2 * c], h_i[2 * c + 1] + one
                scale = one / (real * real + imag * imag)
                real, imag = real * scale, imag * scale
                square, twice = real * real - imag * imag, (real + real) * imag
                w_real, w_imag = w_i[2 * c] + w_i[2 * c], w_i[2 * c + 1] + w_i[2 * c + 1]
                u_real[c] += w_real * twice + w_imag * square
                u_imag[c] += w_real * square - w_imag * twice
            for c in range(u_real.size):
                real, imag = h_i[2 * c], h_i[2 * c + 1]
                square, twice = real * real - imag * imag, (real + real) * imag
                lam_real, lam_imag = u_real[c], u_imag[c]
                u_real[c] = square * lam_real - twice * lam_imag
                u_imag[c] = square * lam_imag + twice * lam_real
            _resolve_backward(h, p, -one, u_real, u_imag, dx, dp, deta, b, i, low, high)


@kernel
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


@kernel
def _gate_backward(r, gate, grad, dr, dgate, first, last, low, high):
    channels = r.shape[2] // 2
    for b in range(first, last):
        for i in range(r.shape[1]):
            r_i, dr_i = r[b, i, 2 * low : 2 * high], dr[b, i, 2 * low : 2 * high]
            a_real, a_imag = gate[b, i, low:high], gate[b, i, channels + low : channels + high]
            w_real, w_imag = grad[b, i, low:high], grad[b, i, channels + low : channels + high]
            for c in range(a_real.size):
                dr_i[2 * c] = w_real[c] * a_real[c]
                dr_i[2 * c + 1] = w_imag[c] * a_imag[c]
            da_real, da_imag = dgate[b, i, low:high], dgate[b, i, channels + low : channels + high]
            for c in range(a_real.size):
                da_real[c] = w_real[c] * r_i[2 * c]
                da_imag[c] = w_imag[c] * r_i[2 * c + 1]


@kernel
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


@kernel
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


def _cuts(size: int, pieces: int) -> list[tuple[int, int]]:
    edges = [size * k // pieces for k in range(pieces + 1)]
    return list(zip(edges, edges[1:]))


def _run(function, shape: tuple[int, int, int], *tensors: torch.Tensor) -> None:
    batch, steps, channels = shape
    arrays = [tensor.detach().numpy() for tensor in tensors]
    threads = max(1, min(torch.get_num_threads(), batch * steps * channels // GRAIN))
    if threads == 1:
        return function(*arrays, 0, batch, 0, channels)
    rows, blocks = min(batch, 4 * threads), max(1, min(threads // batch, channels // BLOCK))
    tiles = itertools.product(_cuts(batch, rows), _cuts(channels, blocks))

    def work():
        for (first, last), (low, high) in tiles:
            function(*arrays, first, last, low, high)

    in_threads(work, threads)


def forward(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """g (B, N, C) complex of contiguous x, p (B, N, C) and eta (C,)."""
    g = x.new_empty(*x.shape, 2)
    _run(_forward, x.shape, x, p, eta, g.flatten(2))
    return torch.view_as_complex(g)


def backward(g: torch.Tensor, p: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for x, p and eta; ``grad`` (B, N, C) complex and contiguous is torch's gradient of g."""
    return _adjoint(_backward, g, p, grad)


def _adjoint(
    function, g: torch.Tensor, p: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dp, deta = torch.empty_like(p), torch.empty_like(p), p.new_zeros(p.shape[0], p.shape[2])
    _run(function, p.shape, torch.view_as_real(g).flatten(2), p, torch.view_as_real(grad).flatten(2), dx, dp, deta)
    return dx, dp, deta.sum(0)


def reflection(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h and r = (h - 1j) / (h + 1j), (B, N, C) complex, of contiguous x, p (B, N, C) and eta (C,):
    h_i = 1 / (x_i - 1j*eta + p_i conj(h_{i-1}))."""
    h, r = x.new_empty(*x.shape, 2), x.new_empty(*x.shape, 2)
    _run(_reflection, x.shape, x, p, eta, h.flatten(2), r.flatten(2))
    return torch.view_as_complex(h), torch.view_as_complex(r)


def reflection_backward(
    h: torch.Tensor, p: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for x, p and eta; ``grad`` (B, N, C) complex and contiguous is torch's gradient of r."""
    return _adjoint(_reflection_backward, h, p, grad)


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
