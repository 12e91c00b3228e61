"""Quantization: number formats, fake quantization in training, complex tensors, one-shot repair, byte budgets."""

from kit.quantization.activations import ActivationQuantizer, ComplexQuantizer, calibrate
from kit.quantization.bk import PerChannelQuantizedBKCore, QuantizedBKCore, quantize_bk_core
from kit.quantization.fake import FakeQuantize, quantize_weights, quantizers, remove_compression
from kit.quantization.formats import HALF, Format
from kit.quantization.presets import INT4_GROUPS, INT8, original_mix, uniform

__all__ = ["ActivationQuantizer", "ComplexQuantizer", "FakeQuantize", "Format", "HALF", "INT4_GROUPS", "INT8",
           "PerChannelQuantizedBKCore", "QuantizedBKCore", "calibrate", "original_mix", "quantize_bk_core",
           "quantize_weights", "quantizers", "remove_compression", "uniform"]
