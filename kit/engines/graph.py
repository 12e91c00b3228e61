"""ONNX graphs of quantized models: in floats, and three integer forms that ONNX Runtime runs fast.

onnx-int8     DynamicQuantizeMatMul and DynamicQuantizeLSTM: inputs to uint8 in each batch's range
onnx-static   QuantizeLinear, DequantizeLinear pairs (QDQ) around layers with calibrated inputs,
              which are fused when loaded
onnx-blocks   MatMulNBits: 4- or 8-bit weights, inputs rounded to int8 in blocks of a row
"""

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kit.core.measurement import measure
from kit.core.protocols import Call, call_with, tensors_of
from kit.engines.choice import build_engine, flat, relative_error
from kit.engines.layers import IntegerWeight, cast, float_copy, integer_weights
from kit.engines.runtime import OnnxEngine

CONTRIB = "com.microsoft"
BLOCKS = (32, 64, 128, 256, 16)
SMALLEST = 1024  # values; below, the nodes that read codes take more bytes than they save
ROUNDING = 1e-6  # relative error of float32 products in another order


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


class Exported:
    """The float graph of a model, from which its ONNX engines are made.

    Raises ValueError if the call is more than tensors by position, or the model cannot be exported.
    """

    def __init__(self, model: nn.Module, call: Call):
        if call.kwargs or not all(isinstance(x, Tensor) for x in call.args):
            raise ValueError("ONNX engines take tensors by position, and nothing else")
        self.name, self.weights = type(model).__name__, integer_weights(model)
        with torch.no_grad():
            self.template = call(float_copy(model))
        self.proto = export_graph(model, call.args)

    def engine(self, name: str) -> OnnxEngine:
        """One of the engines `onnx-*`. Raises ValueError if no layer allows it."""
        proto = self.proto
        if name != "onnx-float32":
            replace, layers = FORMS[name]
            graph = _Graph(proto, self.weights)
            proto = graph.with_integers(replace)
            lstms = name == "onnx-int8" and any(node.op_type == "LSTM" for node in proto.graph.node)
            if not graph.replaced and not lstms:
                raise ValueError(f"{self.name} has no {layers}")
            proto = _quantize_lstms(proto) if lstms else proto
        return OnnxEngine(proto.SerializeToString(), self.template)


def export_graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> ModelProto:
    """The float graph of a model in evaluation mode, quantized weights multiplied out.

    The first dimension of inputs is free, and the second one of sequences (integers (B, T), floats
    (B, T, D)), where the graph then gives what the model gives at another size. Its outputs are the
    tensors of the model's output in order. Raises ValueError if the model cannot be exported.
    """
    model, name, reason = float_copy(model), type(model).__name__, ""
    model.forward = _tensors_only(model.forward)
    example = tuple(torch.cat([x, x]) if x.ndim and len(x) == 1 else x for x in inputs)
    for sequences in (True, False, None):
        free = [_free(x, example[0], sequences) for x in example]
        shapes = tuple(dict.fromkeys(dims, torch.export.Dim.AUTO) for dims in free)
        settings = {"dynamo": True, "verbose": False, "dynamic_shapes": shapes}
        arguments = example if any(free) else inputs
        try:  # exporters raise anything, of any type, over hundreds of lines
            with quiet(), torch.no_grad():
                proto = _fold(_strip(torch.onnx.export(model, arguments, **settings).model_proto))
                if not any(free):
                    return proto
                longer = [_longer(x, dims) for x, dims in zip(arguments, free)]
                expected = model(*longer)
                outputs = OnnxEngine(proto.SerializeToString(), expected)(*longer)
            if relative_error(outputs, expected) < ROUNDING:  # else a loop over a size was unrolled
                return proto
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(f"{name} cannot be exported to ONNX: {reason}")


def _tensors_only(forward):
    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        return tuple(tensors_of(forward(*args, **kwargs)))

    return wrapped


def _free(x: Tensor, first: Tensor, sequences: bool | None) -> list[int]:
    """Dimensions that may change: that of the batch, and of sequences the second. None: none."""
    if sequences is None or not x.ndim or not first.ndim:
        return []
    sequence = x.ndim == 3 or (x.ndim == 2 and not x.is_floating_point())
    return [0] * (len(x) == len(first)) + [1] * (sequences and sequence)


def _longer(x: Tensor, dims: list[int]) -> Tensor:
    for dim in dims:
        x = torch.cat([x, x.narrow(dim, 0, 1)], dim)
    return x


def _strip(proto: ModelProto) -> ModelProto:
    """Without the exporter's notes (stack traces, source lines), most of a small model's file."""
    del proto.graph.value_info[:], proto.graph.metadata_props[:], proto.metadata_props[:]
    for node in nodes_of(proto.graph.node):
        del node.metadata_props[:]
        node.doc_string = ""
    return proto


def nodes_of(nodes) -> Iterator[NodeProto]:
    """The nodes, and those inside their loops and branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g.node)


def _fold(proto: ModelProto) -> ModelProto:
    """With constants computed: an LSTM's weights, whose gates are reordered, are weights again."""
    if not any(node.op_type in ("LSTM", "GRU") for node in proto.graph.node):
        return proto
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        provider = ["CPUExecutionProvider"]
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=provider)
        return onnx.load(options.optimized_model_filepath)


