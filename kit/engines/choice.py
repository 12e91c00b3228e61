"""Which engine is fastest for a model, on this machine, for these inputs, within a stated error."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import pandas as pd
import torch
from torch import Tensor, nn

from kit.core.measurement import measure
from kit.core.protocols import Call, call_with, tensors_of, tree_map
from kit.engines.folding import fold_batch_norms
from kit.engines.kernels import int8_model
from kit.engines.layers import cast, float_copy

FLOAT = ("float32", "bfloat16", "onnx-float32")
INTEGER = ("torch-int8", "onnx-int8", "onnx-static", "onnx-blocks")
ENGINES = FLOAT + INTEGER
PROBED_BATCHES = (4, 16, 64, 256)
MARGIN = 1.05  # an engine must be this much faster than float32 to be preferred to it


class Bfloat16(nn.Module):
    """A model computed in bfloat16; what it gives in bfloat16 comes back as float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, *args, **kwargs):
        outputs = cast(Call(args, kwargs), torch.bfloat16)(self.model)
        return tree_map(lambda y: y.float() if y.dtype == torch.bfloat16 else y, outputs)


@dataclass(frozen=True)
class Choice:
    """The engine chosen, and what was measured of all.

    table: a row an engine with the median, lower and upper quartile in milliseconds, the speed
        relative to float32, the error (`relative_error`) and, for an engine not taken, why.
    pays_from: the smallest batch measured from which on integers win; None if they win at none.
    """

    name: str
    engine: nn.Module
    table: pd.DataFrame | None = None
    pays_from: int | None = None


class _Builder:
    """Makes engines of one model; the ONNX ones share an export."""

    def __init__(self, model: nn.Module, call: Call):
        self.model, self.call = model, call

    @cached_property
    def exported(self):
        """The float graph, or why there is none."""
        from kit.engines.graph import Exported

        try:
            return Exported(self.model, self.call)
        except ValueError as reason:
            return reason

    def build(self, name: str) -> nn.Module:
        if name not in ENGINES:
            raise ValueError(f"engine {name!r} is unknown: choose one of {', '.join(ENGINES)}")
        if name.startswith("onnx-"):
            if isinstance(self.exported, ValueError):
                raise self.exported
            engine = self.exported.engine(name)
        elif name == "torch-int8":
            engine = int8_model(self.model)
        else:
            engine = fold_batch_norms(float_copy(self.model))
            engine = Bfloat16(engine) if name == "bfloat16" else engine
        return engine.eval().requires_grad_(False)


def build_engine(model: nn.Module, name: str, inputs) -> nn.Module:
    """One engine for a model whose weights are quantized (`kit.quantization.quantize_weights`).

    float32, bfloat16   torch, with the weights multiplied out
    torch-int8          torch's integer kernels, inputs rounded by calibrated or each batch's ranges
    onnx-float32        ONNX Runtime from here on
    onnx-int8           inputs rounded by each batch's range
    onnx-static         inputs rounded by calibrated ranges (QDQ)
    onnx-blocks         4- and 8-bit weights, inputs rounded in blocks

    inputs: an example for the export (`kit.core.protocols.call_with`).
    Raises ValueError if the engine is unknown or cannot compute this model.
    """
    return _Builder(model, call_with(inputs)).build(name)


def batch_size(call: Call) -> int:
    """Length of the first tensor's first dimension; 1 if there is none."""
    return next((len(x) for x in tensors_of(call) if x.ndim), 1)


def flat(outputs) -> Tensor:
    """All floating-point and complex values of a nest in one float32 vector; those of its other
    tensors if there are no such."""
    tensors = tensors_of(outputs)
    floats = [y for y in tensors if y.is_floating_point() or y.is_complex()]
    parts = [torch.view_as_real(y) if y.is_complex() else y for y in floats or tensors]
    return torch.cat([torch.zeros(0), *(part.detach().float().reshape(-1).cpu() for part in parts)])


