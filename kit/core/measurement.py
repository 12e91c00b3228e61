"""Measurement: calls timed against each other, errors of outputs, peak memory, operations, what
slows a process."""

import ctypes
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kit.core.protocols import evaluating, tensors_of

BLOCK, ROUNDS = 0.004, 50  # seconds that a short call is repeated for; blocks of a call at most
FAINT = 1e-12  # of the power of the strongest output: what float32 can tell from zero beside it
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Latency:
    """Seconds a call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


def measure(calls: dict[str, Callable], seconds=1.0, cutoff=math.inf) -> dict[str, Latency]:
    """Times calls against each other, for about `seconds` or three rounds: trust the ratios.

    Each call in turn runs for a block of a few milliseconds, so that a busy machine slows all of
    them alike. Where torch computes with one thread, CPU time is taken, to which other processes
    add little. Calls over `cutoff` times slower than the first are left out.
    """
    if not calls:
        raise ValueError("measure got no calls: give at least one")
    first = {name: min(_block(call, 1) for _ in range(4)) for name, call in calls.items()}
    limit = cutoff * next(iter(first.values()))
    counts = {n: max(1, int(BLOCK / max(once, 1e-7))) for n, once in first.items() if once <= limit}
    samples, end = {name: [] for name in counts}, time.perf_counter() + seconds
    for round_ in range(ROUNDS):
        if round_ >= 3 and time.perf_counter() > end:
            break
        for name, count in counts.items():
            samples[name].append(_block(calls[name], count))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in samples.items()}
    return {name: Latency(median, low, high) for name, (low, median, high) in quartiles.items()}


def _block(call: Callable, count: int) -> float:
    """Seconds a call; a short one runs once before, for the caches hold what others left there."""
    if count > 1:
        call()
    start = _now()
    for _ in range(count):
        call()
    return (_now() - start) / count


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1 and sys.platform != "win32":
        return time.process_time()
    return time.perf_counter()


def tune_process() -> bool:
    """Lets glibc keep freed blocks of up to 32 MiB for the next use: it would hand them
    back to the system, and each new activation would pay for its pages again. False elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    thresholds = {-3: 32 * 2**20, -1: 2**31 - 1}  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
    return mallopt is not None and all(mallopt(*item) for item in thresholds.items())


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: this process's largest resident size so far, or torch's largest allocation on CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # Linux, where ru_maxrss begins at what the parent process had
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def floats_of(outputs) -> list[Tensor]:
    """The floating-point and complex tensors of a nest as float32, the latter with a last dimension
    of two; its other tensors if there are no such."""
    tensors = tensors_of(outputs)
    floats = [y for y in tensors if y.is_floating_point() or y.is_complex()]
    parts = [torch.view_as_real(y) if y.is_complex() else y for y in floats or tensors]
    return [part.detach().float().cpu() for part in parts]


def flat(outputs) -> Tensor:
    """All values of `floats_of` in one vector."""
    return torch.cat([torch.zeros(0), *(part.reshape(-1) for part in floats_of(outputs))])


def relative_error(outputs, reference) -> float:
    """Mean squared difference over the reference's mean square, the largest of any tensor's.

    Infinite values that agree are left out. A tensor weaker than FAINT of the strongest counts as
    if it were that strong. Infinite if shapes differ, the difference is not finite, or nothing is
    there to be compared.
    """
    found, wanted = floats_of(outputs), floats_of(reference)
    if not wanted or [y.shape for y in found] != [r.shape for r in wanted]:
        return float("inf")
    kept = [(y == r).logical_and(y.isinf()).logical_not() for y, r in zip(found, wanted)]
    pairs = [(y[k], r[k]) for y, r, k in zip(found, wanted, kept) if k.any()]
    powers = torch.tensor([r.square().mean() for _, r in pairs] or [1.0])
    losses = torch.tensor([(y - r).square().mean() for y, r in pairs] or [0.0])
    error = (losses / powers.clamp_min(max(FAINT * powers.max().item(), 1e-30))).max().item()
    return error if error == error else float("inf")


def macs(model: nn.Module, example: Tensor | tuple) -> int:
    """Multiply-accumulates of matrix products, convolutions and attentions in `model(example)`, as
    executed: an expert counts for the tokens routed to it. Element-wise work is not counted."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(*(example if isinstance(example, tuple) else (example,)))
    return counter.get_total_flops() // 2


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 in hardware, so that precision="bfloat16" pays."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def oversubscribed(cpu_share: float, load=None, cores=None) -> str | None:
    """A hint when this process gets under 70 % of a core (`cpu_share`, CPU seconds a second) or
    more processes want to run (`load`, of the last minute) than there are `cores`; else None."""
    cores = cores or os.cpu_count() or 1
    if load is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < cores + 1 and cpu_share >= 0.7:
        return None
    share = f"load {load:.1f} on {cores} cores, this process gets {cpu_share:.1f}"
    slow = "threads that wait for each other run up to 20x slower"
    return f"hint: this machine is busy ({share}): {slow}; stop other jobs or set OMP_NUM_THREADS=1"
