"""Inference engines for quantized models on the CPU: measured on this machine, the fastest chosen.

Every engine computes with the integer codes that the compressed file stores. Which one is fastest
depends on the processor, the layers and the batch size, so `choose_engine` measures.
"""

from kit.engines.choice import ENGINES, Choice, build_engine, choose_engine
from kit.engines.runtime import OnnxEngine

__all__ = ["ENGINES", "Choice", "OnnxEngine", "build_engine", "choose_engine"]
