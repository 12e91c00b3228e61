"""Models by name. Language models map tokens (B, T) to logits (B, T, V): `base.LanguageModel`."""

import dataclasses

import torch
from torch import nn

from kit.core.weights import class_of, weights
from kit.models.base import LanguageModel
from kit.models.moe import MoE
from kit.models.peers import (
    LSTMLM,
    DigitsCNN,
    DigitsCNNConfig,
    DigitsMLP,
    DigitsMLPConfig,
    LSTMLMConfig,
    TransformerLM,
    TransformerLMConfig,
)
from kit.models.resnet_bk import BKMixer, ResNetBK, ResNetBKConfig

PAIRS = (ResNetBK, ResNetBKConfig), (LSTMLM, LSTMLMConfig), (TransformerLM, TransformerLMConfig)
PAIRS += (DigitsCNN, DigitsCNNConfig), (DigitsMLP, DigitsMLPConfig)
MODELS = {model.__name__: (model, config) for model, config in PAIRS}

__all__ = ["BKMixer", "LanguageModel", "MODELS", "MoE", "build_model", "parameter_count"]
__all__ += ["recipe", "refresh_config", *(cls.__name__ for pair in MODELS.values() for cls in pair)]


def build_model(class_name: str, config: dict) -> nn.Module:
    """Model from its name and `dataclasses.asdict(model.config)`; lists (from JSON) become tuples.
    Raises ValueError for an unknown name or field, a value of another type than the field's, or one
    that the config rejects."""
    if class_name not in MODELS:
        raise ValueError(f"unknown model {class_name!r}: choose one of {', '.join(MODELS)}")
    model, config_class = MODELS[class_name]
    unknown = set(config) - {field.name for field in dataclasses.fields(config_class)}
    if unknown:
        raise ValueError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}")
    return model(config_class(**config))


def recipe(model: nn.Module) -> dict | None:
    """Name and config that rebuild one of the kit's own models; None for any other."""
    kind = class_of(model)
    if MODELS.get(kind.__name__, (None,))[0] is not kind:
        return None
    return {"class": kind.__name__, "config": dataclasses.asdict(model.config)}


def refresh_config(model: nn.Module) -> None:
    """Makes the config of one of the kit's own models describe the shapes that it has now: its
    method `shapes` gives the fields that pruning changes, as its layers have them. Raises
    ValueError when no config has these shapes, so that the model could not be rebuilt."""
    if recipe(model) is None or not hasattr(model, "shapes"):
        return
    config = dataclasses.replace(model.config, **model.shapes())
    with torch.device("meta"):
        rebuilt = build_model(recipe(model)["class"], dataclasses.asdict(config))
    wanted = {weight.name: tuple(weight.original.shape) for weight in weights(rebuilt)}
    for weight in weights(model):
        shape, kind = tuple(weight.original.shape), type(config).__name__
        if shape != wanted[weight.name]:
            raise ValueError(f"{weight.name!r} has become {shape}, which no {kind} describes")
    model.config = config


def parameter_count(model: nn.Module) -> int:
    """Number of trainable and frozen parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())
