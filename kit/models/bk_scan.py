"""The left resolvent and its adjoint as scans in plain torch, for CUDA: O(N) work, O(log N) sweeps.

N is cut into chunks of CHUNK steps. A sweep over the steps inside a chunk runs for all chunks at
once; what a chunk hands to the next is found by doubling. Products of the steps' matrices lose
digits and grow, so they are kept in complex128 (a few a chunk) and divided by their largest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16


def _scan(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """y_i = (a_i y_{i-1} + b_i) / (c_i y_{i-1} + d_i) along dimension 1, from 0; all (B, N, C)."""
    batch, steps, channels = a.shape
    padded = (F.pad(part, (0, 0, 0, -steps % CHUNK), value=1) for part in (a, b, c, d))
    parts = [part.reshape(batch, -1, CHUNK, channels, 1).unbind(2) for part in padded]
    upper, lower = torch.eye(2, dtype=torch.complex128, device=a.device)
    for a_i, b_i, c_i, d_i in zip(*parts):
        upper, lower = a_i * upper + b_i * lower, c_i * upper + d_i * lower
    y = _carries(torch.stack([upper, lower], -2)).to(d.dtype).unsqueeze(-1)
    found = [y := (a_i * y + b_i) / (c_i * y + d_i) for a_i, b_i, c_i, d_i in zip(*parts)]
    return torch.stack(found, 2).reshape(batch, -1, channels)[:, :steps]


def _carries(matrix: Tensor) -> Tensor:
    """What comes before each chunk (B, K, C), from the chunks' matrices (B, K, C, 2, 2)."""
    reach = 1
    while reach < matrix.shape[1]:
        matrix = matrix / matrix.abs().amax((-2, -1), keepdim=True)
        later, earlier = matrix[:, reach:], matrix[:, :-reach]
        product = (later[..., :, :, None] * earlier[..., None, :, :]).sum(-2)
        matrix = torch.cat([matrix[:, :reach], product], 1)
        reach *= 2
    after = matrix[..., 0, 1] / matrix[..., 1, 1]  # of 0
    return F.pad(after[:, :-1], (0, 0, 1, 0))


def resolve(x: Tensor, p: Tensor, eta: Tensor) -> tuple[Tensor, ...]:
    """See `bk_kernels.resolve`."""
    zero = torch.zeros_like(x)
    g = _scan(zero, zero + 1, -p, torch.complex(x, (-eta).expand_as(x)))
    return g, g, p


def resolve_backward(g: Tensor, p: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """See `bk_kernels.resolve_backward`."""
    square, zero = g * g, torch.zeros_like(g)
    onward = F.pad((p * square)[:, 1:], (0, 0, 0, 1))
    u = square * _scan(onward.flip(1), grad.conj().flip(1), zero, zero + 1).flip(1)
    dp = F.pad((u[:, 1:] * g[:, :-1]).real, (0, 0, 1, 0))
    return -u.real, dp, -u.imag.sum((0, 1))
