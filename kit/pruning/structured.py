"""Structured pruning: channels, neurons and hidden units go, a smaller dense model stays."""

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kit.core.protocols import call_of, call_with, device_of, evaluating, tensors_of
from kit.core.weights import Weight, copy_model, materialize, weight_of
from kit.models import BKMixer, MoE, parameter_count, refresh_config
from kit.pruning.criteria import check_sparsity
from kit.pruning.least_squares import layer_examples, refit_experts, refit_linear
from kit.quantization.activations import ActivationQuantizer
from kit.training.losses import classification_loss, next_token_loss

READER = {MoE: "", BKMixer: ".output"}  # whose weights read the units of a group
IMPORTANCE = ("l1", "l2", "taylor")
Loss = Callable[[nn.Module, object], Tensor]


def modules_of(model: nn.Module, kind: type | tuple[type, ...], layers: str = "*") -> dict[str, nn.Module]:
    """Submodules of a class whose dotted name matches a shell pattern.

    Raises ValueError when nothing matches; the message names what would have.
    """
    every = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    found = {name: module for name, module in every.items() if fnmatch.fnmatch(name, layers)}
    if not found:
        what = getattr(kind, "__name__", "convolution or linear")
        known = ", ".join(every) or "none at all"
        raise ValueError(f"no {what} layer is named {layers!r}: {type(model).__name__} has {known}")
    return found


def unit_saliency(weight: Weight, importance: str) -> Tensor:
    """What each entry adds to its unit's score: |w|, w^2, or |w dL/dw| (Molchanov et al. 2019)."""
    value = weight.value.detach()
    if importance == "taylor":
        return (value * weight.original.grad).abs()
    return value.abs() if importance == "l1" else value.square()


def kept_units(scores: Tensor, sparsity: float) -> Tensor:
    """Positions, ascending, of the units that stay when the round(sparsity * n) lowest of n go.

    Along the last axis; at least one unit stays.
    """
    drop = min(round(sparsity * scores.shape[-1]), scores.shape[-1] - 1)
    return scores.argsort(dim=-1, stable=True)[..., drop:].sort(-1).values


def hidden_unit_scores(moe: MoE, importance: str = "l2") -> Tensor:
    """(E, F): the saliency of each expert's hidden units, over their rows of w_in and columns of w_out."""
    w_in, w_out = (unit_saliency(weight_of(moe, name), importance) for name in ("w_in", "w_out"))
    return w_in.sum(2) + w_out.sum(1)


def bk_channel_scores(mixer: BKMixer, importance: str = "l2") -> Tensor:
    """(C,): the saliency of each channel, over what makes its v, hopping and gates and what reads its g."""
    makers = (unit_saliency(weight_of(layer), importance).sum(1) for layer in (mixer.input, mixer.gate))
    readers = unit_saliency(weight_of(mixer.output), importance).sum(0)
    return (sum(makers) + readers).view(2, -1).sum(0)


def shrink_hidden(moe: MoE, keep: Tensor) -> None:
    """Keeps hidden units `keep` (E, F') int64 of each expert, in place; steps are resized with them."""
    d_model = moe.w_in.shape[2]
    rows, columns = keep[:, :, None].expand(-1, -1, d_model), keep[:, None].expand(-1, d_model, -1)
    weight_of(moe, "w_in").select(lambda t: t.gather(1, rows))
    weight_of(moe, "b_in").select(lambda t: t.gather(1, keep))
    weight_of(moe, "w_out").select(lambda t: t.gather(2, columns))


