"""Structured pruning: channels, neurons and hidden units go, a smaller dense model stays."""

import fnmatch
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kit.core.calibration import differentiable
from kit.core.protocols import call_of, call_with, device_of
from kit.core.settings import reason_of
from kit.core.weights import Weight, copy_model, weight_of
from kit.models import BKMixer, MoE, refresh_config
from kit.pruning.criteria import check_sparsity
from kit.pruning.least_squares import layer_examples, refit_experts, refit_linear
from kit.pruning.units import Family, Verifier, cut, describe, families, layers_of
from kit.quantization.activations import ActivationQuantizer
from kit.training.losses import classification_loss, next_token_loss

IMPORTANCE = ("l1", "l2", "taylor")


def modules_of(model: nn.Module, kind: type | None, layers: str = "*") -> dict[str, nn.Module]:
    """Submodules of a class, or all whose outputs are known as units (None), whose dotted name
    matches a shell pattern; ValueError if none does."""
    if kind is None:
        every = {layer.name: layer.module for layer in layers_of(model) if not layer.follows}
    else:
        every = {name: m for name, m in model.named_modules() if isinstance(m, kind)}
    found = {name: module for name, module in every.items() if fnmatch.fnmatch(name, layers)}
    if not found:
        what, there = getattr(kind, "__name__", "convolution or linear"), ", ".join(every) or "none"
        raise ValueError(f"no {what} layer is named {layers!r}: {type(model).__name__} has {there}")
    return found


def unit_saliency(weight: Weight, importance: str) -> Tensor:
    """What each entry adds to its unit's score: |w|, w^2, or |w dL/dw| (Molchanov et al. 2019)."""
    value = weight.value.detach()
    if importance == "taylor":
        grad = weight.original.grad  # None: nothing that the loss sees
        return torch.zeros_like(value) if grad is None else (value * grad).abs()
    return value.abs() if importance == "l1" else value.square()


def hidden_unit_scores(moe: MoE, importance: str = "l2") -> Tensor:
    """(E, F): saliency of each expert's hidden units, over rows of w_in and columns of w_out."""
    w_in, w_out = (unit_saliency(weight_of(moe, name), importance) for name in ("w_in", "w_out"))
    return w_in.sum(2) + w_out.sum(1)


def bk_channel_scores(mixer: BKMixer, importance: str = "l2") -> Tensor:
    """(C,): the saliency of each channel: what makes its v, hopping and gates, what reads its g."""
    made = (unit_saliency(weight_of(layer), importance) for layer in (mixer.input, mixer.gate))
    read = unit_saliency(weight_of(mixer.output), importance).sum(0)
    return (sum(part.sum(1) for part in made) + read).view(2, -1).sum(0)


def shrink_hidden(moe: MoE, keep: Tensor, *seen: Tensor) -> None:
    """Keeps hidden units `keep` (E, F') int64 of each expert, in place, and in that order.

    seen: inputs and outputs (M, D) of the layer, to which what is left is refitted.
    """
    d_model = moe.w_in.shape[2]
    rows, columns = keep[:, :, None].expand(-1, -1, d_model), keep[:, None].expand(-1, d_model, -1)
    for name, axis, units in (("w_in", 1, rows), ("b_in", 1, keep), ("w_out", 2, columns)):
        weight_of(moe, name).select(lambda t, axis=axis, units=units: t.gather(axis, units))
    if seen:
        refit_experts(moe, *seen)


def shrink_channels(mixer: BKMixer, keep: Tensor, *seen: Tensor) -> None:
    """Keeps channels `keep` (C',) int64 of a mixer, in place: v, hopping, gates, energy, eta, g.

    seen: inputs and outputs (M, ...) of its output layer, to which that is refitted.
    """
    channels = len(mixer.energy)
    both = torch.cat([keep, keep + channels])
    for layer in (mixer.input, mixer.gate):
        for name in ("weight", "bias"):
            weight_of(layer, name).select(lambda t: t[both])
    weight_of(mixer.output).select(lambda t: t[:, both])
    for name in ("energy", "raw_eta"):
        weight_of(mixer, name).select(lambda t: t[keep])
    mixer.input.out_features = mixer.gate.out_features = mixer.output.in_features = len(both)
    for quantizer in [*mixer.quantize_v.modules(), *mixer.quantize_g.modules()]:
        if isinstance(quantizer, ActivationQuantizer) and quantizer.channels == channels:
            quantizer.select(keep)
    if seen:
        refit_linear(mixer.output, seen[0][:, both], seen[1])


def sort_hidden_units(model: nn.Module) -> nn.Module:
    """Puts the hidden units of each expert in the order of their squared norm, largest first, in
    place; returns the model. It computes the same, but for groups of weights that shared a scale.

    Rows of like size then stand together, where adaptive codes take fewer bytes: none of the
    log2(F!) bits that an order of F units tells is needed.
    """
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        scores = hidden_unit_scores(moe)
        shrink_hidden(moe, scores.argsort(dim=1, descending=True, stable=True))
    return model


def prune_hidden_units(
    model: nn.Module, sparsity: float, *, layers: str = "*", importance: str = "l2",
    batches: Iterable | None = None, loss: Callable = next_token_loss,
) -> nn.Module:  # fmt: skip
    """A copy of the model whose experts have each lost a share `sparsity` of their hidden units.

    Args:
        layers: shell pattern of the names of mixture-of-experts layers.
        importance: "l1", "l2", or "taylor": gradients of loss(model, batch), summed over `batches`.
        batches: with them, what reads the units that stay (`w_out`) is refitted by least squares to
            the outputs that the layer had, one pass a layer.
    Raises ValueError: sparsity outside [0, 1), unknown importance, no such layer, taylor without
        batches, or a step that cannot be resized.
    """
    return _prune_units(model, MoE, sparsity, layers, importance, batches, loss)


