"""The left resolvent and its adjoint as parallel scans in plain torch, for CUDA: O(N) work in O(log N) short sweeps.

N is cut into chunks of CHUNK steps. A sweep over the steps inside a chunk runs for all chunks at once; what a chunk
hands to the next is found by doubling. g is a Moebius action: g_i = M_i(g_{i-1}), M_i = [[0, 1], [-p_i, x_i - 1j*eta]].
Products of M lose digits and grow, so they are kept in complex128 (a few numbers a chunk) and divided by their largest
entry, which does not change the action.
"""

import torch
import torch.nn.functional as F

CHUNK = 16


def _chunks(tensor: torch.Tensor) -> torch.Tensor:
    """(B, N, C) -> (B, K, CHUNK, C), zeros behind the end."""
    batch, steps, channels = tensor.shape
    return F.pad(tensor, (0, 0, 0, -steps % CHUNK)).reshape(batch, -1, CHUNK, channels)


def _normalize(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / matrix.abs().amax((-2, -1), keepdim=True)


def _carries(matrix: torch.Tensor) -> torch.Tensor:
    """g before each chunk (B, K, C) from the chunks' matrices (B, K, C, 2, 2)."""
    reach = 1
    while reach < matrix.shape[1]:
        later, earlier = matrix[:, reach:], matrix[:, :-reach]
        product = (later[..., :, :, None] * earlier[..., None, :, :]).sum(-2)
        matrix = torch.cat([matrix[:, :reach], _normalize(product)], 1)
        reach *= 2
    after = matrix[..., 0, 1] / matrix[..., 1, 1]  # the action on g = 0
    return F.pad(after[:, :-1], (0, 0, 1, 0))


def forward(x: torch.Tensor, p: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """g (B, N, C) complex of x, p (B, N, C) and eta (C,)."""
    d, hopping = torch.complex(_chunks(x), (-eta).expand_as(_chunks(x))), _chunks(p)
    upper = torch.tensor([1, 0], dtype=torch.complex128, device=d.device).expand(*d.shape[:2], d.shape[3], 2)
    lower = upper.flip(-1)
    for d_i, p_i in zip(d.unbind(2), hopping.unbind(2)):
        upper, lower = lower, d_i[..., None] * lower - p_i[..., None] * upper
    g = _carries(_normalize(torch.stack([upper, lower], -2))).to(d.dtype)
    steps = []
    for d_i, p_i in zip(d.unbind(2), hopping.unbind(2)):
        g = 1 / (d_i - p_i * g)
        steps.append(g)
    return torch.stack(steps, 2).flatten(1, 2)[:, : x.shape[1]]


def _linear_scan(factor: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """y_i = term_i + factor_i y_{i-1} along dimension 1, from 0; (B, N, C)."""
    factors, terms = _chunks(factor).unbind(2), _chunks(term).unbind(2)
    product, local = [factors[0]], [terms[0]]
    for factor_i, term_i in zip(factors[1:], terms[1:]):
        product.append(factor_i * product[-1])
        local.append(term_i + factor_i * local[-1])
    reach, through, after = 1, product[-1], local[-1]
    while reach < after.shape[1]:
        after = torch.cat([after[:, :reach], after[:, reach:] + through[:, reach:] * after[:, :-reach]], 1)
        through = torch.cat([through[:, :reach], through[:, reach:] * through[:, :-reach]], 1)
        reach *= 2
    before = F.pad(after[:, :-1], (0, 0, 1, 0))
    y = torch.stack(local, 2) + torch.stack(product, 2) * before[:, :, None]
    return y.flatten(1, 2)[:, : factor.shape[1]]


def backward(g: torch.Tensor, p: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for x, p and eta; ``grad`` (B, N, C) complex is torch's gradient of g."""
    square = g * g
    onward = F.pad((p * square)[:, 1:], (0, 0, 0, 1))  # lambda_i = conj(grad_i) + p_{i+1} g_{i+1}^2 lambda_{i+1}
    u = square * _linear_scan(onward.flip(1), grad.conj().flip(1)).flip(1)
    dp = F.pad((u[:, 1:] * g[:, :-1]).real, (0, 0, 1, 0))
    return -u.real, dp, -u.imag.sum((0, 1))
