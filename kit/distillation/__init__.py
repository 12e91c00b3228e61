"""Distillation: a small model learns from a large one."""

from kit.distillation.cache import TeacherCache, build_cache
from kit.distillation.features import capture, feature_pairs, layer_mapping
from kit.distillation.fused import Output, TopK, linear_distillation
from kit.distillation.trainer import DistillationTrainer, linear

__all__ = ["DistillationTrainer", "Output", "TeacherCache", "TopK", "build_cache", "capture", "feature_pairs"]
__all__ += ["layer_mapping", "linear", "linear_distillation"]