def shrink_channels(mixer: BKMixer, keep: Tensor) -> None:
    """Keeps channels `keep` (C',) int64 of a mixer, in place: v, hopping, gates, energy, eta, outputs."""
    channels = len(mixer.energy)
    both = torch.cat([keep, keep + channels])
    for layer in (mixer.input, mixer.gate):
        weight_of(layer).select(lambda t: t[both])
        weight_of(layer, "bias").select(lambda t: t[both])
    weight_of(mixer.output).select(lambda t: t[:, both])
    for name in ("energy", "raw_eta"):
        weight_of(mixer, name).select(lambda t: t[keep])
    mixer.input.out_features = mixer.gate.out_features = mixer.output.in_features = 2 * len(keep)
    for quantizer in [*mixer.quantize_v.modules(), *mixer.quantize_g.modules()]:
        if isinstance(quantizer, ActivationQuantizer) and quantizer.channels == channels:
            quantizer.select(keep)


def sort_hidden_units(model: nn.Module) -> nn.Module:
    """Puts the hidden units of each expert in the order of their squared norm, largest first, in place,
    and returns the model.

    What it computes stays the same, but for groups of weights that shared a scale. Rows of like size
    then share steps and stand together, where adaptive codes take fewer bytes: of the log2(F!) bits
    that an order of F units tells, none is needed.
    """
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        shrink_hidden(moe, hidden_unit_scores(moe).argsort(dim=1, descending=True, stable=True))
    return model


def prune_hidden_units(
    model: nn.Module, sparsity: float, *, layers: str = "*", importance: str = "l2",
    batches: Sequence | None = None, loss: Loss = next_token_loss,
) -> nn.Module:  # fmt: skip
    """A copy of the model whose experts have each lost a share `sparsity` of their hidden units.

    Args:
        layers: shell pattern of the names of mixture-of-experts layers.
        importance: "l1", "l2", or "taylor", which sums gradients of loss(model, batch) over `batches`.
        batches: training batches, a list. With them, what reads the units that stay (`w_out`) is refitted
            by least squares to the outputs that the layer had, one pass a layer.
    Raises ValueError: sparsity outside [0, 1), unknown importance, no such layer, taylor without batches.
    """
    return _prune_groups(model, MoE, sparsity, layers, importance, batches, loss)


def prune_bk_channels(
    model: nn.Module, sparsity: float, *, layers: str = "*", importance: str = "l2",
    batches: Sequence | None = None, loss: Loss = next_token_loss,
) -> nn.Module:  # fmt: skip
    """A copy of the model whose BK mixers have lost a share `sparsity` of their channels.

    A channel is a group of its own: its potential v, hopping, gates, energy, eta, and the columns that
    read its g go together. Arguments and errors as for `prune_hidden_units`, with `layers` naming mixers,
    whose output layer is what `batches` refit.
    """
    return _prune_groups(model, BKMixer, sparsity, layers, importance, batches, loss)


GROUPS = {MoE: (hidden_unit_scores, shrink_hidden), BKMixer: (bk_channel_scores, shrink_channels)}


def _prune_groups(model, kind, sparsity, layers, importance, batches, loss) -> nn.Module:
    _check(sparsity, importance, batches)
    small = copy_model(model)
    scores, shrink = GROUPS[kind]
    if importance == "taylor":
        accumulate_gradients(small, batches, loss)
    ranked = {name: scores(layer, importance) for name, layer in modules_of(small, kind, layers).items()}
    small.zero_grad(set_to_none=True)
    for name, score in ranked.items():
        module, keep = small.get_submodule(name), kept_units(score, sparsity)
        examples = layer_examples(small, [name + READER[kind]], batches) if batches is not None else {}
        shrink(module, keep)
        for inputs, outputs in examples.values():
            if kind is MoE:
                refit_experts(module, inputs, outputs)
            else:
                refit_linear(module.output, inputs.unflatten(1, (2, -1))[:, :, keep].flatten(1), outputs)
    refresh_config(small)
    return small


def _check(sparsity: float, importance: str, batches: Iterable | None) -> None:
    check_sparsity(sparsity)
    if importance not in IMPORTANCE:
        raise ValueError(f"unknown importance {importance!r}; choose from {', '.join(IMPORTANCE)}")
    if importance == "taylor" and batches is None:
        raise ValueError("taylor importance needs gradients: pass batches=, a list of training batches")


