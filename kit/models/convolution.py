"""A depthwise causal convolution on channel-last sequences: a few multiply-adds per element."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.models import bk_kernels


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_i = bias + sum_k weight[:, 0, k] x_{i-K+1+k} with zeros before the first step: torch's
    conv1d of one group a channel, padded on the left.

    x (B, N, D); weight (D, 1, K) and bias (D,) as in `nn.Conv1d(D, D, K, groups=D)`; returns (B, N,
    D). float32 and float64 on CPU run in a compiled kernel, anything else in conv1d. Raises
    ValueError for other shapes.
    """
    parts, width = (x, weight, bias), x.shape[-1:]
    if x.ndim != 3 or weight.ndim != 3 or bias.shape != width or weight.shape[:2] != (*width, 1):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        need = "(B, N, D), (D, 1, K) and (D,)"
        raise ValueError(f"x, weight, bias have shapes {shapes}: give {need}")
    dtypes = {part.dtype for part in parts}
    fits = x.device.type == "cpu" and x.numel() and dtypes in ({torch.float32}, {torch.float64})
    if fits and not torch.compiler.is_compiling():
        kernels = bk_kernels.convolve, bk_kernels.convolve_backward
        return bk_kernels.apply(*kernels, x, weight[:, 0].t(), bias)
    padded = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    return F.conv1d(padded, weight, bias, groups=x.shape[2]).transpose(1, 2)
