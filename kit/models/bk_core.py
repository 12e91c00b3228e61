"""The BK-core: diagonal entries of resolvents of tridiagonal operators, in O(N), with exact gradients.

Each channel is an operator with diagonal ``x_i``, off-diagonal products ``p_i`` linking i-1 and i, and the complex
shift ``i*eta``. ``left_resolvent`` is causal; ``resolvent_diagonal`` looks at both sides.
"""

import torch


def left_resolvent_pair(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of :func:`left_resolvent`, in plain real arithmetic (autograd, tracing, ONNX export)."""
    real, imag = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    reals, imags = [], []
    for x_i, p_i in zip(x.unbind(1), p.unbind(1)):
        d, e = x_i - p_i * real, eta + p_i * imag
        scale = 1 / (d * d + e * e)
        real, imag = d * scale, e * scale
        reals.append(real)
        imags.append(imag)
    return torch.stack(reals, 1), torch.stack(imags, 1)


def left_resolvent_reference(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """:func:`left_resolvent` as a plain torch loop."""
    return torch.complex(*left_resolvent_pair(x, p, eta))


def resolvent_diagonal_reference(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """:func:`resolvent_diagonal` as a plain torch loop."""
    link = torch.cat([p[:, 1:], torch.zeros_like(p[:, :1])], 1)  # link[:, i] joins i and i+1
    left = left_resolvent_reference(x, p, eta)
    right = left_resolvent_reference(x.flip(1), link.flip(1), eta).flip(1)
    shift = torch.zeros_like(left[:, :1])
    before = torch.cat([shift, p[:, 1:] * left[:, :-1]], 1)
    after = torch.cat([p[:, 1:] * right[:, 1:], shift], 1)
    return 1 / (torch.complex(x, -eta.expand_as(x)) - before - after)


def left_resolvent(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Causal resolvent ``g_i = 1 / (x_i - 1j*eta - p_i g_{i-1})``, ``g_{-1} = 0``.

    x (B, N, C) float32 or float64: real diagonal. p (B, N, C) >= 0: hopping, ``p[:, i]`` links i-1 and i, ``p[:, 0]``
    is ignored. eta (C,) > 0. Returns g (B, N, C) complex with Im g > 0 and |g| <= 1/eta.
    """
    return left_resolvent_reference(x, p, eta)


def resolvent_diagonal(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Full diagonal of ``(tridiagonal - 1j*eta)^-1``, both directions (not causal); arguments as left_resolvent."""
    return resolvent_diagonal_reference(x, p, eta)
