"""Changing the shapes of a model's weights: compression comes off and goes back on, the config follows."""

import dataclasses
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kit.models import DigitsCNN, DigitsMLP, ResNetBK, TransformerLM, build_model
from kit.core.weights import find_step, named_weights, original_of, set_steps, steps_of
from kit.pruning.mask import Mask, select
from kit.quantization.fake import FakeQuantize, quantize_weights


@contextmanager
def resizing(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block every weight of `model` is a plain tensor, which may be replaced by a smaller one.

    Masked weights are exact zeros inside and masked again afterwards; fake quantizers come back with the
    formats they had, their ranges (and learned scales) found anew; the config describes the new shapes.
    """
    masked, formats = [], {}
    for name, module, attribute in list(named_weights(model)):
        mask, quantizer = (find_step(module, attribute, kind) for kind in (Mask, FakeQuantize))
        if mask is not None:
            masked.append(name)
            with torch.no_grad():
                original_of(module, attribute).mul_(mask.mask)
        if quantizer is not None:
            formats[name] = quantizer.format, quantizer.learned
        if steps_of(module, attribute):
            set_steps(model, module, attribute, [])
    try:
        yield model
    finally:
        for slot in select(model, masked).values() if masked else ():
            slot.set_mask(slot.parameter != 0)
        for name, (format, learned) in formats.items():
            quantize_weights(model, {name: format}, learned)
        refresh_config(model)


def replace(module: nn.Module, attribute: str, value: Tensor) -> None:
    """Put a new parameter with `value` in place of an old one."""
    old = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))


def refresh_config(model: nn.Module) -> None:
    """Make the config of one of the kit's own models describe the shapes it has now.

    Raises:
        ValueError: no config has these shapes, so that the model could not be rebuilt from its file.
    """
    if isinstance(model, ResNetBK):
        shapes = {"channels": [layer.mixer.energy.shape[0] for layer in model.layers],
                  "experts": [layer.moe.w_in.shape[0] for layer in model.layers],
                  "d_ff": [layer.moe.w_in.shape[1] for layer in model.layers]}
        shapes = {name: sizes[0] if len(set(sizes)) == 1 else tuple(sizes) for name, sizes in shapes.items()}
    elif isinstance(model, DigitsCNN):
        shapes = {"channels": tuple(m.out_channels for m in model if isinstance(m, nn.Conv2d))}
    elif isinstance(model, DigitsMLP):
        shapes = {"hidden": tuple(m.out_features for m in model if isinstance(m, nn.Linear))[:-1]}
    elif isinstance(model, TransformerLM):
        shapes = {"d_ff": model.layers[0].ff_in.out_features}
    else:
        return
    config = dataclasses.replace(model.config, **shapes)
    with torch.device("meta"):
        rebuilt = dict(build_model(type(model).__name__, dataclasses.asdict(config)).named_parameters())
    for name, module, attribute in named_weights(model):
        shape = tuple(original_of(module, attribute).shape)
        if shape != tuple(rebuilt[name].shape):
            raise ValueError(f"{name!r} has become {shape}, which no {type(config).__name__} describes")
    model.config = config


def modules_of(model: nn.Module, kind: type | tuple[type, ...], layers: str) -> dict[str, nn.Module]:
    """Submodules of a class whose dotted name matches a shell pattern.

    Raises:
        ValueError: nothing matches; the message names what would have.
    """
    every = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    found = {name: module for name, module in every.items() if fnmatch.fnmatch(name, layers)}
    if not found:
        known = ", ".join(every) or "none at all"
        what = getattr(kind, "__name__", "convolution or linear")
        raise ValueError(f"no {what} layer is named {layers!r}: {type(model).__name__} has {known}")
    return found
