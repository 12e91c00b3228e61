"""Batch norms absorbed by the layers before them, so that integer layers stand next to each other."""

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def batch_norm_pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(layer, batch norm) pairs where the norm alone reads the layer's output, both called once, found by
    tracing.

    Empty for models that torch.fx cannot trace.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # control flow on values, unusual arguments: then nothing is folded
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    modules = {node: model.get_submodule(node.target) for node in calls}
    pairs = []
    for node in calls:
        layer = modules.get(node.args[0]) if len(node.args) == 1 else None
        if not isinstance(modules[node], NORMS) or not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
            continue
        once = all(list(modules.values()).count(module) == 1 for module in (layer, modules[node]))
        room = layer.bias is not None or modules[node].affine
        if once and room and len(node.args[0].users) == 1 and modules[node].track_running_stats:
            pairs.append((layer, modules[node]))
    return pairs


@torch.no_grad()
def absorb_batch_norms(model: nn.Module) -> nn.Module:
    """Moves each batch norm's evaluation-mode scale, mean and variance into the layer before it, in place.

    Names and shapes stay: the norm is left with mean 0, variance 1 - eps, weight 1 and, where the layer
    has no bias, the bias; exporters then drop it. The outputs in evaluation mode stay the same to
    rounding. Returns the model.
    """
    for layer, norm in batch_norm_pairs(model):
        training = layer.training, norm.training
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        fused = fuse(layer.eval(), norm.eval())
        layer.weight.copy_(fused.weight)
        if layer.bias is not None:
            layer.bias.copy_(fused.bias)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        if norm.affine:
            norm.weight.fill_(1)
            norm.bias.copy_(torch.zeros_like(fused.bias) if layer.bias is not None else fused.bias)
        layer.train(training[0]), norm.train(training[1])
    return model
