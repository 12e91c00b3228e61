"""A depthwise causal convolution on channel-last sequences: a few multiply-adds per element, fast on CPU too."""

import torch
import torch.nn.functional as F


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        from kit.models import bk_kernels  # numba takes half a second to import

        x, taps = x.contiguous(), weight[:, 0].t().contiguous()
        ctx.save_for_backward(x, taps)
        return bk_kernels.convolve(x, taps, bias.contiguous())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        from kit.models import bk_kernels

        dx, dtaps, dbias = bk_kernels.convolve_backward(*ctx.saved_tensors, grad.contiguous())
        return dx, dtaps.t()[:, None], dbias


def causal_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``y_i = bias + sum_k weight[:, 0, k] x_{i-K+1+k}`` with zeros before the first step: torch's conv1d of one group
    a channel, padded on the left.

    x (B, N, D); weight (D, 1, K) and bias (D,) as in ``nn.Conv1d(D, D, K, groups=D)``. Returns (B, N, D). float32 and
    float64 on CPU run in a compiled kernel, anything else in conv1d. Raises ValueError for other shapes.
    """
    if x.ndim != 3 or weight.ndim != 3 or weight.shape[:2] != (x.shape[2], 1) or bias.shape != x.shape[2:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"x, weight, bias have shapes {shapes}: give (B, N, D), (D, 1, K) and (D,)")
    compiled = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0
    if compiled and x.dtype == weight.dtype == bias.dtype and not torch.compiler.is_compiling():
        return _CausalConvolution.apply(x, weight, bias)
    padded = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    return F.conv1d(padded, weight, bias, groups=x.shape[2]).transpose(1, 2)
