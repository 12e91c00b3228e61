"""Distillation: a small model learns from a large one."""

from kit.distillation.cache import TeacherCache, build_cache
from kit.distillation.divergences import register_divergence, register_feature_loss
from kit.distillation.features import capture, feature_pairs, layer_mapping
from kit.distillation.initialize import initialize_from_teacher
from kit.distillation.objective import Output, SparseTarget, linear_distillation
from kit.distillation.progressive import ProgressiveDistillation
from kit.distillation.students import config_for_parameters, student_like
from kit.distillation.trainer import DistillationTrainer, LinearSchedule

__all__ = ["DistillationTrainer", "LinearSchedule", "Output", "ProgressiveDistillation"]
__all__ += ["SparseTarget", "TeacherCache", "build_cache", "capture", "config_for_parameters"]
__all__ += ["feature_pairs", "initialize_from_teacher", "layer_mapping", "linear_distillation"]
__all__ += ["register_divergence", "register_feature_loss", "student_like"]
