"""A student's shape from a number of parameters."""

import dataclasses
import math
from collections.abc import Iterator

from torch import nn

from kit.models import ResNetBK, ResNetBKConfig

BODY_SHARE = 0.35  # of the parameters, in the layers; the rest is embedding and output
WIDTH_PER_LAYER = 16  # the reference model's 64 / 4


def count_parameters(config: ResNetBKConfig) -> int:
    """Parameters of `ResNetBK(config)`, without building it."""
    return _embedding_parameters(config) + _body_parameters(config)


def _embedding_parameters(config) -> int:
    rank = config.embedding_rank or config.d_model
    up = config.d_model * rank if config.embedding_rank else 0
    table = config.vocab_size * rank + up
    return table + config.vocab_size if config.tied else 2 * table + config.vocab_size


def _body_parameters(config) -> int:
    d = config.d_model
    shapes = zip(*(config.per_layer(name) for name in ("channels", "d_ff", "experts")), strict=True)
    total = 2 * d
    for channels, d_ff, experts in shapes:
        mixer = d * (config.conv + 1) + 4 * channels * (d + 1) + d * (2 * channels + 1) + 2 * channels
        total += mixer + 4 * d + experts * (d + 1) + experts * (2 * d * d_ff + d_ff + d)
    return total


def config_for_parameters(budget: int, vocab_size: int, **fixed) -> ResNetBKConfig:
    """The ResNetBKConfig of at most `budget` parameters that splits them best between its layers and its embedding.

    FFN width, channels and (within a layer) depth follow the width in the reference model's proportions; width and
    embedding rank are searched for the largest body^0.35 * embedding^0.65, whose optimum has 35 % of the parameters in the layers.
    Embedding and output are tied unless `fixed`, any fields of ResNetBKConfig, says otherwise.
    Raises ValueError when even the smallest model is larger than the budget.
    """
    fixed = {"tied": True, **fixed}
    best, best_score, smallest = None, -math.inf, math.inf
    for config in _candidates(budget, vocab_size, fixed):
        total = count_parameters(config)
        smallest = min(smallest, total)
        if total <= budget and _score(config) > best_score:
            best, best_score = config, _score(config)
    if best is None:
        raise ValueError(f"{budget:,} parameters are too few for a vocabulary of {vocab_size:,}: the smallest student "
                         f"has {smallest:,}; choose a larger budget or a smaller vocabulary")  # fmt: skip
    return best


def _candidates(budget: int, vocab_size: int, fixed: dict) -> Iterator[ResNetBKConfig]:
    for width in [fixed["d_model"]] if "d_model" in fixed else range(4, 513, 4):
        depth = round(width / WIDTH_PER_LAYER)
        for layers in [fixed["layers"]] if "layers" in fixed else {max(1, depth + step) for step in (-1, 0, 1)}:
            for rank in [fixed["embedding_rank"]] if "embedding_rank" in fixed else [*range(1, width), None]:
                shape = {"d_ff": 2 * width, "channels": max(2, 3 * width // 4)} | fixed
                shape |= {"vocab_size": vocab_size, "d_model": width, "layers": layers, "embedding_rank": rank}
                yield (config := ResNetBKConfig(**shape))
                if count_parameters(config) > budget:
                    break
        if _body_parameters(config) > 2 * budget:
            return


def _score(config) -> float:
    body, embedding = _body_parameters(config), _embedding_parameters(config)
    return BODY_SHARE * math.log(body) + (1 - BODY_SHARE) * math.log(embedding)


def student_like(teacher: nn.Module, budget: int) -> nn.Module:
    """A new ResNetBK of at most `budget` parameters with the teacher's vocabulary.

    Raises ValueError when the teacher is not a language model with a `config.vocab_size`.
    """
    vocab_size = getattr(getattr(teacher, "config", None), "vocab_size", None)
    if vocab_size is None:
        raise ValueError(f"{type(teacher).__name__} has no config.vocab_size, so its student's shape is not known: "
                         f"pass make_student")  # fmt: skip
    experts = getattr(teacher.config, "experts", 4)
    keep = {"experts": max(experts) if isinstance(experts, tuple) else experts}
    return ResNetBK(config_for_parameters(budget, vocab_size, **keep))


def describe(config: ResNetBKConfig) -> str:
    """The shape in a few words: "48 x 3, 4 experts, rank 16, tied"."""
    values = dataclasses.asdict(config)
    rank = f", rank {values['embedding_rank']}" if values["embedding_rank"] else ""
    tied = "tied" if values["tied"] else "untied"
    return f"{values['d_model']} x {values['layers']}, {values['experts']} experts{rank}, {tied}"