def _quantize_lstms(proto: ModelProto) -> ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    settings = {"op_types_to_quantize": ["LSTM"], "weight_type": QuantType.QInt8}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lstm.onnx"
        quantize_dynamic(proto, path, per_channel=True, **settings)
        return onnx.load(path)


class _Graph:
    """A copy of a graph, to be written anew; its weights are found among a model's integer ones."""

    def __init__(self, proto: ModelProto, weights: list[IntegerWeight]):
        self.proto, self.weights, self.replaced = ModelProto(), weights, 0
        self.proto.CopyFrom(proto)
        self.old, self.nodes = list(self.proto.graph.node), []
        self.values = {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}

    def find(self, value: np.ndarray) -> IntegerWeight | None:
        """The integer form of a weight (rows, ...), or (sets, rows, ...) of experts."""
        tensor = torch.from_numpy(np.array(value))
        for weight in self.weights:
            starts = len(tensor) in (len(weight.codes), weight.view.shape[0])
            if starts and tensor.numel() == weight.codes.numel():
                found = weight.as_found(tensor.reshape(weight.codes.shape))
                if found is not None:
                    return found
        return None

    def constant(self, name: str, value) -> str:
        """Adds a constant and returns its name."""
        value = np.array(value, order="C")
        self.proto.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def add(self, operator: str, inputs: list, output: str, **attributes) -> str:
        """Adds a node whose inputs are names or constant arrays; returns the name of its output."""
        names = [x if isinstance(x, str) else self.constant(f"{output}.{operator}.{i}", x)
                 for i, x in enumerate(inputs)]  # fmt: skip
        self.nodes.append(helper.make_node(operator, names, [output], **attributes))
        return output

    def finished(self) -> ModelProto:
        """The graph of the new nodes, and the constants that they read and do not compute."""
        graph = self.proto.graph
        used = {name for node in nodes_of(self.nodes) for name in node.input}
        used |= {output.name for output in graph.output}
        used -= {name for node in self.nodes for name in node.output}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(kept)
        if CONTRIB not in {entry.domain for entry in self.proto.opset_import}:
            self.proto.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        return self.proto

    def with_integers(self, replace) -> ModelProto:
        """The graph with replace(self, node, weight, transposed) for each node that multiplies by a
        quantized weight; where that gives False, the node stays."""
        for node in self.old:
            weight, transposed = self._weight_of(node)
            if weight is not None and replace(self, node, weight, transposed):
                self.replaced += 1
            else:
                self.nodes.append(node)
        return self.finished()

    def _weight_of(self, node: NodeProto) -> tuple[IntegerWeight | None, bool]:
        if node.op_type not in ("Gemm", "MatMul", "Conv") or node.input[1] not in self.values:
            return None, False
        value, convolution = self.values[node.input[1]], node.op_type == "Conv"
        flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if value.dtype != np.float32 or (not convolution and value.ndim != 2):
            return None, False
        if flags.get("transA") or flags.get("alpha", 1) != 1 or flags.get("beta", 1) != 1:
            return None, False
        transposed = not convolution and not flags.get("transB")
        return self.find(value.T if transposed else value), transposed


def _bias(node: NodeProto) -> str:
    return node.input[2] if len(node.input) > 2 else ""


def _dynamic(graph: _Graph, node: NodeProto, weight: IntegerWeight, transposed: bool) -> bool:
    if node.op_type == "Conv" or not weight.per_row:
        return False
    inputs = [node.input[0], weight.codes.t(), weight.scale[:, 0], "", _bias(node)]
    graph.add("DynamicQuantizeMatMul", inputs, node.output[0], domain=CONTRIB)
    return True


