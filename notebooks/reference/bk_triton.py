"""`bk_kernels.resolve`, `reflect` and their adjoints for CUDA, step after step in Triton: a program
runs through the sequence for one row of the batch and BLOCK channels.

`kit.models.bk_core.on_device = bk_triton` puts them to use. They move into the kit when a record of
`gpu_check` shows them faster than `bk_scan`. Triton comes with torch's CUDA builds.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32


@triton.jit
def _resolve(x, p, eta, h, r, steps, channels, REFLECTED: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = c < channels, tl.program_id(0).to(tl.int64) * steps * channels + c
    eta_c = tl.load(eta + c, mask=inside, other=1.0)
    real, imag = tl.zeros_like(eta_c), tl.zeros_like(eta_c)
    for _ in range(steps):
        x_i = tl.load(x + at, mask=inside, other=0.0)
        p_i = tl.load(p + at, mask=inside, other=0.0)
        d = x_i + p_i * real if REFLECTED else x_i - p_i * real
        e = eta_c + p_i * imag
        scale = 1 / (d * d + e * e)
        real, imag = d * scale, e * scale
        tl.store(h + 2 * at, real, mask=inside)
        tl.store(h + 2 * at + 1, imag, mask=inside)
        if REFLECTED:
            scale = 1 / (real * real + (imag + 1) * (imag + 1))
            tl.store(r + 2 * at, (real * real + imag * imag - 1) * scale, mask=inside)
            tl.store(r + 2 * at + 1, -2 * real * scale, mask=inside)
        at += channels


@triton.jit
def _adjoint(
    h, p, grad, dx, dp, deta, steps, channels, REFLECTED: tl.constexpr, BLOCK: tl.constexpr
):
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = c < channels, (b * steps + steps - 1) * channels + c
    real = tl.load(h + 2 * at, mask=inside, other=0.0)
    imag = tl.load(h + 2 * at + 1, mask=inside, other=0.0)
    u_real, u_imag, deta_c = tl.zeros_like(real), tl.zeros_like(real), tl.zeros_like(real)
    for i in range(steps):
        w_real = tl.load(grad + 2 * at, mask=inside, other=0.0)
        w_imag = tl.load(grad + 2 * at + 1, mask=inside, other=0.0)
        p_i = tl.load(p + at, mask=inside, other=0.0)
        first, before = i == steps - 1, at - channels
        before_real = tl.load(h + 2 * before, mask=inside & (not first), other=0.0)
        before_imag = tl.load(h + 2 * before + 1, mask=inside & (not first), other=0.0)
        if REFLECTED:  # dr/dh = 2j / (h + 1j)^2
            scale = 2 / (real * real + (imag + 1) * (imag + 1))
            a, b_ = real * scale, (imag + 1) * scale
            square, twice = (a * a - b_ * b_) / 2, a * b_
            u_real += w_real * twice + w_imag * square
            u_imag += w_real * square - w_imag * twice
        else:
            u_real += w_real
            u_imag -= w_imag
        square, twice = real * real - imag * imag, 2 * real * imag
        lam_real, lam_imag = u_real, u_imag
        u_real = square * lam_real - twice * lam_imag
        u_imag = square * lam_imag + twice * lam_real
        tl.store(dx + at, -u_real, mask=inside)
        deta_c -= u_imag
        v_real = -u_real if REFLECTED else u_real
        tl.store(dp + at, v_real * before_real - u_imag * before_imag, mask=inside)
        u_real, u_imag = v_real * p_i, u_imag * p_i
        real, imag, at = before_real, before_imag, before
    tl.store(deta + b * channels + c, deta_c, mask=inside)


def _run(kernel, shape: tuple[int, int, int], *tensors: Tensor, reflected: bool) -> None:
    batch, steps, channels = shape
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    kernel[batch, triton.cdiv(channels, BLOCK)](*parts, steps, channels, reflected, BLOCK)


def resolve(x: Tensor, p: Tensor, eta: Tensor, reflected: bool = False) -> tuple[Tensor, ...]:
    """See `bk_kernels.resolve`."""
    h = torch.empty(x.shape, dtype=x.dtype.to_complex(), device=x.device)
    r = torch.empty_like(h) if reflected else h
    _run(_resolve, x.shape, x, p, eta, h, r, reflected=reflected)
    return r, h, p


def resolve_backward(h: Tensor, p: Tensor, grad: Tensor, reflected=False) -> tuple[Tensor, ...]:
    """See `bk_kernels.resolve_backward`."""
    dx, dp, deta = torch.empty_like(p), torch.empty_like(p), p.new_empty(p.shape[0], p.shape[2])
    _run(_adjoint, p.shape, h, p, grad, dx, dp, deta, reflected=reflected)
    return dx, dp, deta.sum(0)


reflect = functools.partial(resolve, reflected=True)
reflect_backward = functools.partial(resolve_backward, reflected=True)
