"""ONNX graphs of quantized models: float export, and the three integer forms that ONNX Runtime computes fast.

dynamic   MatMul -> DynamicQuantizeMatMul, LSTM -> DynamicQuantizeLSTM: inputs to uint8 by each batch's range
static    QuantizeLinear, DequantizeLinear pairs (QDQ) around layers with calibrated inputs, fused when loaded
blocks    MatMul -> MatMulNBits: 4- or 8-bit weights, inputs rounded to int8 in blocks of a row
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

from kit.engines.layers import IntegerWeight, float_copy, integer_weights

CONTRIB = "com.microsoft"
BLOCKS = (32, 64, 128, 256, 16)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and quantizers print progress, log advice and warn of their own deprecations."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def export_graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> ModelProto:
    """The float ONNX graph of a model in evaluation mode, quantized weights multiplied out.

    The first dimension of every input is free, and the second one of sequences (integers (B, T), floats
    (B, T, D)), where the model allows it. Raises ValueError if the model cannot be exported.
    """
    model = float_copy(model)
    reasons = []
    for shapes in (_free_shapes(inputs, sequences=True), _free_shapes(inputs, sequences=False), None):
        example = tuple(_two_rows(x) for x in inputs) if shapes else inputs
        try:
            with quiet(), torch.no_grad():
                program = torch.onnx.export(model, example, dynamo=True, verbose=False, dynamic_shapes=shapes)
            return _fold(_strip(program.model_proto))
        except Exception as error:  # the exporter raises anything, of any type, over hundreds of lines
            reasons.append(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    raise ValueError(f"{type(model).__name__} cannot be exported to ONNX: {reasons[-1]}")


def _free_shapes(inputs, sequences: bool):
    free = torch.export.Dim.AUTO
    return tuple(
        {0: free, 1: free}
        if sequences and (x.ndim == 3 or (x.ndim == 2 and not x.is_floating_point()))
        else {0: free}
        for x in inputs
    )


def _two_rows(x: Tensor) -> Tensor:
    """Exporters take a dimension of length 1 for a constant."""
    return x if len(x) > 1 else torch.cat([x, x])


def _strip(graph: ModelProto) -> ModelProto:
    """Without the exporter's notes (stack traces, source lines), which are most of a small model's file."""
    del graph.graph.value_info[:], graph.graph.metadata_props[:], graph.metadata_props[:]
    for node in nodes_of(graph.graph.node):
        del node.metadata_props[:]
        node.doc_string = ""
    return graph


def nodes_of(nodes) -> Iterator[NodeProto]:
    """The nodes, and those inside their loops and branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g.node)


def _fold(graph: ModelProto) -> ModelProto:
    """Constants computed, so that an LSTM's weights, whose gates the exporter reorders, are weights again."""
    if not any(node.op_type in ("LSTM", "GRU") for node in graph.graph.node):
        return graph
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


class _Rewriter:
    """Replaces the nodes of a graph that multiply by a quantized weight."""

    def __init__(self, graph: ModelProto, model: nn.Module):
        self.graph = ModelProto()
        self.graph.CopyFrom(graph)
        self.weights = integer_weights(model)
        self.values = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.graph.initializer}
        self.replaced = 0

    def rewrite(self, replace: Callable) -> ModelProto:
        """replace(self, node, weight, transposed) -> the new nodes, or None to leave the node alone."""
        nodes = []
        for node in self.graph.graph.node:
            weight, transposed = self._weight_of(node)
            new = replace(self, node, weight, transposed) if weight is not None else None
            self.replaced += new is not None
            nodes += new or [node]
        del self.graph.graph.node[:]
        self.graph.graph.node.extend(nodes)
        self._finish()
        return self.graph

    def _weight_of(self, node: NodeProto) -> tuple[IntegerWeight | None, bool]:
        if node.op_type not in ("Gemm", "MatMul", "Conv") or node.input[1] not in self.values:
            return None, False
        value = self.values[node.input[1]]
        flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if value.dtype != np.float32 or (node.op_type != "Conv" and value.ndim != 2):
            return None, False
        if flags.get("transA") or flags.get("alpha", 1) != 1 or flags.get("beta", 1) != 1:
            return None, False
        rows_first = node.op_type == "Conv" or bool(flags.get("transB"))
        matrix = torch.from_numpy(np.array(value if rows_first else value.T)).flatten(1)
        found = (weight.as_found(matrix) for weight in self.weights if weight.codes.shape == matrix.shape)
        return next((weight for weight in found if weight is not None), None), not rows_first

    def constant(self, name: str, value) -> str:
        """Adds a constant and returns its name."""
        if name not in self.values:
            self.values[name] = np.ascontiguousarray(value)
            self.graph.graph.initializer.append(numpy_helper.from_array(self.values[name], name))
        return name

    def _finish(self) -> None:
        graph = self.graph.graph
        used = names_read(graph.node) | {output.name for output in graph.output}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        if CONTRIB not in {entry.domain for entry in self.graph.opset_import}:
            self.graph.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def names_read(nodes) -> set[str]:
    """Everything the nodes read, also inside loops and branches."""
    return {name for node in nodes_of(nodes) for name in node.input}


def _bias(node: NodeProto) -> str:
    return node.input[2] if len(node.input) > 2 else ""


