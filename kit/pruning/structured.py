"""Structured pruning: channels, neurons and hidden units go, a smaller dense model stays."""

import fnmatch
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kit.core.protocols import Call, call_of, call_with, device_of, evaluating, tensors_of
from kit.core.weights import Weight, copy_model, materialize, weight_of
from kit.models import BKMixer, MoE, parameter_count, refresh_config
from kit.pruning.criteria import check_sparsity
from kit.pruning.least_squares import layer_examples, refit_experts, refit_linear
from kit.quantization.activations import ActivationQuantizer
from kit.training.losses import classification_loss, next_token_loss

IMPORTANCE = ("l1", "l2", "taylor")


def modules_of(model: nn.Module, kind: type | tuple, layers: str = "*") -> dict[str, nn.Module]:
    """Submodules of a class whose dotted name matches a shell pattern; ValueError if none does."""
    every = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    found = {name: module for name, module in every.items() if fnmatch.fnmatch(name, layers)}
    if not found:
        what, there = getattr(kind, "__name__", "convolution or linear"), ", ".join(every) or "none"
        raise ValueError(f"no {what} layer is named {layers!r}: {type(model).__name__} has {there}")
    return found


def unit_saliency(weight: Weight, importance: str) -> Tensor:
    """What each entry adds to its unit's score: |w|, w^2, or |w dL/dw| (Molchanov et al. 2019)."""
    value = weight.value.detach()
    if importance == "taylor":
        return (value * weight.original.grad).abs()
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
    with evaluating(model), torch.enable_grad():
        for batch in batches if importance == "taylor" else ():
            loss(model, call_of(batch).to(device_of(model))).backward()
    return batches


def prune_channels(
    model: nn.Module, example, sparsity: float, *, layers: str = "*", importance: str = "l2",
    batches: Iterable | None = None, loss: Callable = classification_loss,
) -> nn.Module:  # fmt: skip
    """A copy of a CNN or MLP that has lost a share `sparsity` of the outputs of each layer.

    What goes with an output (batch norm, inputs of the next layer, the other side of a sum) is
    found by Torch-Pruning's dependency graph (Fang et al. 2023); layers that make the output of the
    model keep theirs. The copy carries no steps: masks are zeros in it.

    Args:
        example: inputs to trace the model with, a tensor or what `call_with` takes.
        layers: shell pattern of the layers that lose outputs; those coupled to others stay whole.
    Raises ValueError: as `prune_hidden_units`, or for a model that the graph does not describe.
    """
    import torch_pruning as tp  # slow to import

    modules_of(model, (_ConvNd, nn.Linear), layers)
    small, call = materialize(model), call_with(example)
    _prepared(small, sparsity, importance, batches, loss)
    try:
        shapes = _output_shapes(small, call)
        with evaluating(small), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score, fixed = channel_importance(importance), _fixed_layers(small, call.args, layers)
            options = {"pruning_ratio": sparsity, "ignored_layers": fixed}
            tp.pruner.BasePruner(small, call.args, score, **options).step()
        if sparsity and parameter_count(small) == parameter_count(model):
            raise ValueError("it finds nothing that could go")
        if shapes != (pruned := _output_shapes(small, call)):
            raise ValueError(f"its output would change from {shapes} to {pruned}")
        refresh_config(small)
    except Exception as error:  # the graph raises anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        what = f"the dependency graph cannot prune this {type(model).__name__} ({reason})"
        advice = "name the layers it can, or use prune_hidden_units, prune_bk_channels or masks"
        raise ValueError(f"{what}: {advice}") from error
    small.zero_grad(set_to_none=True)
    return small


def channel_importance(importance: str):
    """Torch-Pruning's score of a group: a mean over layers of the sum of |w|, w^2 or |w dL/dw|."""
    import torch_pruning as tp

    if importance == "taylor":
        return tp.importance.GroupTaylorImportance(normalizer=None)
    p = 1 if importance == "l1" else 2
    return tp.importance.GroupMagnitudeImportance(p=p, normalizer=None)


def _fixed_layers(model: nn.Module, example: tuple, layers: str) -> list[nn.Module]:
    """Layers that must keep their outputs: not named, or coupled to the model's output. Raises
    ValueError when nothing is left to prune."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    named = set(modules_of(model, (_ConvNd, nn.Linear), layers).values())
    fixed = {m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))} - named
    for group in graph.get_all_groups(root_module_types=[tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR]):
        nodes = [dep.target for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        if not all(node.outputs for node in nodes):
            fixed |= {node.module for node in nodes}
    if named <= fixed:
        raise ValueError(f"none of the layers {layers!r} feeds another one that the graph sees")
    return list(fixed)


def _output_shapes(model: nn.Module, call: Call) -> list[tuple[int, ...]]:
    with evaluating(model):
        return [tuple(output.shape) for output in tensors_of(call(model))]
