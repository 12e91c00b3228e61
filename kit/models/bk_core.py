"""The BK-core, diagonal entries of resolvents of tridiagonal operators, in O(N) with exact
gradients; and the causal convolution in front of it.

Each channel is an operator with diagonal x_i, off-diagonal products p_i linking i-1 and i, and the
complex shift i*eta. `left_resolvent` is causal; `staggered_reflection` mixes tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.models import bk_kernels, bk_scan
from kit.models.bk_kernels import apply

on_device = bk_scan  # kernels off the CPU; or notebooks.reference.bk_triton


def left_resolvent_pair(x: Tensor, p: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of `left_resolvent` in plain real arithmetic: a loop for autograd,
    and during torch.export one scan of any length (one ONNX Scan node)."""

    def step(state, inputs):
        (real, imag), (x_i, p_i) = state, inputs
        d, e = x_i - p_i * real, eta + p_i * imag
        scale = 1 / (d * d + e * e)
        return d * scale, e * scale

    state = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    if torch.compiler.is_exporting():
        from torch._higher_order_ops.scan import scan  # wants its outputs apart from its state

        def both(state, inputs):
            return (state := step(state, inputs)), tuple(part.clone() for part in state)

        _, parts = scan(both, state, (x.transpose(0, 1), p.transpose(0, 1)))
        return tuple(part.transpose(0, 1) for part in parts)
    states = [state := step(state, inputs) for inputs in zip(x.unbind(1), p.unbind(1))]
    return tuple(torch.stack(parts, 1) for parts in zip(*states))


def _checked(x: Tensor, p: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = x, p, eta
    if torch.is_autocast_enabled(x.device.type):
        parts = tuple(part if part.dtype == torch.float64 else part.float() for part in parts)
    if x.ndim != 3 or p.shape != x.shape or eta.shape != x.shape[2:] or not x.numel():
        there = ", ".join(str(tuple(part.shape)) for part in parts)
        need = "(B, N, C), (B, N, C) and (C,), none of them empty"
        raise ValueError(f"x, p, eta have shapes {there}: give {need}")
    dtypes = [part.dtype for part in parts]
    if dtypes not in ([torch.float32] * 3, [torch.float64] * 3):
        there = ", ".join(map(str, dtypes))
        raise ValueError(f"x, p, eta are {there}: give all float32 or all float64")
    if not (eta > 0).all():
        least = f"its smallest value is {eta.min().item():g}"
        raise ValueError(f"eta must be positive in every channel, but {least}")
    return parts


def left_resolvent(x: Tensor, p: Tensor, eta: Tensor) -> Tensor:
    """Causal resolvent g_i = 1 / (x_i - 1j*eta - p_i g_{i-1}), g_{-1} = 0: the last diagonal entry
    of the inverse of the operator cut off at i.

    x (B, N, C) float32 or float64: the real diagonal. p (B, N, C) >= 0, not checked: p[:, i] links
    i-1 and i, p[:, 0] is ignored. eta (C,) > 0. Returns g (B, N, C), complex64 or complex128, with
    Im g > 0, |g| <= 1/eta and exact gradients for all arguments; autocast does not touch it.
    Raises ValueError for other shapes or dtypes and for eta <= 0.
    """
    if torch.compiler.is_exporting():
        return torch.complex(*left_resolvent_pair(x, p, eta))
    backend = bk_kernels if x.device.type == "cpu" else on_device
    return apply(backend.resolve, backend.resolve_backward, *_checked(x, p, eta))


def gated_parts(r: Tensor, gate: Tensor) -> Tensor:
    """[Re r, Im r] * gate of r (B, N, C) complex, gate (B, N, 2 C) real; on CPU in one pass."""
    if r.device.type == "cpu" and gate.dtype == r.real.dtype and not torch.compiler.is_exporting():
        return apply(bk_kernels.gate, bk_kernels.gate_backward, r, gate)
    return torch.cat([r.real, r.imag], -1) * gate


def _alternating(x: Tensor) -> Tensor:
    """(N, 1): 1, -1, 1, ... for x (B, N, C)."""
    return 1 - 2 * (torch.arange(x.shape[1], device=x.device) % 2).to(x.dtype).unsqueeze(-1)


def staggered_reflection(x: Tensor, p: Tensor, eta: Tensor) -> Tensor:
    """Reflection coefficient r_i = (g_i - 1j) / (g_i + 1j) of the left resolvent g of the operator
    whose diagonal is (-1)^i x_i, conjugated at odd i. Causal; |r| < 1.

    Around x = 0 a change of x_j moves g_i by (p g^2)^(i-j), and at the centre of the band p g^2 is
    near -1. The alternating signs cancel this rotation: r is a leaky integral of x over some
    sqrt(p) / eta steps. The Cayley transform maps the upper half-plane, where g lives, to the unit
    disc; g = 1j, which p = 1 gives a weak potential, to 0.

    Arguments and errors are those of `left_resolvent`; r (B, N, C) complex.
    """
    if torch.compiler.is_exporting():
        return torch.complex(*staggered_reflection_pair(x, p, eta))
    backend = bk_kernels if x.device.type == "cpu" else on_device
    if backend is not bk_scan:
        return apply(backend.reflect, backend.reflect_backward, *_checked(x, p, eta))
    sign = _alternating(x)
    g = left_resolvent(x * sign, p, eta)
    r = (g - 1j) / (g + 1j)
    return torch.complex(r.real, r.imag * sign)


def staggered_reflection_pair(x: Tensor, p: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of `staggered_reflection` in plain real arithmetic."""
    sign = _alternating(x)
    real, imag = left_resolvent_pair(x * sign, p, eta)
    scale = 1 / (real * real + (imag + 1) * (imag + 1))
    return (real * real + imag * imag - 1) * scale, -2 * real * scale * sign


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_i = bias + sum_k weight[:, 0, k] x_{i-K+1+k} with zeros before the first step: torch's
    conv1d of one group a channel, padded on the left.

    x (B, N, D); weight (D, 1, K) and bias (D,) as in `nn.Conv1d(D, D, K, groups=D)`; returns (B, N,
    D). float32 and float64 on CPU run in a compiled kernel, others in conv1d.
    """
    parts, width = (x, weight, bias), x.shape[-1:]
    if x.ndim != 3 or weight.ndim != 3 or bias.shape != width or weight.shape[:2] != (*width, 1):
        there = ", ".join(str(tuple(part.shape)) for part in parts)
        need = "(B, N, D), (D, 1, K) and (D,)"
        raise ValueError(f"x, weight, bias have shapes {there}: give {need}")
    fits = x.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype == bias.dtype
    if fits and x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
        kernels = bk_kernels.convolve, bk_kernels.convolve_backward
        return apply(*kernels, x, weight[:, 0].t(), bias)
    padded = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    return F.conv1d(padded, weight, bias, groups=x.shape[2]).transpose(1, 2)
