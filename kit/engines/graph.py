"""ONNX graphs of quantized models: in floats, and in three integer forms (`FORMS`)."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import get_attribute_value, make_node, make_opsetid
from torch import nn
from torch.nn.modules.conv import _ConvNd

from kit.core.measurement import flat, measure, relative_error
from kit.core.protocols import Call, call_with, tensors_of
from kit.core.store import digest
from kit.core.weights import original_of, weights
from kit.engines.choice import PLAIN, opaque
from kit.engines.export import export_graph, nodes_of, quiet
from kit.engines.layers import IntegerWeight, cast, float_copy, integer_weights
from kit.engines.runtime import OnnxEngine

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
BLOCKS = (32, 64, 128, 256, 16)
LAYERS = (nn.Linear, _ConvNd)
CONSTANT = tuple(kind for kind in PLAIN if kind not in (int, float, complex))  # in outputs
SMALLEST = 1024  # values of a tensor; below, nodes that read codes take more bytes than they save


class Exported:
    """The float graph of a model, from which its ONNX engines are made.

    Raises ValueError if a graph cannot hold the call or its output, or the export fails.
    """

    def __init__(self, model: nn.Module, call: Call):
        self.name, self.weights, self.call = type(model).__name__, integer_weights(model), call
        self.matrices, modules = weights(model, matrices=True), model.named_modules()
        layers = [(name, m) for name, m in modules if isinstance(m, LAYERS)]
        self.layers = {id(original_of(m, "weight")): name for name, m in layers}
        with torch.no_grad():
            self.template = call(float_copy(model))
        for what, value, plain in (("call", call, PLAIN), ("output", self.template, CONSTANT)):
            if kind := opaque(value, plain):
                advice = "leave it out, a cache by use_cache=False; return numbers as tensors"
                raise ValueError(f"a {kind} in the {what} has no place in an ONNX graph: {advice}")
        self.proto = export_graph(model, call)

    def engine(self, name: str, stored: bool = False) -> OnnxEngine:
        """One of the engines `onnx-*`. Raises ValueError if no layer allows it.

        stored: with codes also for weights that are computed with in floats, for small files.
        `kept` of an integer engine says which layers are computed in floats, and why.
        """
        graph, kept = _Graph(self.proto, self.weights), {}
        if name != "onnx-float32":
            replace, layers = FORMS[name]
            lstms = name == "onnx-int8" and any(n.op_type == "LSTM" for n in self.proto.graph.node)
            replaced = graph.rewrite(replace)
            if not any(replaced.values()) and not lstms:
                raise ValueError(f"{self.name} has no {layers}")
            if lstms:
                graph = _Graph(_quantize_lstms(graph.proto), self.weights)
            kept = self._kept(name, replaced, nn.LSTM if lstms else ())
        if stored:
            graph.store_codes()
        engine = OnnxEngine(graph.proto.SerializeToString(), self.template, self.call)
        engine.kept = kept
        return engine

    def _kept(self, name: str, replaced: dict[str, bool], kinds) -> dict[str, str]:
        """Layers and stacked experts that an engine computes in floats, with the reason."""
        kept, coded = {}, {weight.name for weight in self.weights}
        for weight in self.matrices:
            home = self.layers.get(id(weight.original))
            if home is None and (weight.view.split[0] > 1 or isinstance(weight.module, nn.RNNBase)):
                home = weight.name
            computed = home is None or isinstance(weight.module, kinds)
            if not replaced.get(weight.name, computed):
                why = f"{name} has no kernel for it" if weight.name in coded else "no integer codes"
                kept[weight.name if home is None else home] = why
        return kept


def _quantize_lstms(proto: ModelProto) -> ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    settings = {"op_types_to_quantize": ["LSTM"], "weight_type": QuantType.QInt8}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lstm.onnx"
        quantize_dynamic(proto, path, per_channel=True, **settings)
        return onnx.load(path)


class _Graph:
    """A graph written anew from another one, whose weights are recognized by their values."""

    def __init__(self, proto: ModelProto, weights: list[IntegerWeight]):
        self.proto, self.weights, self.nodes = ModelProto(), weights, []
        self.proto.CopyFrom(proto)
        self.values = {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}

    def find(self, name: str) -> tuple[IntegerWeight | None, bool]:
        """The integer form of a constant, and whether the graph holds it as (columns, rows)."""
        value = self.values.get(name, np.zeros(0))
        if value.dtype != np.float32 or value.ndim < 2:
            return None, False
        for turned in (False, True)[: 1 + (value.ndim == 2)]:
            tensor = torch.from_numpy(np.array(value.T if turned else value))
            rows = len(tensor), tensor.shape[:-1].numel()
            for weight in self.weights:
                if weight.codes.numel() == tensor.numel() and len(weight.codes) in rows:
                    found = weight.as_found(tensor.reshape(weight.codes.shape))
                    if found is not None:
                        return found, turned
        return None, False

    def add(self, operator: str, inputs: list, output: str, **attributes) -> str:
        """Adds a node whose inputs are names or constants; returns its output, a name."""
        names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        self.nodes.append(make_node(operator, names, [output], **attributes))
        return output

    def _constant(self, value) -> str:
        """The name of a constant, which is in the graph once."""
        value = np.array(np.asarray(value), order="C")
        name = digest(value, str(value.dtype), value.shape)
        if name not in self.values:
            self.values[name] = value
            self.proto.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def rewrite(self, replace: Callable) -> dict[str, bool]:
        """Calls replace(self, node, weight, turned) for each node that multiplies by a quantized
        weight; a node for which that gives False stays. Returns which weights are replaced in all
        their products."""
        replaced: dict[str, bool] = {}
        for node in self.proto.graph.node:
            known = node.op_type in ("Gemm", "MatMul", "Conv")
            weight, turned = self.find(node.input[1]) if known else (None, False)
            flags = {a.name: get_attribute_value(a) for a in node.attribute}
            plain = flags.get("alpha", 1) == flags.get("beta", 1) == 1 and not flags.get("transA")
            fits = weight and plain and turned != (node.op_type == "Conv" or flags.get("transB", 0))
            done = bool(fits and replace(self, node, weight, turned))
            if weight:
                replaced[weight.name] = replaced.get(weight.name, True) and done
            if not done:
                self.nodes.append(node)
        self.finish()
        return replaced

    def store_codes(self) -> None:
        """Puts codes in place of float weights with a scale a row: multiplied out when the graph is
        loaded, they give the same outputs."""
        old, self.nodes = list(self.proto.graph.node), []
        for name in [tensor.name for tensor in self.proto.graph.initializer]:
            shape, large = self.values[name].shape, self.values[name].size >= SMALLEST
            weight, turned = self.find(name) if large else (None, False)
            if weight is None or not weight.per_row:
                continue
            codes, scale = weight.codes.t(), weight.scale.t()
            if not turned:
                rows = shape[:1] if len(weight.codes) == shape[0] else shape[:-1]
                scale = weight.scale.reshape(*rows, *[1] * (len(shape) - len(rows)))
                codes = weight.codes.reshape(shape)
            factor = self.add("Cast", [codes], f"{name}.codes", to=TensorProto.FLOAT)
            self.add("Mul", [factor, scale], name)
        self.nodes += old
        self.finish()

    def finish(self) -> None:
        """Takes the new nodes, and of the constants those that they read and do not compute."""
        graph, domains = self.proto.graph, {entry.domain for entry in self.proto.opset_import}
        used = {name for node in nodes_of(self.nodes) for name in node.input}
        used |= {output.name for output in graph.output}
        used -= {name for node in self.nodes for name in node.output}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(kept)
        new = {node.domain for node in self.nodes} - domains
        self.proto.opset_import.extend(make_opsetid(domain, 1) for domain in new)


def _bias(node: NodeProto) -> str:
    return node.input[2] if len(node.input) > 2 else ""


def _dynamic(graph: _Graph, node: NodeProto, weight: IntegerWeight, turned: bool) -> bool:
    """Inputs to uint8 in the range of each batch."""
    if node.op_type == "Conv" or not weight.per_row:
        return False
    inputs = [node.input[0], weight.codes.t(), weight.scale[:, 0], "", _bias(node)]
    graph.add("DynamicQuantizeMatMul", inputs, node.output[0], domain=CONTRIB)
    return True


def _blocks(graph: _Graph, node: NodeProto, weight: IntegerWeight, turned: bool) -> bool:
    """4- or 8-bit weights, inputs to int8 in blocks of a row."""
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
    inputs = [node.input[0], packed, scale, "", "", _bias(node)]
    shape = {"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": 4}
    graph.add("MatMulNBits", inputs, node.output[0], domain=CONTRIB, **shape)
    return True


def _static(graph: _Graph, node: NodeProto, weight: IntegerWeight, turned: bool) -> bool:
    """Inputs in calibrated ranges: QuantizeLinear, DequantizeLinear pairs, fused when loaded."""
    if weight.input_qparams is None or not weight.per_row:
        return False
    (scale, zero), out, scales = weight.input_qparams, node.output[0], weight.scale[:, 0]
    shape, qparams = graph.values[node.input[1]].shape, [np.float32(scale), np.uint8(zero)]
    codes = weight.codes.t() if turned else weight.codes.reshape(shape)
    integers = graph.add("QuantizeLinear", [node.input[0], *qparams], f"{out}.x.codes")
    x = graph.add("DequantizeLinear", [integers, *qparams], f"{out}.x")
    w = graph.add("DequantizeLinear", [codes, scales], f"{out}.weight", axis=int(turned))
    copied = NodeProto()
    copied.CopyFrom(node)
    copied.input[:2] = [x, w]
    if _bias(node):  # in units of the integer products, to which the fused kernels add it
        units = scales.numpy() * np.float32(scale)
        rounded = np.clip(np.round(graph.values[_bias(node)] / units), -(2**30), 2**30)
        parts = [rounded.astype(np.int32), units]
        copied.input[2] = graph.add("DequantizeLinear", parts, f"{out}.bias", axis=0)
    graph.nodes.append(copied)
    return True


FORMS = {
    "onnx-int8": (_dynamic, "Linear or LSTM with INT8 codes a row"),
    "onnx-static": (_static, "layer with a calibrated input: quantize it statically first"),
    "onnx-blocks": (_blocks, f"Linear with integer codes in blocks of {sorted(BLOCKS)}"),
}


def export_onnx(
    model: nn.Module, path: str | os.PathLike, inputs, engine: str = "onnx-float32"
) -> dict:
    """Writes a module's graph in the form of an ONNX engine, and runs it against torch.

    onnx-static is QDQ pairs, which any runtime with INT8 kernels understands; onnx-int8 and
    onnx-blocks are ONNX Runtime's own operators. Quantized weights that are computed with in floats
    (embeddings, experts) are stored as codes all the same. The outputs are compared with those of
    the module as it is (fake-quantized), the time with that of the float one.
    Returns `bytes`, `engine`, `max_difference`, `relative_error`, `torch_ms` and `onnx_ms`
    (medians). Raises ValueError if the model cannot be exported.
    """
    call, floats = cast(call_with(inputs), torch.float32), float_copy(model)
    made = Exported(model, call).engine(engine, stored=engine != "onnx-float32")
    size, loaded = made.save(path), OnnxEngine.load(path)
    tensors = tensors_of(call)
    with torch.inference_mode():
        expected, outputs = call(model), loaded(*tensors)
        times = measure({"torch": lambda: call(floats), "onnx": lambda: loaded(*tensors)}, 0.3)
    return {
        "bytes": size,
        "engine": engine,
        "max_difference": (flat(outputs) - flat(expected)).abs().max().item(),
        "relative_error": relative_error(outputs, expected),
        **{f"{key}_ms": 1e3 * time.median for key, time in times.items()},
    }
