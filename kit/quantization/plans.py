"""Named choices of formats, as plans for `quantize_weights`."""

import torch.nn as nn

from kit.core.weights import weights
from kit.quantization.formats import HALF, Format

INT8 = Format(8)
INT4_GROUPS = Format(4, granularity="group", group_size=128)


def original_mix(model: nn.Module) -> dict[str, Format]:
    """INT4 groups of 128 for experts, INT8 for other matrices, FP16 for vectors."""
    plan = {}
    for weight in weights(model):
        dimensions = weight.original.ndim
        expert = dimensions == 3 and weight.attribute.startswith("w_")
        plan[weight.name] = HALF if dimensions < 2 else INT4_GROUPS if expert else INT8
    return plan


def uniform(model: nn.Module, format: Format, rest: Format = HALF) -> dict[str, Format]:
    """One format for every weight matrix, another for vectors."""
    return {weight.name: format if weight.is_matrix else rest for weight in weights(model)}
