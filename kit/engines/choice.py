"""Which engine is fastest for this model, on this machine, at this batch size, within a stated error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kit.core.measurement import measure
from kit.engines.folding import fold_batch_norms
from kit.engines.kernels import int8_model
from kit.engines.layers import float_copy

FLOAT = ("float32", "bfloat16", "onnx-float32")
INTEGER = ("torch-int8", "onnx-int8", "onnx-static", "onnx-blocks")
ENGINES = FLOAT + INTEGER
PROBED_BATCHES = (4, 16, 64, 256)
MARGIN = 1.05  # an engine must be this much faster than float32 to be preferred to it


class Bfloat16(nn.Module):
    """A model computed in bfloat16: float inputs are converted, float outputs come back as float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, *inputs):
        cast = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
        return pytree.tree_map(_as_float, self.model(*cast))


def _as_float(y):
    return y.float() if isinstance(y, Tensor) and y.dtype == torch.bfloat16 else y


@dataclass(frozen=True)
class Choice:
    """The engine chosen, and what was measured of all: `table` has a row an engine with the median, lower
    and upper quartile in milliseconds, the speed relative to float32, the error (mean squared difference
    from the reference over its mean square) and, for an engine not taken, why.
    """

    name: str
    engine: nn.Module
    table: pd.DataFrame | None = None
    pays_from: int | None = None  # the smallest batch measured from which on integers win; None: at none


