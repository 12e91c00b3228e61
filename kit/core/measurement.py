"""Measurement: size of the float32 file, timings side by side, peak memory, operations."""

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

import kit

BLOCK_SECONDS, ROUNDS = 0.004, 50


@dataclass(frozen=True)
class Latency:
    """Seconds a call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


def float32_bytes(model: nn.Module) -> int:
    """Bytes of the model's uncompressed file, what compression is compared with:
    `kit.artifact.float32_bytes`."""
    from kit import artifact

    return artifact.float32_bytes(model)


def measure(
    calls: dict[str, Callable[[], object]], seconds: float = 1.0, cutoff: float = math.inf
) -> dict[str, Latency]:
    """Times calls against each other, for about `seconds` or three rounds: trust the ratios.

    Each call in turn runs for a block of a few milliseconds, so that a busy machine slows all of them
    alike. Where torch computes with one thread, CPU time is taken, to which other processes add
    little. Calls that a first look finds `cutoff` times slower than the first one are left out.

    Raises:
        ValueError: there are no calls.
    """
    if not calls:
        raise ValueError("measure got no calls: give at least one")
    first = {name: min(_block(call, 1) for _ in range(4)) for name, call in calls.items()}
    limit = cutoff * next(iter(first.values()))
    counts = {
        name: max(1, int(BLOCK_SECONDS / max(once, 1e-7)))
        for name, once in first.items()
        if once <= limit
    }
    samples, end = {name: [] for name in counts}, time.perf_counter() + seconds
    for round_ in range(ROUNDS):
        if round_ >= 3 and time.perf_counter() > end:
            break
        for name, count in counts.items():
            samples[name].append(_block(calls[name], count))
    return {name: Latency(*_quartiles(values)) for name, values in samples.items()}


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def _block(call: Callable[[], object], count: int) -> float:
    """Seconds a call; short calls run once unmeasured, for what the call before them left in the caches."""
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
    """Lets glibc keep freed blocks of up to 32 MiB for the next use, in this process.

    It would hand them back to the system, and each new activation would pay for its pages again. What
    notebooks call first; False where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    mmap_threshold, trim_threshold = -3, -1
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**31 - 1))


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: the largest resident size of this process so far, or torch's largest allocation on a CUDA
    device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def added_memory(setup: str, work: str) -> int:
    """Bytes by which the Python statements `work` raise the resident memory of a fresh process at their peak, `setup`
    done before. On Linux the peak is counted from there on: `ru_maxrss` would begin at that of the parent process.
    Raises RuntimeError with the last line of the error when the statements fail."""
    script = f"from kit.core.measurement import _resident_peak\n{setup}\nbefore = _resident_peak(restart=True)\n{work}\n"
    script += "print(_resident_peak() - before)"
    root = Path(kit.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"the process to be measured failed: {done.stderr.strip().splitlines()[-1]}"
        )
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
    """Multiply-accumulates of all matrix products, convolutions and attentions in `model(example)`.

    Counted as executed, so an expert counts for the tokens routed to it (and for padding, where its layer
    pads). Element-wise work, the BK-core's recurrence included, is not counted.
    """
    was_training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(*(example if isinstance(example, tuple) else (example,)))
    model.train(was_training)
    return counter.get_total_flops() // 2


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, so that precision="bfloat16" pays."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def oversubscribed(
    cpu_share: float, load: float | None = None, cores: int | None = None
) -> str | None:
    """A hint when this process gets under 70 % of one core (`cpu_share`: its CPU seconds a second) or more
    processes want to run (`load`: the 1-minute average, by default this machine's) than there are cores; else
    None."""
    cores = cores or os.cpu_count() or 1
    if load is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < cores + 1 and cpu_share >= 0.7:
        return None
    return (
        f"hint: this machine is busy (load {load:.1f} on {cores} cores, this process gets {cpu_share:.1f}): "
        "threads that wait for each other run up to 20x slower; stop other jobs or set OMP_NUM_THREADS=1"
    )
