"""Integer storage for what an ONNX graph computes in floats: the file shrinks with every quantized weight."""

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from kit.engines.graph import names_read
from kit.engines.layers import IntegerWeight, integer_weights

SMALLEST = 1024  # values of a tensor; below, the nodes would cost more bytes than they save


def store_codes(graph: ModelProto, model: nn.Module) -> ModelProto:
    """Replaces float weights that are quantized in `model`, a scale a row, by codes multiplied out when used.

    Embeddings are looked up in codes; other weights pass through DequantizeLinear, which costs time at every call.
    The outputs stay the same. The graph is changed and returned.
    """
    weights = [weight for weight in integer_weights(model) if weight.per_row]
    kept, first = [], []
    for tensor in graph.graph.initializer:
        value = numpy_helper.to_array(tensor)
        large = value.dtype == np.float32 and value.ndim >= 2 and value.size >= SMALLEST
        weight, transposed = _find(value, weights) if large else (None, False)
        if weight is None:
            kept.append(tensor)
            continue
        kept += _constants(tensor.name, weight, transposed)
        if _only_looked_up(graph, tensor.name) and not transposed:
            kept.append(numpy_helper.from_array(np.array([-1], np.int64), f"{tensor.name}.last"))
            _look_up(graph, tensor.name)
        else:
            first += _multiplied_out(tensor.name, value.shape, weight, transposed, kept)
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    nodes = [*first, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return graph


def _find(value: np.ndarray, weights: list[IntegerWeight]) -> tuple[IntegerWeight | None, bool]:
    for weight in weights:
        rows, columns = weight.codes.shape
        if value.size != rows * columns:
            continue
        found = weight.as_found(torch.from_numpy(np.array(value)).reshape(rows, columns))
        if found is not None:
            return found, False
        if value.shape == (columns, rows):
            found = weight.as_found(torch.from_numpy(np.ascontiguousarray(value.T)))
            if found is not None:
                return found, True
    return None, False


def _constants(name: str, weight: IntegerWeight, transposed: bool) -> list[TensorProto]:
    codes = weight.codes.t() if transposed else weight.codes
    return [numpy_helper.from_array(np.ascontiguousarray(codes.numpy()), f"{name}.stored"),
            numpy_helper.from_array(weight.scale[:, 0].contiguous().numpy(), f"{name}.stored.scale")]


def _only_looked_up(graph: ModelProto, name: str) -> bool:
    users = [node for node in graph.graph.node if name in names_read([node])]
    return bool(users) and all(user.op_type == "Gather" and user.input[0] == name for user in users)


def _multiplied_out(name: str, shape: tuple, weight: IntegerWeight, transposed: bool, constants: list) -> list:
    inputs, same = [f"{name}.stored", f"{name}.stored.scale"], transposed or tuple(weight.codes.shape) == shape
    output = name if same else f"{name}.flat"
    nodes = [helper.make_node("DequantizeLinear", inputs, [output], axis=int(transposed))]
    if not same:
        constants.append(numpy_helper.from_array(np.array(shape, np.int64), f"{name}.shape"))
        nodes.append(helper.make_node("Reshape", [output, f"{name}.shape"], [name]))
    return nodes


def _look_up(graph: ModelProto, name: str) -> None:
    """Gather(weight, i) -> Cast(Gather(codes, i)) * Gather(scale, i), in place."""
    nodes = []
    for node in graph.graph.node:
        if node.op_type != "Gather" or node.input[0] != name:
            nodes.append(node)
            continue
        index, out = node.input[1], node.output[0]
        nodes += [helper.make_node("Gather", [f"{name}.stored", index], [f"{out}.codes"]),
                  helper.make_node("Cast", [f"{out}.codes"], [f"{out}.float"], to=TensorProto.FLOAT),
                  helper.make_node("Gather", [f"{name}.stored.scale", index], [f"{out}.scale"]),
                  helper.make_node("Unsqueeze", [f"{out}.scale", f"{name}.last"], [f"{out}.column"]),
                  helper.make_node("Mul", [f"{out}.float", f"{out}.column"], [out])]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
