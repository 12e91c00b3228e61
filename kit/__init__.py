"""Compression of PyTorch models: quantizers, pruners, distillation, and files whose bytes are counted."""

import contextlib
import ctypes
import importlib
import os

__version__ = "0.1.0"

# Torch's idle threads spin by default and starve those of the compiled kernels; read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# glibc hands large freed blocks back to the system, and each next activation pays for its pages anew: keep them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
with contextlib.suppress(AttributeError, TypeError, OSError):  # another C library
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)

_HOMES = {  # imported when first asked for, so that `import kit` stays light
    "kit.pipeline": ("CompressionPipeline",),
    "kit.production": ("DistillationConfig", "OptimizationResult", "ProductionModelOptimizer", "PruningConfig",
                       "quick_optimize", "quick_quantize"),
    "kit.engines.quantized": ("QuantizationConfig", "QuantizedModel"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str):
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'kit' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
