"""Structured pruning: channels, neurons and hidden units go, a smaller dense model stays."""

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn

from kit.training.losses import classification_loss, next_token_loss
from kit.models import BKMixer, MoE, parameter_count
from kit.core.weights import bake
from kit.core.calibration import evaluating
from kit.pruning.mask import copy_model
from kit.pruning.least_squares import layer_examples, refit_experts, refit_linear
from kit.pruning.criteria import check_sparsity
from kit.pruning.shapes import modules_of, refresh_config, replace, resizing
from kit.quantization.activations import ActivationQuantizer

READER = {MoE: "", BKMixer: ".output"}      # whose weights read the units of a group
IMPORTANCE = ("l1", "l2", "taylor")
Loss = Callable[[nn.Module, object], Tensor]


def unit_saliency(weight: Tensor, importance: str) -> Tensor:
    """What each weight adds to its unit's score: |w|, w^2, or |w dL/dw| (Molchanov et al. 2019)."""
    if importance == "taylor":
        return (weight * weight.grad).detach().abs()
    return weight.detach().abs() if importance == "l1" else weight.detach().square()


def kept_units(scores: Tensor, sparsity: float) -> Tensor:
    """Positions, ascending, of the units that stay when the round(sparsity * n) lowest of n go.

    Along the last axis; at least one unit stays.
    """
    drop = min(round(sparsity * scores.shape[-1]), scores.shape[-1] - 1)
    return scores.argsort(dim=-1, stable=True)[..., drop:].sort(-1).values


def hidden_unit_scores(moe: MoE, importance: str = "l2") -> Tensor:
    """(E, F): the saliency of each expert's hidden units, over their rows of w_in and columns of w_out."""
    return unit_saliency(moe.w_in, importance).sum(2) + unit_saliency(moe.w_out, importance).sum(1)


def bk_channel_scores(mixer: BKMixer, importance: str = "l2") -> Tensor:
    """(C,): the saliency of each channel, over what makes its v, hopping and gates and what reads its g."""
    rows = sum(unit_saliency(layer.weight, importance).sum(1) for layer in (mixer.input, mixer.gate))
    columns = unit_saliency(mixer.output.weight, importance).sum(0)
    return (rows + columns).view(2, -1).sum(0)


def shrink_hidden(moe: MoE, keep: Tensor) -> None:
    """Keep hidden units `keep` (E, F') int64 of each expert, in place."""
    d_model = moe.w_in.shape[2]
    replace(moe, "w_in", moe.w_in.gather(1, keep[:, :, None].expand(-1, -1, d_model)))
    replace(moe, "b_in", moe.b_in.gather(1, keep))
    replace(moe, "w_out", moe.w_out.gather(2, keep[:, None].expand(-1, d_model, -1)))


def sort_hidden_units(model: nn.Module) -> nn.Module:
    """Puts the hidden units of each expert in the order of their squared norm, largest first, in place, and returns the model.

    What it computes stays the same. Rows of like size then share steps and stand together, where adaptive codes take fewer
    bytes: of the log2(F!) bits that an order of F units tells, none is needed. Masks and formats stay; call it before
    `compose_tables` and `order_rows`, whose parametrizations would be computed and dropped.
    """
    with resizing(model):
        for moe in (module for module in model.modules() if isinstance(module, MoE)):
            shrink_hidden(moe, hidden_unit_scores(moe).argsort(dim=1, descending=True, stable=True))
    return model


def shrink_channels(mixer: BKMixer, keep: Tensor) -> None:
    """Keep channels `keep` (C',) int64 of a mixer, in place: v, hopping, gates, energy, eta, outputs."""
    channels = len(mixer.energy)
    both = torch.cat([keep, keep + channels])
    replace(mixer.input, "weight", mixer.input.weight[both])
    replace(mixer.input, "bias", mixer.input.bias[both])
    replace(mixer.gate, "weight", mixer.gate.weight[both])
    replace(mixer.gate, "bias", mixer.gate.bias[both])
    replace(mixer.output, "weight", mixer.output.weight[:, both])
    replace(mixer, "energy", mixer.energy[keep])
    replace(mixer, "raw_eta", mixer.raw_eta[keep])
    mixer.input.out_features = mixer.gate.out_features = mixer.output.in_features = 2 * len(keep)
    for quantizer in [*mixer.quantize_v.modules(), *mixer.quantize_g.modules()]:
        if isinstance(quantizer, ActivationQuantizer) and quantizer.channels == channels:
            quantizer.channels = len(keep)
            quantizer.low, quantizer.high = quantizer.low[keep], quantizer.high[keep]


def prune_hidden_units(model: nn.Module, sparsity: float, *, layers: str = "*", importance: str = "l2",
                       batches: Sequence | None = None, loss: Loss = next_token_loss) -> nn.Module:
    """A copy of the model whose experts have each lost a share `sparsity` of their hidden units.

    Args:
        layers: shell pattern of the names of mixture-of-experts layers.
        importance: "l1", "l2", or "taylor", which sums gradients of loss(model, batch) over `batches`.
        batches: training batches, a list. With them, what reads the units that stay (`w_out`) is refitted by
            least squares to the outputs that the layer had (`kit.pruning.least_squares`), one pass a layer.

    Raises:
        ValueError: sparsity outside [0, 1), unknown importance, no such layer, taylor without batches.
    """
    return _prune_groups(model, MoE, hidden_unit_scores, shrink_hidden, sparsity, layers, importance, batches,
                         loss)


