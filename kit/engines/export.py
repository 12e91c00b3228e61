"""ONNX files, checked in ONNX Runtime against torch before anyone relies on them."""

import os

import onnx
import torch
from torch import Tensor, nn

from kit.core.measurement import measure
from kit.engines.choice import build_engine, flat, relative_error
from kit.engines.layers import INPUT_QUANTIZER, float_copy
from kit.engines.runtime import OnnxEngine
from kit.engines.storage import store_codes
from kit.core.weights import copy_model
from kit.engines.quantized import QuantizedModel


def export_onnx(model: nn.Module, path: str | os.PathLike, inputs: tuple[Tensor, ...]) -> dict:
    """Writes the float graph of a module, or the integer graph of a QuantizedModel, and runs it.

    A model with calibrated inputs becomes QDQ pairs, which any runtime with INT8 kernels understands; one without
    becomes ONNX Runtime's own operators (DynamicQuantizeMatMul, MatMulNBits). Quantized weights that are computed
    with in floats (embeddings, experts) are stored as codes all the same. The outputs are compared with those of the
    fake-quantized torch model, the time with that of the float one.
    Returns `bytes`, `engine`, `max_difference`, `relative_error`, `torch_ms` and `onnx_ms` (medians, in turns).
    Raises ValueError if the model cannot be exported.
    """
    torch_model = copy_model(model.model if isinstance(model, QuantizedModel) else model).float().eval()
    inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    name = _engine_name(model) if isinstance(model, QuantizedModel) else "onnx-float32"
    engine = build_engine(torch_model, name, inputs)
    if isinstance(model, QuantizedModel):
        graph = store_codes(onnx.load_from_string(engine.graph.numpy().tobytes()), torch_model)
        engine = OnnxEngine(graph.SerializeToString(), engine.structure)
    size = engine.save(path)
    loaded, floats = OnnxEngine.load(path), float_copy(torch_model)
    with torch.inference_mode():
        expected, outputs = torch_model(*inputs), loaded(*inputs)
        times = measure({"torch": lambda: floats(*inputs), "onnx": lambda: loaded(*inputs)}, 0.3)
    y, r = flat(outputs), flat(expected)
    if y.shape != r.shape:
        raise ValueError(f"{path} gives {len(y)} values, the {type(model).__name__} {len(r)}: do not use it")
    return {"bytes": size, "engine": name, "max_difference": (y - r).abs().max().item(),
            "relative_error": relative_error(outputs, expected), "torch_ms": 1e3 * times["torch"].median,
            "onnx_ms": 1e3 * times["onnx"].median}


def _engine_name(model: QuantizedModel) -> str:
    if any(hasattr(module, INPUT_QUANTIZER) for module in model.model.modules()):
        return "onnx-static"
    return "onnx-blocks" if model.config.type_name == "int4" else "onnx-int8"
