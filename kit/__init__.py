"""Compression of PyTorch models: quantizers, pruners, distillation, files by their true size."""

import importlib

__version__ = "0.1.0"

_HOMES = {  # imported when first asked for, so that `import kit` stays light
    "kit.budget.rounding": ("RoundingSettings", "SampledLoss", "round_to_budget"),
    "kit.pipeline": ("CompressionPipeline",),
    "kit.production": (
        "DistillationConfig",
        "OptimizationResult",
        "ProductionModelOptimizer",
        "PruningConfig",
        "quick_optimize",
        "quick_quantize",
    ),
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
