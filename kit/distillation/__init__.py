"""Distillation: a small model learns from a large one."""

from kit.distillation.features import capture, feature_pairs, layer_mapping
from kit.distillation.fused import Output, TopK, linear_distillation
from kit.distillation.trainer import DistillationTrainer, linear

__all__ = ["DistillationTrainer", "Output", "TopK", "capture", "feature_pairs", "layer_mapping", "linear"]
__all__ += ["linear_distillation"]
