"""Measurement: calls timed against each other, peak memory, operations, what slows a process."""

import ctypes
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kit.core.protocols import evaluating

BLOCK, ROUNDS = 0.004, 50  # seconds that a short call is repeated for; blocks of a call at most


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
    add little. Calls that a first look finds `cutoff` times slower than the first one are left out.
    Raises ValueError without a call.
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
    """Seconds a call; a short one runs once before, as the caches hold what others left there."""
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
    """Lets glibc keep freed blocks of memory for the next use, up to 32 MiB each; for notebooks.

    It would hand them back to the system, and each new activation would pay for its pages again.
    Returns False where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    mmap_threshold, trim_threshold = -3, -1
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**31 - 1))


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: this process's largest resident size so far, or torch's largest allocation on CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def added_memory(setup: str, work: str) -> int:
    """Bytes that the statements `work` add to the resident memory of a fresh process at their peak.

    The statements `setup` run before. Linux counts the peak from there on; elsewhere it is that of
    the whole process. Raises RuntimeError with the last line of the error when statements fail.
    """
    script = f"""from kit.core.measurement import _resident_peak
{setup}
before = _resident_peak(restart=True)
{work}
print(_resident_peak() - before)"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measured process failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def _resident_peak(restart: bool = False) -> int:
    process = Path("/proc/self")
    if not (process / "status").exists():
        return peak_memory()
    if restart:
        (process / "clear_refs").write_text("5")
    lines = (process / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def macs(model: nn.Module, example: Tensor | tuple) -> int:
    """Multiply-accumulates of matrix products, convolutions and attentions in `model(example)`.

    Counted as executed, so an expert counts for the tokens routed to it (and for padding, where its
    layer pads). Element-wise work, the BK-core's recurrence included, is not counted.
    """
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
    """A hint when too many processes share this machine, else None.

    Args:
        cpu_share: CPU seconds that this process gets a second; the hint comes below 0.7.
        load: processes that want to run (default: the last minute's average); it comes from
            `cores` + 1 on.
    """
    cores = cores or os.cpu_count() or 1
    if load is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < cores + 1 and cpu_share >= 0.7:
        return None
    return (
        f"hint: this machine is busy (load {load:.1f} on {cores} cores, this process gets "
        f"{cpu_share:.1f}): threads that wait for each other run up to 20x slower; stop other jobs "
        "or set OMP_NUM_THREADS=1"
    )
