"""Quantization: number formats, fake quantization in training, complex tensors, one-shot repair."""

from kit.core.weights import materialize as remove_compression
from kit.quantization.activations import ActivationQuantizer, ComplexQuantizer, calibrate
from kit.quantization.bk import PerChannelQuantizedBKCore, QuantizedBKCore, quantize_bk_core
from kit.quantization.fake import FakeQuantize, quantize_weights, quantizers
from kit.quantization.formats import HALF, Format
from kit.quantization.integers import (
    GroupWiseQuantizer,
    QuantizedLinear,
    QuantizedMoELayer,
    pack_layers,
)
from kit.quantization.plans import INT4_GROUPS, INT8, original_mix, uniform

__all__ = [
    "HALF", "INT4_GROUPS", "INT8", "ActivationQuantizer", "ComplexQuantizer", "FakeQuantize",
    "Format", "GroupWiseQuantizer", "PerChannelQuantizedBKCore", "QuantizedBKCore",
    "QuantizedLinear", "QuantizedMoELayer", "calibrate", "original_mix", "pack_layers",
    "quantize_bk_core", "quantize_weights", "quantizers", "remove_compression", "uniform",
]  # fmt: skip
