"""Measurement: size of the float32 file, latency side by side, peak memory, multiply-accumulates, the
machine."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kit

PACKAGES = ("torch", "numpy", "numba", "tokenizers", "safetensors", "scikit-learn", "pandas", "papermill")


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


def latency(calls: dict[str, Callable[[], object]], repeats: int = 20) -> dict[str, Latency]:
    """Times the calls in turn, round after round, so that a busy machine slows all alike: trust the ratios.

    Two unmeasured rounds come first. Raises ValueError for no calls or fewer than 3 repeats.
    """
    if not calls or repeats < 3:
        raise ValueError(f"latency got {len(calls)} calls and {repeats} repeats: give at least 1 and 3.")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            start = _now()
            call()
            if round_ >= 2:
                seconds[name].append(_now() - start)
    return {
        name: Latency(statistics.median(s), *statistics.quantiles(s, n=4)[::2]) for name, s in seconds.items()
    }


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


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
        raise RuntimeError(f"the process to be measured failed: {done.stderr.strip().splitlines()[-1]}")
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


def environment() -> dict:
    """What a timing depends on: versions, processor, cores, threads, accelerator."""
    versions = {"python": platform.python_version(), "kit": kit.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, so that precision="bfloat16" pays."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def oversubscribed(cpu_share: float, load: float | None = None, cores: int | None = None) -> str | None:
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
