"""Quantization: number formats, fake quantization in training, complex tensors, one-shot repair, byte budgets."""

from kit.quantization.fake import FakeQuantize, quantize_weights, quantizers, remove_compression
from kit.quantization.formats import HALF, Format

__all__ = ["HALF", "FakeQuantize", "Format", "quantize_weights", "quantizers", "remove_compression"]
