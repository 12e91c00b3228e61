"""Compression of PyTorch models: quantizers, pruners, distillation, and files whose bytes are counted."""

__version__ = "0.1.0"