def relative_error(outputs, reference) -> float:
    """Mean squared difference over the reference's mean square, without infinite values that agree;
    infinite if the shapes differ or the difference is not finite."""
    y, r = flat(outputs), flat(reference)
    if y.shape != r.shape:
        return float("inf")
    y, r = y[~(same := y.isinf() & (y == r))], r[~same]
    error = ((y - r).square().mean() / r.square().mean().clamp_min(1e-30)).item() if len(r) else 0.0
    return error if error == error else float("inf")


def choose_engine(
    model: nn.Module, inputs, *, reference: nn.Module | None = None, max_error: float = 1e-3,
    names: Sequence[str] = ENGINES, seconds: float = 1.0,
) -> Choice:  # fmt: skip
    """The fastest engine whose output differs from the reference's by at most `max_error`.

    float32 is always among them, and wins if nothing beats it by 5 %. Measuring takes about
    `seconds`, plus the time to export. An engine that cannot compute the model is in the table with
    the reason.

    Args:
        inputs: how the model is called (`kit.core.protocols.call_with`).
        reference: by default the model as it is. names: the engines to be measured.
    """
    call, rows = call_with(inputs), {}
    with torch.inference_mode():
        expected = call(model if reference is None else reference)
        builder, names = _Builder(model, call), ("float32", *names)
        engines = _candidates(builder, names, expected, max_error, rows)
        calls = {name: partial(call, engine) for name, engine in engines.items()}
        times = measure(calls, seconds, cutoff=3.0)
    base = times["float32"].median
    for name, time in times.items():
        ms = {key: 1e3 * value for key, value in vars(time).items()}
        rows[name] |= {"ms": ms.pop("median"), **ms, "speedup": base / time.median}
    fit = [name for name in times if not rows[name]["why not"]]
    best = min(fit, key=lambda name: times[name].median, default="float32")
    if times[best].median * MARGIN > base:
        best = "float32"
    usable = {name: engines[name] for name in fit}
    pays_from = batch_size(call) if best in INTEGER else _pays_from(usable, call)
    for name in engines:
        if name != best:
            rows[name]["why not"] = rows[name]["why not"] or "slower"
    return Choice(best, engines[best], pd.DataFrame(rows.values()), pays_from)


def _candidates(builder: _Builder, names, expected, max_error: float, rows: dict) -> dict:
    """The engines that work, by name; puts a row of the table for every name into `rows`."""
    engines, blank = {}, dict.fromkeys(("ms", "low", "high", "speedup", "error"))
    for name in dict.fromkeys(names):
        row = rows[name] = {"engine": name, **blank, "why not": ""}
        try:  # whatever an engine cannot do, another one can: float32 does all
            engine = builder.build(name)
            row["error"] = relative_error(builder.call(engine), expected)
        except Exception as reason:
            if name == "float32":
                raise
            row["why not"] = (str(reason).strip() or type(reason).__name__).splitlines()[0][:120]
            continue
        engines[name] = engine
        if row["error"] > max_error:
            row["why not"] = f"error above {max_error:g}"
    return engines


@torch.inference_mode()
def _pays_from(engines: dict[str, nn.Module], call: Call) -> int | None:
    """The smallest of PROBED_BATCHES above that of `call` from which on integer engines win."""
    rows, found = batch_size(call), None
    integers = [name for name in engines if name in INTEGER]
    for batch in reversed(PROBED_BATCHES):
        if batch <= rows or not integers or len(integers) == len(engines):
            break
        longer = tree_map(partial(_repeated, rows=rows, count=batch), call)
        try:
            times = measure({name: partial(longer, e) for name, e in engines.items()}, 0.1)
        except Exception:  # the first dimension is no batch
            return None
        fastest = min(times.pop(name).median for name in integers)
        if fastest * MARGIN > min(time.median for time in times.values()):
            break
        found = batch
    return found


def _repeated(x: Tensor, rows: int, count: int) -> Tensor:
    """`count` rows, of a tensor that has `rows`; any other stays as it is."""
    if not x.ndim or len(x) != rows:
        return x
    return x.repeat(-(-count // rows), *[1] * (x.ndim - 1))[:count]
