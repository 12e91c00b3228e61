"""The left resolvent and its adjoint as parallel scans in plain torch, for CUDA: O(N) work in O(log
N) short sweeps.

N is cut into chunks of CHUNK steps. A sweep over the steps inside a chunk runs for all chunks at
once; what a chunk hands to the next is found by doubling. Both recursions are Moebius actions of
matrices M_i: of g_i = M_i(g_{i-1}) it is [[0, 1], [-p_i, x_i - 1j*eta]], of y_i = b_i + a_i y_{i-1}
it is [[a_i, b_i], [0, 1]]. Products of M lose digits and grow, so they are kept in complex128 (a
few numbers a chunk) and divided by their largest entry, which does not change the action.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16


def _chunks(tensor: Tensor) -> Tensor:
    """(B, N, C) -> (B, K, CHUNK, C), zeros behind the end."""
    batch, steps, channels = tensor.shape
    return F.pad(tensor, (0, 0, 0, -steps % CHUNK)).reshape(batch, -1, CHUNK, channels)


def _carries(matrix: Tensor) -> Tensor:
    """What comes before each chunk (B, K, C), from the chunks' matrices (B, K, C, 2, 2)."""
    matrix, reach = matrix.to(torch.complex128), 1
    while reach < matrix.shape[1]:
        matrix = matrix / matrix.abs().amax((-2, -1), keepdim=True)
        later, earlier = matrix[:, reach:], matrix[:, :-reach]
        product = (later[..., :, :, None] * earlier[..., None, :, :]).sum(-2)
        matrix = torch.cat([matrix[:, :reach], product], 1)
        reach *= 2
    after = matrix[..., 0, 1] / matrix[..., 1, 1]  # the action on 0
    return F.pad(after[:, :-1], (0, 0, 1, 0))


def resolve(x: Tensor, p: Tensor, eta: Tensor, reflected: bool = False) -> tuple[Tensor, Tensor]:
    """g (B, N, C) complex, twice, of x, p (B, N, C) and eta (C,); see `bk_kernels.resolve`.

    Raises NotImplementedError if `reflected`.
    """
    if reflected:
        raise NotImplementedError("the scan has no reflection of its own: transform the resolvent")
    diagonal, hopping = _chunks(x), _chunks(p)
    diagonal = torch.complex(diagonal, (-eta).expand_as(diagonal))
    shape = *diagonal.shape[:2], diagonal.shape[3], 2
    upper = torch.tensor([1, 0], dtype=torch.complex128, device=x.device).expand(shape)
    lower = upper.flip(-1)
    for d_i, p_i in zip(diagonal.unbind(2), hopping.unbind(2)):
        upper, lower = lower, d_i[..., None] * lower - p_i[..., None] * upper
    g, steps = _carries(torch.stack([upper, lower], -2)).to(diagonal.dtype), []
    for d_i, p_i in zip(diagonal.unbind(2), hopping.unbind(2)):
        g = 1 / (d_i - p_i * g)
        steps.append(g)
    g = torch.stack(steps, 2).flatten(1, 2)[:, : x.shape[1]]
    return g, g


def _linear_scan(factor: Tensor, term: Tensor) -> Tensor:
    """y_i = term_i + factor_i y_{i-1} along dimension 1, from 0; (B, N, C)."""
    factors, terms = _chunks(factor).unbind(2), _chunks(term).unbind(2)
    product, local = [factors[0]], [terms[0]]
    for factor_i, term_i in zip(factors[1:], terms[1:]):
        product.append(factor_i * product[-1])
        local.append(term_i + factor_i * local[-1])
    zero, one = torch.zeros_like(local[0]), torch.ones_like(local[0])
    matrix = torch.stack([product[-1], local[-1], zero, one], -1).unflatten(-1, (2, 2))
    before = _carries(matrix).to(term.dtype)
    y = torch.stack(local, 2) + torch.stack(product, 2) * before[:, :, None]
    return y.flatten(1, 2)[:, : factor.shape[1]]


def resolve_backward(
    g: Tensor, p: Tensor, grad: Tensor, reflected: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, p and eta; `grad` (B, N, C) complex is torch's gradient of g."""
    square = g * g
    onward = F.pad((p * square)[:, 1:], (0, 0, 0, 1))
    u = square * _linear_scan(onward.flip(1), grad.conj().flip(1)).flip(1)
    dp = F.pad((u[:, 1:] * g[:, :-1]).real, (0, 0, 1, 0))
    return -u.real, dp, -u.imag.sum((0, 1))