class _Builder:
    """Makes engines of one model; the export to ONNX is shared."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]):
        self.model, self.inputs, self._exported = model, inputs, None

    def floats(self) -> nn.Module:
        return fold_batch_norms(float_copy(self.model))

    def onnx(self, convert: Callable) -> nn.Module:
        from kit.engines import graph, runtime

        if self._exported is None:
            self._exported = (
                graph.export_graph(self.model, self.inputs),
                _structure(self.floats(), self.inputs),
            )
        exported, structure = self._exported
        return runtime.OnnxEngine(convert(graph, exported).SerializeToString(), structure)

    def build(self, name: str) -> nn.Module:
        makers = {
            "float32": self.floats,
            "bfloat16": lambda: Bfloat16(self.floats()).eval(),
            "torch-int8": lambda: int8_model(self.model),
            "onnx-float32": lambda: self.onnx(lambda graph, exported: exported),
            "onnx-int8": lambda: self.onnx(lambda graph, exported: graph.dynamic_graph(exported, self.model)),
            "onnx-static": lambda: self.onnx(
                lambda graph, exported: graph.static_graph(exported, self.model)
            ),
            "onnx-blocks": lambda: self.onnx(lambda graph, exported: graph.block_graph(exported, self.model)),
        }
        if name not in makers:
            raise ValueError(f"engine {name!r} is unknown: choose one of {', '.join(ENGINES)}")
        return makers[name]().requires_grad_(False)


@torch.no_grad()
def _structure(model: nn.Module, inputs) -> str | None:
    outputs = model(*inputs)
    return None if isinstance(outputs, Tensor) else pytree.treespec_dumps(pytree.tree_structure(outputs))


def build_engine(model: nn.Module, name: str, inputs: tuple[Tensor, ...]) -> nn.Module:
    """One engine of ENGINES for a model whose weights are quantized (`kit.quantization.quantize_weights`).

    float32, bfloat16             torch, with the weights multiplied out
    torch-int8                    torch's integer kernels that stay (oneDNN, _int_mm)
    onnx-float32                  ONNX Runtime from here on
    onnx-int8                     inputs rounded by each batch's range
    onnx-static                   inputs rounded by calibrated ranges (QDQ)
    onnx-blocks                   4- and 8-bit weights, inputs rounded in blocks

    `inputs` are examples for the export. Raises ValueError if the engine is unknown or cannot compute this model.
    """
    return _Builder(model, inputs).build(name)


def flat(outputs) -> Tensor:
    """All floating-point values of a (nested) output in one vector."""
    tensors = [
        y.detach().float().reshape(-1).cpu()
        for y in pytree.tree_leaves(outputs)
        if isinstance(y, Tensor) and y.is_floating_point()
    ]
    return torch.cat(tensors) if tensors else torch.zeros(0)


def relative_error(outputs, reference) -> float:
    """Mean squared difference over the reference's mean square; infinite if shapes differ or it is not
    finite.
    """
    y, r = flat(outputs), flat(reference)
    if y.shape != r.shape:
        return float("inf")
    error = ((y - r).square().mean() / r.square().mean().clamp_min(1e-30)).item() if len(r) else 0.0
    return error if error == error else float("inf")


def choose_engine(model: nn.Module, inputs: tuple[Tensor, ...], *, reference: nn.Module | None = None,
                  max_error: float = 1e-3, names: Sequence[str] = ENGINES, seconds: float = 1.0) -> Choice:
    """Builds the engines `names` for a quantized model, measures them on `inputs`, and returns the
    fastest one whose output differs from the reference's (default: the model as it is) by at most
    `max_error`.

    float32 is always among them, and wins if nothing beats it by 5 %. Measuring takes about `seconds`,
    plus the time to export. An engine that cannot compute the model is listed in the table with the
    reason.
    """
    with torch.inference_mode():
        expected = (reference or model)(*inputs)
        engines, rows = _candidates(model, inputs, expected, max_error, ("float32", *names))
        calls = {name: (lambda e=engine: e(*inputs)) for name, engine in engines.items()}
        times = measure(calls, seconds, cutoff=3.0)
    base = times["float32"].median
    for name, time in times.items():
        rows[name] |= {"ms": 1e3 * time.median, "low": 1e3 * time.low, "high": 1e3 * time.high,
                       "speedup": base / time.median}
    fit = [name for name in times if not rows[name]["why not"]]
    best = min(fit, key=lambda name: times[name].median, default="float32")
    if times[best].median * MARGIN > base:
        best = "float32"
    usable = {name: engines[name] for name in fit}
    pays_from = len(inputs[0]) if best in INTEGER else _pays_from(usable, inputs)
    for name in engines:
        if name != best:
            rows[name]["why not"] = rows[name]["why not"] or "slower"
    return Choice(best, engines[best], pd.DataFrame(rows.values()), pays_from)


@torch.inference_mode()
def _pays_from(engines: dict[str, nn.Module], inputs: tuple[Tensor, ...]) -> int | None:
    """The smallest of PROBED_BATCHES above that of `inputs` from which on integer engines beat float ones."""
    integers, found = [name for name in engines if name in INTEGER], None
    for batch in reversed(PROBED_BATCHES):
        if batch <= len(inputs[0]) or not integers:
            break
        resized = tuple(x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch] for x in inputs)
        times = measure({name: (lambda e=engine: e(*resized)) for name, engine in engines.items()}, 0.1)
        if min(times.pop(name).median for name in integers) * MARGIN > min(time.median for time in times.values()):
            break
        found = batch
    return found


def _candidates(model, inputs, expected, max_error: float, names):
    """Engines by name, and for every name a row of the table."""
    builder, engines, rows = _Builder(model, inputs), {}, {}
    for name in dict.fromkeys(names):
        rows[name] = {"engine": name, "ms": None, "low": None, "high": None, "speedup": None, "error": None,
                      "why not": ""}
        try:
            engine = builder.build(name)
            error = relative_error(engine(*inputs), expected)
        except Exception as reason:  # whatever an engine cannot do, another one can: float32 does all
            if name == "float32":
                raise
            rows[name]["why not"] = (str(reason).strip() or type(reason).__name__).splitlines()[0][:120]
            continue
        engines[name], rows[name]["error"] = engine, error
        if error > max_error:
            rows[name]["why not"] = f"error above {max_error:g}"
    return engines, rows
