"""Named choices of formats."""

import torch.nn as nn

from kit.core.weights import named_weights, original_of, weight_matrices
from kit.quantization.formats import HALF, Format

INT8 = Format(8)
INT4_GROUPS = Format(4, granularity="group", group_size=128)


def original_mix(model: nn.Module) -> dict[str, Format]:
    """INT4 in groups of 128 for stacked experts, INT8 per channel for other weights, FP16 for the output layer's and all
    other vectors: the mix of the original design, as a plan for `quantize_weights`."""
    plan = {}
    for name, module, attribute in named_weights(model):
        dimensions = original_of(module, attribute).ndim
        expert = dimensions == 3 and attribute.startswith("w_")
        plan[name] = HALF if dimensions < 2 else INT4_GROUPS if expert else INT8
    return plan


def uniform(model: nn.Module, format: Format, rest: Format = HALF) -> dict[str, Format]:
    """One format for every weight matrix, another for vectors, as a plan for `quantize_weights`."""
    matrices = {name for name, _, _ in weight_matrices(model)}
    return {name: format if name in matrices else rest for name, _, _ in named_weights(model)}
