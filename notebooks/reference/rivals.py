"""What the engines are measured against: the INT8 paths that torch, torchao and ONNX Runtime offer
themselves.

Only for comparison; nothing else uses them. Those whose package or API is missing are left out.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kit.core.measurement import measure, relative_error
from kit.core.protocols import call_with
from kit.engines.export import export_graph, quiet
from kit.engines.quantized import QuantizationConfig, quantize
from kit.engines.runtime import OnnxEngine


def rivals(model: nn.Module, example: Tensor, compiled: bool = True) -> dict[str, Callable]:
    """Callables by name: torch dynamic (and, for convolutions, static) INT8, torchao, ONNX
    Runtime's quantizer.

    example: inputs, on which static ranges are found as well. compiled: with torchao, which needs
    half a minute a model to compile.
    """
    found: dict[str, Callable] = {}
    convolutional = _convolutional(model)
    known = torch.backends.quantized.supported_engines
    for backend in [name for name in ("x86", "onednn") if name in known] or ["qnnpack"]:
        with contextlib.suppress(Exception), quiet(), _backend(backend):
            make = torch_static if convolutional else torch_dynamic
            found[f"torch {'static' if convolutional else 'dynamic'} ({backend})"] = make(
                model, example, backend
            )
    if compiled and not convolutional:
        with contextlib.suppress(ImportError), quiet():
            found["torchao (compiled)"] = _warm(torchao_int8(model), example)
    found["ONNX Runtime's quantizer"] = onnxruntime_int8(model, example, static=convolutional)
    return found


def _convolutional(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


@torch.inference_mode()
def _warm(call: Callable, example: Tensor) -> Callable:
    """Compiles now, for one row and for many."""
    call(example), call(example[:1])
    return call


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def torch_dynamic(model: nn.Module, example: Tensor, backend: str) -> nn.Module:
    """torch.ao's dynamic quantization of Linear and LSTM (deprecated)."""
    return torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model).eval(), {nn.Linear, nn.LSTM}, torch.qint8
    )


def torch_static(model: nn.Module, example: Tensor, backend: str) -> nn.Module:
    """torch.ao's static quantization by graph rewriting (deprecated)."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(
        copy.deepcopy(model).eval(), get_default_qconfig_mapping(backend), (example,)
    )
    prepared(example)
    return convert_fx(prepared)


def torchao_int8(model: nn.Module) -> Callable:
    """torchao's INT8 weights and dynamic INT8 inputs, compiled with frozen weights as its
    documentation advises."""
    import torch._inductor.config
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch._inductor.config.freezing = True
    quantized = copy.deepcopy(model).eval()
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(quantized, dynamic=True)


def onnxruntime_int8(model: nn.Module, example: Tensor, static: bool) -> OnnxEngine:
    """onnxruntime.quantization.quantize_dynamic or quantize_static (QDQ), weights int8 by
    channel."""
    from onnxruntime import quantization as ort

    graph = export_graph(model, call_with(example))
    del graph.graph.value_info[:]
    options = {"per_channel": True, "weight_type": ort.QuantType.QInt8}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        if static:
            ort.quantize_static(graph, path, _Reader(graph.graph.input[0].name, example), **options)
        else:
            ort.quantize_dynamic(
                graph, path, op_types_to_quantize=["MatMul", "Gemm", "LSTM"], **options
            )
        return OnnxEngine.load(path)


class _Reader:
    """The calibration batches in the form that ONNX Runtime reads."""

    def __init__(self, name: str, example: Tensor):
        self.batches = iter([{name: example.numpy()}])

    def get_next(self):
        return next(self.batches, None)


@torch.inference_mode()
def against_rivals(
    model: nn.Module,
    inputs: Tensor,
    found: dict[str, Callable],
    max_error: float = 1e-3,
    seconds: float = 1.0,
) -> pd.DataFrame:
    """Times the chosen engine, float32 in torch, and rivals on the same inputs, in turns of a few
    milliseconds.

    One row each: name, ms (median), low and high (quartiles), error (mean squared difference from
    the float32 output over its mean square); `attrs["engine"]` is what was chosen.
    """
    with quiet():
        calibration = [inputs] if _convolutional(model) else None
        quantized = quantize(model, QuantizationConfig(max_error=max_error), calibration)
        choice = quantized.tune(inputs)
        calls = {"float32 in torch": model, "kit": quantized, **found}
        errors = {name: relative_error(call(inputs), model(inputs)) for name, call in calls.items()}
        times = measure({name: (lambda c=call: c(inputs)) for name, call in calls.items()}, seconds)
    rows = [
        {
            "name": name,
            "ms": 1e3 * time.median,
            "low": 1e3 * time.low,
            "high": 1e3 * time.high,
            "error": errors[name],
        }
        for name, time in times.items()
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["engine"] = choice.name
    return frame