def _blocks(graph: _Graph, node: NodeProto, weight: IntegerWeight, transposed: bool) -> bool:
    rows, columns = weight.codes.shape
    size = weight.block if not weight.per_row else BLOCKS[0]
    if node.op_type == "Conv" or size not in BLOCKS:
        return False
    bits, count = 4 if weight.format.qmax <= 7 else 8, -(-columns // size)
    unsigned = F.pad(weight.codes, (0, count * size - columns)).to(torch.int16) + 2 ** (bits - 1)
    packed = unsigned.to(torch.uint8).reshape(rows, count, size)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    scale = weight.scale.expand(rows, count).reshape(-1)
    shape = {"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": 4}
    inputs = [node.input[0], packed, scale, "", "", _bias(node)]
    graph.add("MatMulNBits", inputs, node.output[0], domain=CONTRIB, **shape)
    return True


def _static(graph: _Graph, node: NodeProto, weight: IntegerWeight, transposed: bool) -> bool:
    if weight.input_grid is None or not weight.per_row:
        return False
    (scale, zero), out, scales = weight.input_grid, node.output[0], weight.scale[:, 0].numpy()
    shape, grid = graph.values[node.input[1]].shape, [np.float32(scale), np.uint8(zero)]
    codes = weight.codes.t() if transposed else weight.codes.reshape(shape)
    integers = graph.add("QuantizeLinear", [node.input[0], *grid], f"{out}.x.codes")
    copied = NodeProto()
    copied.CopyFrom(node)
    copied.input[0] = graph.add("DequantizeLinear", [integers, *grid], f"{out}.x")
    zeros, axis = np.zeros(len(scales), np.int8), int(transposed)
    parts = [codes, scales, zeros]
    copied.input[1] = graph.add("DequantizeLinear", parts, f"{out}.weight", axis=axis)
    if _bias(node):  # in units of the integer products, to which the fused kernels add it
        units = scales * np.float32(scale)
        rounded = np.clip(np.round(graph.values[_bias(node)] / units), -(2**31), 2**31 - 1)
        parts = [rounded.astype(np.int32), units, zeros.astype(np.int32)]
        copied.input[2] = graph.add("DequantizeLinear", parts, f"{out}.bias", axis=0)
    graph.nodes.append(copied)
    return True


FORMS = {
    "onnx-int8": (_dynamic, "Linear or LSTM with INT8 codes a row"),
    "onnx-static": (_static, "layer with a calibrated input: quantize it statically first"),
    "onnx-blocks": (_blocks, f"Linear with integer codes in blocks of {sorted(BLOCKS)}"),
}


def store_codes(proto: ModelProto, model: nn.Module) -> ModelProto:
    """The graph with codes in place of float weights that are quantized in `model`, a scale a row.

    Embeddings are looked up in codes, other weights are multiplied out when the graph is loaded;
    the outputs stay the same.
    """
    graph = _Graph(proto, [weight for weight in integer_weights(model) if weight.per_row])
    tables = {}
    for name, value in graph.values.items():
        if value.dtype != np.float32 or value.ndim < 2 or value.size < SMALLEST:
            continue
        weight, turned = graph.find(value), False
        if weight is None and value.ndim == 2:
            weight, turned = graph.find(value.T), True
        if weight is None:
            continue
        codes, scale = weight.codes.reshape(value.T.shape if turned else value.shape), weight.scale
        rows = codes.shape[:1] if len(codes) == len(scale) else codes.shape[:-1]
        parts = codes, scale.reshape(*rows, *[1] * (codes.ndim - len(rows)))
        parts = [part.t() if turned else part for part in parts]
        users = [node for node in nodes_of(graph.old) if name in node.input]
        inside = len(users) - sum(name in node.input for node in graph.old)
        if not inside and all(_looks_up(node, name) for node in users):
            pairs = zip(("codes", "scale"), parts)
            tables[name] = [graph.constant(f"{name}.{part}", value) for part, value in pairs]
        else:
            _product(graph, *parts, name)
    for node in graph.old:
        if node.op_type == "Gather" and node.input[0] in tables:
            index, out = node.input[1], node.output[0]
            parts = [graph.add("Gather", [t, index], f"{out}.{t}") for t in tables[node.input[0]]]
            _product(graph, *parts, out)
        else:
            graph.nodes.append(node)
    return graph.finished()


def _looks_up(node: NodeProto, name: str) -> bool:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == name and axis == 0


def _product(graph: _Graph, codes, scale, out: str) -> None:
    factor = graph.add("Cast", [codes], f"{out}.float", to=TensorProto.FLOAT)
    graph.add("Mul", [factor, scale], out)


def export_onnx(model: nn.Module, path, inputs, engine: str = "onnx-float32") -> dict:
    """Writes a module's graph in the form of an ONNX engine, and runs it against torch.

    Any runtime with INT8 kernels understands onnx-static; onnx-int8 and onnx-blocks are ONNX
    Runtime's own operators. Quantized weights that are computed with in floats (embeddings,
    experts) are stored as codes all the same. The outputs are compared with those of the module as
    it is (fake-quantized), the time with that of the float one.

    Returns: `bytes`, `engine`, `max_difference`, `relative_error`, medians `torch_ms`, `onnx_ms`.
    Raises ValueError if the model cannot be exported.
    """
    call, name = cast(call_with(inputs), torch.float32), type(model).__name__
    made, floats = build_engine(model, engine, call), float_copy(model)
    if engine != "onnx-float32":
        proto = store_codes(onnx.load_from_string(made.graph.numpy().tobytes()), model)
        made = OnnxEngine(proto.SerializeToString(), made.template)
    size = made.save(path)
    loaded = OnnxEngine.load(path)
    with torch.inference_mode():
        expected, outputs = call(model), call(loaded)
        times = measure({"torch": lambda: call(floats), "onnx": lambda: call(loaded)}, 0.3)
    y, r = flat(outputs), flat(expected)
    if y.shape != r.shape:
        raise ValueError(f"{path} gives {len(y)} values, the {name} {len(r)}: do not use it")
    return {
        "bytes": size,
        "engine": engine,
        "max_difference": (y - r).abs().max().item(),
        "relative_error": relative_error(outputs, expected),
        **{f"{key}_ms": 1e3 * time.median for key, time in times.items()},
    }
