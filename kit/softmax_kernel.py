"""Softmax of bfloat16 logits on CPU, in place and without leaving the cache: what torch does in six passes
over a float32 copy. The arithmetic is float32; each stored value is rounded to the nearest bfloat16."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

ONE, ROUND, LOWEST = np.float32(1), np.float32(1.5 * 2**23), np.float32(-87)
# Cephes expf (Moshier): exp(x) = 2^k exp(r), |r| <= log(2) / 2, log(2) in two parts.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
P5, P4, P3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
P2, P1, P0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


def _compile(*fastmath):
    def decorate(function):
        try:
            return numba.njit(cache=True, nogil=True, fastmath=set(fastmath))(function)
        except RuntimeError:  # no writable cache directory
            return numba.njit(nogil=True, fastmath=set(fastmath))(function)

    return decorate


@_compile("contract")
def _exp(x):
    """For x <= 0; below -87 as there; nan stays nan. Adding and subtracting ROUND rounds to an integer."""
    if x < LOWEST:
        x = LOWEST
    shifted = x * LOG2_E + ROUND
    k = shifted - ROUND
    r = x - k * LN2_HIGH - k * LN2_LOW
    p = ((((P5 * r + P4) * r + P3) * r + P2) * r + P1) * r + P0
    power = np.uint32((np.float32(shifted).view(np.uint32) + np.uint32(127)) << np.uint32(23))
    return (p * r * r + r + ONE) * power.view(np.float32)


@_compile()
def _widen(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_compile()
def _narrow(x):
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_compile("nnan", "nsz")
def _largest(row, bias):
    """max(row + bias), in lanes, for LLVM does not vectorize a maximum; overlapping parts do no harm. A nan,
    which it may miss, comes out of the sum that follows."""
    width = min(256, row.size)
    lanes = np.full(width, np.float32(-np.inf))
    for part in range((row.size + width - 1) // width):
        start = min(part * width, row.size - width)
        row_part, bias_part = row[start : start + width], bias[start : start + width]
        for j in range(width):
            x = _widen(row_part[j]) + bias_part[j]
            lanes[j] = x if x > lanes[j] else lanes[j]
    return lanes.max()


@_compile("reassoc", "contract", "nsz")
def _softmax_errors(block, bias, targets, losses, sums, first, last):
    for i in range(first, last):
        row, target = block[i], targets[i]
        largest, total = _largest(row, bias), np.float32(0)
        score = _widen(row[target]) + bias[target] - largest
        for j in range(row.size):
            e = _exp(_widen(row[j]) + bias[j] - largest)
            total += e
            row[j] = _narrow(e)
        losses[i] = np.log(total) - score
        scale = ONE / total
        for j in range(row.size):
            p = _widen(row[j]) * scale
            sums[j] += p
            row[j] = _narrow(p)
        error = _exp(score) * scale - ONE
        sums[target] += error - _widen(row[target])
        row[target] = _narrow(error)


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:  # a forked process needs threads of its own
    return ThreadPoolExecutor(threads, thread_name_prefix="softmax")


def softmax_errors_(block: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turns logits without their bias, (n, V) bfloat16 contiguous, into softmax(logits + bias) - one-hot in
    place.

    bias (V,), targets (n,) int64 in [0, V). Returns the losses (n,) and the errors summed over rows (V,),
    float32.
    """
    threads = min(torch.get_num_threads(), len(block))
    losses, sums = torch.empty(len(block)), torch.zeros(threads, block.shape[1])
    bias = torch.zeros(block.shape[1]) if bias is None else bias.detach().float().contiguous()
    arrays = [t.numpy() for t in (block.view(torch.uint16), bias, targets, losses)]
    edges = [len(block) * k // threads for k in range(threads + 1)]
    work = [(*arrays, sums[k].numpy(), edges[k], edges[k + 1]) for k in range(threads)]
    others = [_pool(os.getpid(), threads - 1).submit(_softmax_errors, *w) for w in work[1:]]
    _softmax_errors(*work[0])
    for other in others:
        other.result()
    return losses, sums.sum(0)