def _dynamic(r: _Rewriter, node: NodeProto, weight: IntegerWeight, transposed: bool):
    if node.op_type == "Conv" or not weight.per_row:
        return None
    name = node.output[0]
    codes = r.constant(f"{name}.codes", weight.codes.t().numpy())
    scale = r.constant(f"{name}.scale", weight.scale[:, 0].numpy())
    inputs = [node.input[0], codes, scale, "", _bias(node)]
    return [helper.make_node("DynamicQuantizeMatMul", inputs, node.output, node.name, domain=CONTRIB)]


def _blocks(r: _Rewriter, node: NodeProto, weight: IntegerWeight, transposed: bool):
    rows, columns = weight.codes.shape
    size = weight.block if not weight.per_row else BLOCKS[0]
    if node.op_type == "Conv" or size not in BLOCKS:
        return None
    bits, name, count = (4 if weight.format.qmax <= 7 else 8), node.output[0], -(-columns // size)
    unsigned = F.pad(weight.codes, (0, count * size - columns)).to(torch.int16) + 2 ** (bits - 1)
    packed = unsigned.to(torch.uint8).reshape(rows, count, size)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    inputs = [
        node.input[0],
        r.constant(f"{name}.codes", packed.numpy()),
        r.constant(f"{name}.scale", weight.scale.expand(rows, count).reshape(-1).numpy()),
        "",
        "",
        _bias(node),
    ]
    return [
        helper.make_node(
            "MatMulNBits",
            inputs,
            node.output,
            node.name,
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=bits,
            block_size=size,
            accuracy_level=4,
        )
    ]


def _static(r: _Rewriter, node: NodeProto, weight: IntegerWeight, transposed: bool):
    if weight.input_grid is None or not weight.per_row:
        return None
    scale, zero = weight.input_grid
    shape = r.values[node.input[1]].shape
    codes = weight.codes.t() if transposed else weight.codes.reshape(shape)
    scales, out = weight.scale[:, 0].numpy(), node.output[0]
    grid = [r.constant(f"{out}.x.scale", np.float32(scale)), r.constant(f"{out}.x.zero", np.uint8(zero))]
    new = [
        helper.make_node("QuantizeLinear", [node.input[0], *grid], [f"{out}.x.codes"]),
        helper.make_node("DequantizeLinear", [f"{out}.x.codes", *grid], [f"{out}.x"]),
        _constant_codes(r, f"{out}.weight", codes.numpy(), scales, int(transposed)),
    ]
    bias = []
    if _bias(node):
        units = scales * np.float32(
            scale
        )  # those of the integer products, which the fused kernels add a bias to
        rounded = np.clip(np.round(r.values[_bias(node)] / units), -(2**31), 2**31 - 1).astype(np.int32)
        new.append(_constant_codes(r, f"{out}.bias", rounded, units, 0))
        bias = [f"{out}.bias"]
    copy = NodeProto()
    copy.CopyFrom(node)
    del copy.input[:]
    copy.input.extend([f"{out}.x", f"{out}.weight", *bias])
    return [*new, copy]


def _constant_codes(r: _Rewriter, name: str, codes: np.ndarray, scales: np.ndarray, axis: int) -> NodeProto:
    """Integer constants multiplied out, symmetric, with a scale per entry of `axis`."""
    inputs = [
        r.constant(f"{name}.codes", codes),
        r.constant(f"{name}.scale", scales),
        r.constant(f"{name}.zero", np.zeros(len(scales), codes.dtype)),
    ]
    return helper.make_node("DequantizeLinear", inputs, [name], axis=axis)


def dynamic_graph(graph: ModelProto, model: nn.Module) -> ModelProto:
    """Integer products with inputs rounded by each batch's range. Raises ValueError if no layer allows it."""
    rewriter = _Rewriter(graph, model)
    result = rewriter.rewrite(_dynamic)
    lstms = sum(node.op_type == "LSTM" for node in result.graph.node)
    if not rewriter.replaced + lstms:
        raise ValueError(f"{type(model).__name__} has no Linear or LSTM with INT8 codes a row")
    return _quantize_lstms(result) if lstms else result


def _quantize_lstms(graph: ModelProto) -> ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lstm.onnx"
        quantize_dynamic(
            graph, path, op_types_to_quantize=["LSTM"], per_channel=True, weight_type=QuantType.QInt8
        )
        return onnx.load(path)


def block_graph(graph: ModelProto, model: nn.Module) -> ModelProto:
    """4- and 8-bit blocks with inputs rounded in blocks. Raises ValueError if no layer allows it."""
    rewriter = _Rewriter(graph, model)
    result = rewriter.rewrite(_blocks)
    if not rewriter.replaced:
        raise ValueError(
            f"{type(model).__name__} has no Linear with integer codes in blocks of {sorted(BLOCKS)}"
        )
    return result


def static_graph(graph: ModelProto, model: nn.Module) -> ModelProto:
    """The QDQ form of layers with calibrated inputs. Raises ValueError if there is none."""
    rewriter = _Rewriter(graph, model)
    result = rewriter.rewrite(_static)
    if not rewriter.replaced:
        raise ValueError(
            f"{type(model).__name__} has no layer with a calibrated input: quantize it statically first"
        )
    return result