def accumulate_gradients(model: nn.Module, batches: Iterable, loss: Loss) -> None:
    """Sums the gradients of loss(model, batch) over the batches into `.grad`, in evaluation mode."""
    device = device_of(model)
    model.zero_grad(set_to_none=True)
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            loss(model, call_of(batch).to(device)).backward()


def prune_channels(
    model: nn.Module, example, sparsity: float, *, layers: str = "*", importance: str = "l2",
    batches: Iterable | None = None, loss: Loss = classification_loss,
) -> nn.Module:  # fmt: skip
    """A copy of a CNN or MLP that has lost a share `sparsity` of the outputs of each layer.

    What has to go with an output (batch norm, inputs of the next layer, the other side of a residual
    sum) is found by Torch-Pruning's dependency graph (Fang et al. 2023); the layers that make the model's
    output keep theirs. Masks stay masks only as zeros: the copy carries no steps.

    Args:
        example: inputs to trace the model with, a tensor or what `call_with` takes.
        layers: shell pattern of the layers that lose outputs; those coupled to one that is not named stay
            whole.
    Raises ValueError: as `prune_hidden_units`; or the graph cannot be traced, or does not describe the
        model.
    """
    import torch_pruning as tp  # slow to import

    _check(sparsity, importance, batches)
    modules_of(model, (_ConvNd, nn.Linear), layers)
    small, call = materialize(model), call_with(example)
    if importance == "taylor":
        accumulate_gradients(small, batches, loss)
    try:
        shape = _output_shapes(small, call)
        with evaluating(small), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fixed, scores = _fixed_layers(small, call.args, layers), channel_importance(importance)
            tp.pruner.BasePruner(small, call.args, scores, pruning_ratio=sparsity, ignored_layers=fixed).step()
        pruned = _output_shapes(small, call)
        if sparsity and parameter_count(small) == parameter_count(model):
            raise ValueError("it finds nothing that could go")
        if pruned != shape:
            raise ValueError(f"its output would change from {shape} to {pruned}")
        refresh_config(small)
    except Exception as error:  # the graph raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the dependency graph cannot prune this {type(model).__name__} ({reason}): name the layers "
            "it can prune, or use prune_hidden_units, prune_bk_channels or masks"
        ) from error
    small.zero_grad(set_to_none=True)
    return small


def channel_importance(importance: str):
    """Torch-Pruning's own score of a group: the mean over its layers of the sum of |w|, w^2 or |w dL/dw|."""
    import torch_pruning as tp

    if importance == "taylor":
        return tp.importance.GroupTaylorImportance(normalizer=None)
    return tp.importance.GroupMagnitudeImportance(p=1 if importance == "l1" else 2, normalizer=None)


def _fixed_layers(model: nn.Module, example: tuple, layers: str) -> list[nn.Module]:
    """Layers that must keep their outputs: not named, or coupled to the model's output.

    Raises ValueError when nothing is left to prune.
    """
    import torch_pruning as tp

    graph, kinds = tp.DependencyGraph().build_dependency(model, example_inputs=example), (_ConvNd, nn.Linear)
    named = set(modules_of(model, kinds, layers).values())
    fixed = [module for module in model.modules() if isinstance(module, kinds) and module not in named]
    for group in graph.get_all_groups(root_module_types=[tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR]):
        outputs = [dep.target for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        if any(not node.outputs for node in outputs):
            fixed += [node.module for node in outputs if isinstance(node.module, kinds)]
    if named <= set(fixed):
        raise ValueError(f"none of the layers named {layers!r} feeds another layer that the graph can see")
    return fixed


def _output_shapes(model: nn.Module, call) -> list[tuple[int, ...]]:
    with evaluating(model):
        return [tuple(output.shape) for output in tensors_of(call(model))]
