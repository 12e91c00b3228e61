"""Distillation: a small model learns from a large one."""

from kit.distillation.cache import TeacherCache, build_cache
from kit.distillation.features import capture, feature_pairs, layer_mapping
from kit.distillation.fused import Output, SparseTarget, linear_distillation
from kit.distillation.initialize import initialize_from_teacher
from kit.distillation.progressive import ProgressiveDistillation
from kit.distillation.students import config_for_parameters, student_like
from kit.distillation.trainer import DistillationTrainer, Linear

__all__ = ["DistillationTrainer", "Linear", "Output", "ProgressiveDistillation", "SparseTarget", "TeacherCache"]
__all__ += ["build_cache", "capture", "config_for_parameters", "feature_pairs", "initialize_from_teacher"]
__all__ += ["layer_mapping", "linear_distillation", "student_like"]
