"""A student's shape from a number of parameters."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from kit.core.protocols import device_of
from kit.models import LanguageModel, ResNetBK, ResNetBKConfig, parameter_count

BODY_SHARE = 0.35  # of the parameters, in the layers; the rest is embedding and output
WIDTH_PER_LAYER = 16  # the reference model's 64 / 4


def config_for_parameters(budget: int, vocab_size: int, **fixed) -> ResNetBKConfig:
    """The ResNetBKConfig of at most `budget` parameters, best split between layers and tables.

    Width of the FFN, channels and (within a layer) depth follow the width in the reference model's
    proportions; width and embedding rank are those of the largest layers^0.35 * tables^0.65, whose
    optimum has 35 % of the parameters in the layers. Embedding and output are tied unless `fixed`,
    any fields of ResNetBKConfig, says otherwise.
    Raises ValueError when even the smallest model is larger than the budget.
    """
    shapes = list(_shapes(budget, vocab_size, {"tied": True, **fixed}))
    fitting = [shape for shape in shapes if shape[1] + shape[2] <= budget]
    if not fitting:
        smallest = min(body + tables for _, body, tables in shapes)
        what = f"{budget:,} parameters are too few for a vocabulary of {vocab_size:,}"
        advice = "choose a larger budget or a smaller vocabulary"
        raise ValueError(f"{what}: the smallest student has {smallest:,}; {advice}")
    return max(fitting, key=lambda shape: shape[1] ** BODY_SHARE * shape[2] ** (1 - BODY_SHARE))[0]


def _shapes(budget: int, vocab_size: int, fixed: dict) -> Iterator[tuple[ResNetBKConfig, int, int]]:
    """Configs with the parameters of their layers and of their token tables."""
    for width in [fixed["d_model"]] if "d_model" in fixed else range(4, 513, 4):
        depth, bodies = round(width / WIDTH_PER_LAYER), []
        for layers in {fixed.get("layers", max(1, depth + step)) for step in (-1, 0, 1)}:
            shape = {"d_ff": 2 * width, "channels": max(2, 3 * width // 4)} | fixed
            shape |= {"vocab_size": vocab_size, "d_model": width, "layers": layers}
            small = shape | {"vocab_size": 1, "tied": True, "embedding_rank": None}
            bodies.append(body := _layer_parameters(ResNetBKConfig(**small)))
            tables = 1 if shape["tied"] else 2
            largest = (budget - body - vocab_size) // (tables * (vocab_size + width))
            ranks = [min(width - 1, max(1, largest)), None]
            for rank in [fixed["embedding_rank"]] if "embedding_rank" in fixed else ranks:
                per_table = vocab_size * width if rank is None else rank * (vocab_size + width)
                config = ResNetBKConfig(**shape | {"embedding_rank": rank})
                yield config, body, vocab_size + tables * per_table
        if min(bodies) > budget:
            return


@cache
def _layer_parameters(config: ResNetBKConfig) -> int:
    """Parameters of the layers of a tied model of one token, counted without memory for them."""
    with torch.device("meta"):
        return parameter_count(ResNetBK(config)) - config.d_model - 1


def student_like(teacher: nn.Module, budget: int) -> ResNetBK:
    """A new ResNetBK of at most `budget` parameters with the teacher's vocabulary, on its device.
    Raises ValueError when the teacher is none of the kit's language models."""
    if not isinstance(teacher, LanguageModel):
        what = f"the vocabulary of a {type(teacher).__name__} is not known"
        raise ValueError(f"{what}: build the student yourself, or pass make_student")
    experts = getattr(teacher.config, "experts", 4)
    experts = max(experts) if isinstance(experts, tuple) else experts
    config = config_for_parameters(budget, teacher.config.vocab_size, experts=experts)
    return ResNetBK(config).to(device_of(teacher))