def prune_bk_channels(model: nn.Module, sparsity: float, *, layers: str = "*", importance: str = "l2",
                      batches: Sequence | None = None, loss: Loss = next_token_loss) -> nn.Module:
    """A copy of the model whose BK mixers have lost a share `sparsity` of their channels.

    A channel is a group of its own: its potential v, hopping, gates, energy, eta, and the columns that read
    its g go together. Arguments and errors as for `prune_hidden_units`, with `layers` naming mixers, whose
    output layer is what `batches` refit.
    """
    return _prune_groups(model, BKMixer, bk_channel_scores, shrink_channels, sparsity, layers, importance,
                         batches, loss)


def _prune_groups(model, kind, scores, shrink, sparsity, layers, importance, batches, loss) -> nn.Module:
    _check(sparsity, importance, batches)
    modules_of(model, kind, layers)
    small = copy_model(model)
    with resizing(small):
        if importance == "taylor":
            accumulate_gradients(small, batches, loss)
        for name, module in modules_of(small, kind, layers).items():
            keep = kept_units(scores(module, importance), sparsity)
            examples = layer_examples(small, [name + READER[kind]], batches) if batches is not None else {}
            shrink(module, keep)
            for inputs, outputs in examples.values():
                if kind is MoE:
                    refit_experts(module, inputs, outputs)
                else:
                    refit_linear(module.output, inputs.unflatten(1, (2, -1))[:, :, keep].flatten(1), outputs)
        small.zero_grad(set_to_none=True)
    return small


def _check(sparsity: float, importance: str, batches: Iterable | None) -> None:
    check_sparsity(sparsity)
    if importance not in IMPORTANCE:
        raise ValueError(f"unknown importance {importance!r}; choose from {', '.join(IMPORTANCE)}")
    if importance == "taylor" and batches is None:
        raise ValueError("taylor importance needs gradients: pass batches=, a list of training batches")


def accumulate_gradients(model: nn.Module, batches: Iterable, loss: Loss) -> None:
    """Sum the gradients of loss(model, batch) over the batches into `.grad`, in evaluation mode."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            loss(model, tuple(part.to(device) for part in batch)).backward()


def prune_channels(model: nn.Module, example: Tensor, sparsity: float, *, layers: str = "*",
                   importance: str = "l2", batches: Iterable | None = None,
                   loss: Loss = classification_loss) -> nn.Module:
    """A copy of a CNN or MLP that has lost a share `sparsity` of the outputs of each layer.

    What has to go with an output (batch norm, inputs of the next layer, the other side of a residual sum) is
    found by Torch-Pruning's dependency graph (Fang et al. 2023); the layers that make the model's output keep
    theirs. Masks stay masks only as zeros: the copy has no parametrizations.

    Args:
        example: an input to trace the model with.
        layers: shell pattern of the layers that lose outputs; those coupled to one that is not named stay
        whole.

    Raises:
        ValueError: as `prune_hidden_units`; or the graph cannot be traced, or does not describe the model.
    """
    _check(sparsity, importance, batches)
    modules_of(model, (nn.modules.conv._ConvNd, nn.Linear), layers)
    small = bake(copy_model(model))
    if importance == "taylor":
        accumulate_gradients(small, batches, loss)
    try:
        shape = _output_shape(small, example)
        with evaluating(small), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fixed = _fixed_layers(small, example, layers)
            tp.pruner.BasePruner(small, example, channel_importance(importance), pruning_ratio=sparsity,
                                 ignored_layers=fixed).step()
        pruned = _output_shape(small, example)
        if sparsity and parameter_count(small) == parameter_count(model):
            raise ValueError("it finds nothing that could go")
        if pruned != shape:
            raise ValueError(f"its output would change from {shape} to {pruned}")
        refresh_config(small)
    except Exception as error:
        raise ValueError(_untraceable(model, error)) from error
    small.zero_grad(set_to_none=True)
    return small


def channel_importance(importance: str) -> tp.importance.Importance:
    """Torch-Pruning's own score of a group: the mean over its layers of the sum of |w|, w^2 or |w dL/dw|."""
    if importance == "taylor":
        return tp.importance.GroupTaylorImportance(normalizer=None)
    return tp.importance.GroupMagnitudeImportance(p=1 if importance == "l1" else 2, normalizer=None)


def _fixed_layers(model: nn.Module, example: Tensor, layers: str) -> list[nn.Module]:
    """Layers that must keep their outputs: not named, or coupled to the model's output.

    Raises:
        ValueError: then nothing is left to prune.
    """
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    named = set(modules_of(model, kinds, layers).values())
    fixed = [module for module in model.modules() if isinstance(module, kinds) and module not in named]
    for group in graph.get_all_groups(root_module_types=[tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR]):
        outputs = [dep.target for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        if any(not node.outputs for node in outputs):
            fixed += [node.module for node in outputs if isinstance(node.module, kinds)]
    if named <= set(fixed):
        raise ValueError(f"none of the layers named {layers!r} feeds another layer that the graph can see")
    return fixed


def _output_shape(model: nn.Module, example: Tensor) -> tuple[int, ...]:
    with evaluating(model):
        return tuple(model(example).shape)


def _untraceable(model: nn.Module, reason: object) -> str:
    first = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    return (f"the dependency graph cannot prune this {type(model).__name__} ({first}): name the layers "
            "it can prune, or use prune_hidden_units, prune_bk_channels or masks")
