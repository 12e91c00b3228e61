"""Which engine is fastest for a model, on this machine, for these inputs, within a stated error."""

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import cached_property, partial

import pandas as pd
import torch
from torch import Tensor, nn

from kit.core.measurement import measure, relative_error
from kit.core.protocols import Call, call_with, tensors_of, tree_map
from kit.core.settings import reason_of
from kit.engines.folding import fold_batch_norms
from kit.engines.kernels import int8_model
from kit.engines.layers import cast, float_copy

FLOAT = ("float32", "bfloat16", "onnx-float32")
INTEGER = ("torch-int8", "onnx-int8", "onnx-static", "onnx-blocks")
ENGINES = FLOAT + INTEGER
PROBED_BATCHES = (256, 64, 16, 4)
MARGIN = 1.05  # an engine must be this much faster than float32 to be preferred to it
ROUNDING = 1e-6  # relative error of the same floats, computed in another order
PLAIN = (Tensor, bool, int, float, complex, str, torch.dtype, torch.device, type(None))
COLUMNS = ("engine", "ms", "low", "high", "speedup", "error", "why not")


class Bfloat16(nn.Module):
    """A model computed in bfloat16, outputs in float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, *args, **kwargs):
        outputs = cast(Call(args, kwargs), torch.bfloat16)(self.model)
        if found := opaque(outputs):
            raise ValueError(f"a {found} in the output would stay in bfloat16")
        return cast(outputs, torch.float32)


@dataclass(frozen=True)
class Choice:
    """The engine chosen, and what was measured of all.

    table: a row an engine with the median and quartiles in milliseconds, the speed relative to
        float32, the error (`relative_error`) and, for an engine not taken, why.
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
    torch-int8          torch's integer kernels, inputs in each batch's range or a calibrated one
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


def opaque(value, plain: tuple = PLAIN) -> str:
    """The class of the first object in a nest that is not plain and that `tree_map` does not enter,
    such as a cache; empty if there is none."""
    if isinstance(value, plain):
        return ""
    if isinstance(value, Mapping):
        value = value.values()
    elif is_dataclass(value):
        value = vars(value).values()
    elif not isinstance(value, (tuple, list)):
        return type(value).__name__
    return next(filter(None, (opaque(item, plain) for item in value)), "")


@torch.inference_mode()
def choose_engine(
    model: nn.Module, inputs, *, reference=None, max_error=1e-3, names=ENGINES, seconds=1.0
) -> Choice:
    """The fastest engine whose output differs from the reference's by at most `max_error`.

    float32 is always among them, and wins if nothing beats it by 5 %. Measuring takes about
    `seconds`, plus the time to export. An engine that cannot compute the model is in the table with
    the reason; so is every engine, and float32 taken, where outputs cannot be compared.

    Args:
        inputs: how the model is called (`kit.core.protocols.call_with`).
        reference: a module, by default the model as it is. names: the engines to be measured.
    """
    call, rows, engines = call_with(inputs), {}, {}
    reference, builder = model if reference is None else reference, _Builder(model, call)
    expected, names = call(reference), dict.fromkeys(("float32", *names))
    why = "" if tensors_of(expected) else "the output holds no tensor to be compared"
    if not why and relative_error(call(reference), expected) > ROUNDING:
        why = "two calls of the model differ: it keeps a state, or draws random numbers"
    if why:
        rows = [{"engine": name, "why not": why} for name in names]
        table = pd.DataFrame(rows, columns=COLUMNS)
        return Choice("float32", builder.build("float32"), table)
    for name in names:
        row = rows[name] = {"engine": name, "why not": ""}
        try:
            engine = builder.build(name)
            row["error"] = relative_error(call(engine), expected)
        except Exception as error:  # what one engine cannot do, another one can: float32 does all
            if name == "float32":
                raise
            row["why not"] = reason_of(error)
            continue
        engines[name] = engine
        if row["error"] > max_error:
            row["why not"] = f"error above {max_error:g}"
    times = measure({name: partial(call, e) for name, e in engines.items()}, seconds, cutoff=3.0)
    base = times["float32"].median
    for name, t in times.items():
        ms = {"ms": 1e3 * t.median, "low": 1e3 * t.low, "high": 1e3 * t.high}
        rows[name] |= {**ms, "speedup": base / t.median}
    fit = {name: engines[name] for name in times if not rows[name]["why not"]}
    best = min(fit, key=lambda name: times[name].median, default="float32")
    if times[best].median * MARGIN > base:
        best = "float32"
    for name in set(engines) - {best}:
        rows[name]["why not"] = rows[name]["why not"] or "slower"
    pays_from = batch_size(call) if best in INTEGER else _pays_from(fit, call)
    return Choice(best, engines[best], pd.DataFrame(rows.values(), columns=COLUMNS), pays_from)


def _pays_from(engines: dict[str, nn.Module], call: Call) -> int | None:
    """The smallest of PROBED_BATCHES above that of `call` from which on integers beat floats."""
    rows, found = batch_size(call), None
    integers = [name for name in engines if name in INTEGER]
    for batch in PROBED_BATCHES:
        if batch <= rows or not integers or len(integers) == len(engines):
            break
        longer = tree_map(partial(_repeated, rows=rows, batch=batch), call)
        try:
            times = measure({name: partial(longer, e) for name, e in engines.items()}, 0.1)
        except Exception:  # the first dimension is no batch
            return None
        fastest = min(times.pop(name).median for name in integers)
        if fastest * MARGIN > min(time.median for time in times.values()):
            break
        found = batch
    return found


def _repeated(x: Tensor, rows: int, batch: int) -> Tensor:
    if not x.ndim or len(x) != rows:
        return x
    return x.repeat(-(-batch // rows), *[1] * (x.ndim - 1))[:batch]
