"""The BK-core: diagonal entries of resolvents of tridiagonal operators, in O(N), with exact gradients.

Each channel is an operator with diagonal ``x_i``, off-diagonal products ``p_i`` linking i-1 and i, and the complex
shift ``i*eta``. ``left_resolvent`` is causal; ``resolvent_diagonal`` looks at both sides; ``staggered_reflection`` is what the language
model mixes tokens by.
"""

import torch
import torch.nn.functional as F


def left_resolvent_pair(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of :func:`left_resolvent` in plain real arithmetic: a loop for autograd, and during
    torch.export one scan of any length (one ONNX Scan node)."""

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


def left_resolvent_reference(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """:func:`left_resolvent` as a plain torch loop."""
    return torch.complex(*left_resolvent_pair(x, p, eta))


def _join(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor, left_resolvent) -> torch.Tensor:
    """The full diagonal from both one-sided resolvents."""
    hopping = p[:, 1:]
    left = left_resolvent(x, p, eta)
    right = left_resolvent(x.flip(1), F.pad(hopping, (0, 0, 0, 1)).flip(1), eta).flip(1)
    coupling = F.pad(hopping * left[:, :-1], (0, 0, 1, 0)) + F.pad(hopping * right[:, 1:], (0, 0, 0, 1))
    return 1 / (torch.complex(x, -eta.expand_as(x)) - coupling)


def resolvent_diagonal_reference(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """:func:`resolvent_diagonal` as a plain torch loop."""
    return _join(x, p, eta, left_resolvent_reference)


class _LeftResolvent(torch.autograd.Function):
    """g and its exact adjoint: ``lambda_i = w_i + p_{i+1} g_{i+1}^2 lambda_{i+1}`` from the last step to the first,
    ``dx_i = -g_i^2 lambda_i``, ``dp_i = g_i^2 g_{i-1} lambda_i``, ``deta = 1j sum_i g_i^2 lambda_i``, real parts."""

    @staticmethod
    def forward(ctx, x, p, eta, backend):
        g = backend.forward(x.contiguous(), p.contiguous(), eta.contiguous())
        ctx.backend = backend
        ctx.save_for_backward(g, p)
        return g

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        g, p = ctx.saved_tensors
        return *ctx.backend.backward(g, p.contiguous(), grad.resolve_conj().contiguous()), None


def _apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply`, outside the graph of torch.compile: its kernels are compiled already."""
    return (torch.compiler.disable(function.apply) if torch.compiler.is_compiling() else function.apply)(*arguments)


def _checked(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if torch.is_autocast_enabled(x.device.type):
        x, p, eta = (part if part.dtype == torch.float64 else part.float() for part in (x, p, eta))
    if x.ndim != 3 or p.shape != x.shape or eta.shape != x.shape[2:] or not x.numel():
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, p, eta))
        raise ValueError(f"x, p, eta have shapes {shapes}: give (B, N, C), (B, N, C) and (C,), none of them empty")
    if x.dtype not in (torch.float32, torch.float64) or not x.dtype == p.dtype == eta.dtype:
        raise ValueError(f"x, p, eta are {x.dtype}, {p.dtype}, {eta.dtype}: give all float32 or all float64")
    if not (eta > 0).all():
        raise ValueError(f"eta must be positive in every channel, but its smallest value is {eta.min().item():g}")
    return x, p, eta