def prune_bk_channels(
    model: nn.Module, sparsity: float, *, layers: str = "*", importance: str = "l2",
    batches: Iterable | None = None, loss: Callable = next_token_loss,
) -> nn.Module:  # fmt: skip
    """A copy of the model whose BK mixers have lost a share `sparsity` of their channels.

    A channel's potential, hopping, gates, energy, eta, and the columns that read its g go together.
    Else as `prune_hidden_units`; `layers` names mixers, and `batches` refit their output layers.
    """
    return _prune_units(model, BKMixer, sparsity, layers, importance, batches, loss)


def _prune_units(model, kind, sparsity, layers, importance, batches, loss) -> nn.Module:
    small, scores = copy_model(model), hidden_unit_scores if kind is MoE else bk_channel_scores
    found = modules_of(small, kind, layers)
    batches = _prepared(small, sparsity, importance, batches, loss)
    ranked = {name: scores(module, importance) for name, module in found.items()}
    small.zero_grad(set_to_none=True)
    for name, module in found.items():
        count, reader = ranked[name].shape[-1], name if kind is MoE else f"{name}.output"
        drop = min(round(sparsity * count), count - 1)  # at least one stays
        keep = ranked[name].argsort(dim=-1, stable=True)[..., drop:].sort(-1).values
        refit = drop and batches is not None
        seen = layer_examples(small, [reader], batches)[reader] if refit else ()
        if kind is MoE:
            shrink_hidden(module, keep, *seen)
        else:
            shrink_channels(module, keep, *seen)
    refresh_config(small)
    return small


def _prepared(model, sparsity, importance, batches, loss) -> list | None:
    """The batches as a list; for "taylor", `.grad` has the sum of their gradients, in evaluation
    mode."""
    check_sparsity(sparsity)
    if importance not in IMPORTANCE:
        raise ValueError(f"unknown importance {importance!r}; choose from {', '.join(IMPORTANCE)}")
    if importance == "taylor" and batches is None:
        raise ValueError("taylor importance needs gradients: pass batches=, some training batches")
    batches = None if batches is None else list(batches)
    model.zero_grad(set_to_none=True)
    with differentiable(model):
        for batch in batches if importance == "taylor" else ():
            loss(model, call_of(batch).to(device_of(model))).backward()
    return batches


def prune_channels(
    model: nn.Module, example, sparsity: float, *, layers: str = "*", importance: str = "l2",
    batches: Iterable | None = None, loss: Callable = classification_loss,
) -> nn.Module:  # fmt: skip
    """A copy of any model that has lost a share `sparsity` of the outputs of its layers.

    What goes with an output (batch norm, inputs of the next layer, the other side of a sum, a gate,
    the rest of an attention head) is found by `kit.pruning.units`; a score is the sum over all of
    it. Every cut is verified: the copy computes what the model does when it reads zeros in place of
    what went. Layers that make the output of the model, and those that cannot be verified, stay as
    they are: `uncut` of the copy names them. Steps are resized; a config of transformers follows
    where it can describe the shapes.

    Args:
        example: inputs to run the model with, a tensor or what `call_with` takes.
        layers: shell pattern of the layers that lose outputs; those coupled to others stay whole.
    Raises ValueError: as `prune_hidden_units`, or if nothing could go.
    """
    call, names = call_with(example).to(device_of(model)), modules_of(model, None, layers)
    small = copy_model(model)
    _prepared(small, sparsity, importance, batches, loss)
    try:
        found = families(small, call, names)
    except Exception as error:  # a model may raise anything
        what = f"cannot prune this {type(model).__name__}, which fails ({reason_of(error)})"
        raise ValueError(f"{what}: give an example that it can be called with") from error
    for family in found:
        scores = group_scores(small, family, importance)
        family.gone = scores.argsort(stable=True)[: round(sparsity * len(scores))].tolist()
        family.gone = family.gone[: len(scores) - 1]
    small.zero_grad(set_to_none=True)
    verifier = Verifier(small, call)
    found = verifier.verified([family for family in found if family.gone])
    if sparsity and not found:
        what = f"cannot prune this {type(model).__name__}: of the layers {layers!r} nothing can go"
        raise ValueError(f"{what} that other layers do not need, or may in other calls: use masks")
    cut(small, found, verifier.spared(found))
    refresh_config(small)
    describe(small, model, found)
    pruned = {name for family in found for name in family.names}
    small.uncut = [name for name in names if name not in pruned]
    return small


def group_scores(model: nn.Module, family: Family, importance: str) -> Tensor:
    """(n,): the saliency of each group, over the weights of all that goes with it."""
    scores = torch.zeros(len(family.members), dtype=torch.float64)
    for name, axis in family.members[0]:
        module = model.get_submodule(name)
        if getattr(module, "weight", None) is not None:
            saliency = unit_saliency(weight_of(module), importance).double().cpu()
            along = saliency.movedim(axis, 0).reshape(saliency.shape[axis], -1).sum(1)
            scores += torch.stack([along[group[name, axis]].sum() for group in family.members])
    return scores
