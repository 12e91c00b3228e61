"""The optimal brain surgeon's sweep over columns, which GPTQ and SparseGPT share.

Columns of a weight get their final values one after another; the error that each makes on the
calibration inputs is spread over the columns still to come:

    w_{>j} -= (w_j - q_j) / U_jj * U_{j,>j},    U^T U = (X^T X + damping)^-1

(Hassibi and Stork 1993; in blocks, as by Frantar et al. 2022, arXiv:2210.17323, algorithm 1).
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U (G, C, C) with U^T U = (gram + damping * its mean diagonal)^-1, gram (G, C, C)
    float64; inputs that never fired count as independent. Raises ValueError when the damped gram
    matrix is not positive definite."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    extra = damping * diagonal.mean(1, keepdim=True) + (diagonal == 0)
    lower, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(extra))
    if not failed.any():
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed.any():
        what = f"damping={damping} leaves inputs linearly dependent"
        raise ValueError(f"{what}: give more, such as 0.01")
    return upper


def column_sweep(weight: Tensor, upper: Tensor, choose: Callable, block: int = BLOCK) -> Tensor:
    """The values (G, R, C) that `choose` gives to the columns of `weight` (G, R, C), from the left.

    choose(j, rest) -> (G, R), the final values of column j; rest (G, R, C) is the weight with the
    errors of the columns before j spread over column j and those of its block.
    """
    rest, values, columns = weight.clone(), torch.empty_like(weight), weight.shape[2]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = torch.zeros_like(rest[:, :, first:last])
        for j in range(first, last):
            values[:, :, j] = choose(j, rest)
            error = (rest[:, :, j] - values[:, :, j]) / upper[:, j, j, None]
            errors[:, :, j - first] = error
            rest[:, :, j + 1 : last] -= error[:, :, None] * upper[:, j, None, j + 1 : last]
        rest[:, :, last:] -= errors @ upper[:, first:last, last:]
    return values