def left_resolvent(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Causal resolvent ``g_i = 1 / (x_i - 1j*eta - p_i g_{i-1})``, ``g_{-1} = 0``: the last diagonal entry of the
    inverse of the operator cut off at i.

    x (B, N, C) float32 or float64: real diagonal. p (B, N, C) >= 0, not checked: hopping, ``p[:, i]`` links i-1 and i,
    ``p[:, 0]`` is ignored. eta (C,) > 0. Returns g (B, N, C), complex64 or complex128, with Im g > 0, |g| <= 1/eta and
    exact gradients for all three arguments. Autocast leaves it in float32.

    Raises ValueError for other shapes or dtypes and for eta <= 0.
    """
    if torch.compiler.is_exporting():
        return torch.complex(*left_resolvent_pair(x, p, eta))
    x, p, eta = _checked(x, p, eta)
    if x.device.type == "cpu":
        from kit.models import bk_kernels as backend  # numba takes half a second to import
    else:
        from kit.models import bk_scan as backend
    return _apply(_LeftResolvent, x, p, eta, backend)


def resolvent_diagonal(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Diagonal of the inverse of the whole operator, ``1 / (x_i - 1j*eta - p_i gL_{i-1} - p_{i+1} gR_{i+1})`` with the
    left resolvent gL and its mirror image gR. Every entry depends on the past *and the future*.

    Arguments, result and errors are those of :func:`left_resolvent`.
    """
    return _join(x, p, eta, left_resolvent)


class _Reflection(torch.autograd.Function):
    """r and its exact adjoint, on CPU. With h_i = g_i at even i and -conj(g_i) at odd i the alternating signs are gone:
    ``h_i = 1 / (x_i - 1j*eta + p_i conj(h_{i-1}))`` and ``r_i = (h_i - 1j) / (h_i + 1j)`` at every i. So
    ``lambda_i = conj(w_i) 2j / (h_i + 1j)^2 - p_{i+1} conj(h_{i+1}^2 lambda_{i+1})``, ``dx_i = -h_i^2 lambda_i``,
    ``dp_i = -h_i^2 conj(h_{i-1}) lambda_i``, ``deta = 1j sum_i h_i^2 lambda_i``, real parts."""

    @staticmethod
    def forward(ctx, x, p, eta):
        from kit.models import bk_kernels

        p = p.contiguous()
        h, r = bk_kernels.reflection(x.contiguous(), p, eta.contiguous())
        ctx.save_for_backward(h, p)
        return r

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        from kit.models import bk_kernels

        return bk_kernels.reflection_backward(*ctx.saved_tensors, grad.resolve_conj().contiguous())


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, gate):
        from kit.models import bk_kernels

        r, gate = r.resolve_conj().contiguous(), gate.contiguous()
        ctx.save_for_backward(r, gate)
        return bk_kernels.gate(r, gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        from kit.models import bk_kernels

        return bk_kernels.gate_backward(*ctx.saved_tensors, grad.contiguous())


def gated_parts(r: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``[Re r, Im r] * gate`` of r (B, N, C) complex and gate (B, N, 2 C) real, on CPU in one pass over memory."""
    if r.device.type == "cpu" and gate.dtype == r.real.dtype and not torch.compiler.is_exporting():
        return _apply(_Gate, r, gate)
    return torch.cat([r.real, r.imag], -1) * gate


def _alternating(x: torch.Tensor) -> torch.Tensor:
    """(N, 1): 1, -1, 1, ... for x (B, N, C)."""
    return 1 - 2 * (torch.arange(x.shape[1], device=x.device) % 2).to(x.dtype).unsqueeze(-1)


def staggered_reflection(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Reflection coefficient ``r_i = (g_i - 1j) / (g_i + 1j)`` of the left resolvent g of the operator whose diagonal is
    ``(-1)^i x_i``, conjugated at odd i. Causal; ``|r| < 1``.

    Around x = 0 a change of x_j moves g_i by ``(p g^2)^(i-j)``, and at the centre of the band ``p g^2`` is near -1. The
    alternating signs cancel this rotation: r is a leaky integral of x over some ``sqrt(p) / eta`` steps, and shifting
    the input by one step shifts r by one step. The Cayley transform maps the upper half-plane, where g lives, to the
    unit disc; ``g = 1j``, which p = 1 gives a weak potential, to 0.

    Arguments and errors are those of :func:`left_resolvent`; r (B, N, C) complex.
    """
    if torch.compiler.is_exporting():
        return torch.complex(*staggered_reflection_pair(x, p, eta))
    if x.device.type == "cpu":
        return _apply(_Reflection, *_checked(x, p, eta))
    sign = _alternating(x)
    g = left_resolvent(x * sign, p, eta)
    r = (g - 1j) / (g + 1j)
    return torch.complex(r.real, r.imag * sign)


def staggered_reflection_pair(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of :func:`staggered_reflection` in plain real arithmetic."""
    sign = _alternating(x)
    real, imag = left_resolvent_pair(x * sign, p, eta)
    scale = 1 / (real * real + (imag + 1) * (imag + 1))
    return (real * real + imag * imag - 1) * scale, -2 * real * scale * sign
