"""Batch norms folded into the layers before them, since in evaluation they scale and shift rows."""

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from kit.core.weights import copy_model, is_plain

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def batch_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names (layer, batch norm) where the norm alone reads the layer's output and both are called
    once. Found by tracing; empty for models that torch.fx cannot trace."""
    if not any(isinstance(module, NORMS) for module in model.modules()):
        return []
    try:
        graph = fx.symbolic_trace(copy_model(model)).graph  # which modules may note what they see
    except Exception:  # control flow on values, unusual arguments: then nothing is folded
        return []
    if any(node.op == "placeholder" and node.args for node in graph.nodes):
        return []  # tracing takes an optional argument for given
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    modules, pairs = {node: model.get_submodule(node.target) for node in nodes}, []
    calls = list(modules.values())
    for node, norm in modules.items():
        source = node.args[0] if len(node.args) == 1 else None
        layer = modules.get(source)
        if _plain(layer, LAYERS) and _plain(norm, NORMS) and norm.track_running_stats:
            if calls.count(norm) == calls.count(layer) == len(source.users) == 1:
                pairs.append((source.target, node.target))
    return pairs


def _plain(module: nn.Module | None, kinds: tuple[type, ...]) -> bool:
    return module is not None and any(is_plain(module, kind) for kind in kinds)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Folds what it can, in place, in evaluation mode; norms become nn.Identity. Returns it."""
    for layer_name, norm_name in batch_norm_pairs(model.eval()):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        model.set_submodule(layer_name, fuse(layer, norm))
        model.set_submodule(norm_name, nn.Identity())
    return model
