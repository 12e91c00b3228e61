"""A model with integer weights that runs on the fastest engine of this machine."""

import copy
import math
import warnings
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from kit import artifact
from kit.core.protocols import Call
from kit.core.settings import Positive, settings
from kit.core.weights import copy_model, materialize, weights
from kit.engines import layers
from kit.engines.choice import ENGINES, Choice, batch_size, build_engine, choose_engine
from kit.engines.layers import INPUT_QUANTIZER, calibrate_inputs, cast, dtype_of
from kit.quantization import HALF, FakeQuantize, Format, quantize_weights

INT4 = Format(4, granularity="group", group_size=32)
FORMATS = {"int8": Format(8), "int4": INT4, "float16": HALF}
TORCH_NAMES = {"qint8": "int8", "quint8": "int8", "quint4x2": "int4", "half": "float16"}
TORCH_BACKENDS = dict.fromkeys(("x86", "fbgemm", "onednn", "qnnpack"), "torch-int8")
GROWTH = 8  # batches this much larger than the tuned one are warned of


@settings
class QuantizationConfig:
    """How weights are stored, and what computes with them.

    backend: "auto" measures the engines on this machine and takes the fastest; or one of
        kit.engines.ENGINES. Torch's own backends (x86, fbgemm, onednn, qnnpack) mean torch-int8.
    dtype: "int8", "int4" (groups of 32) or "float16"; torch.qint8 and the like are understood.
    per_channel: a scale for each row of a weight; False: one for the whole weight (int8 only).
    max_error: for "auto": the allowed relative error (`kit.engines.choice.relative_error`).
    """

    backend: Literal[("auto", *ENGINES, *TORCH_BACKENDS)] = "auto"
    dtype: Any = "int8"
    per_channel: bool = True
    max_error: Positive = 1e-3

    def __post_init__(self):
        if self.type_name not in FORMATS:
            raise ValueError(f"dtype {self.dtype!r} cannot be stored: choose from {[*FORMATS]}")

    @property
    def engine(self) -> str:
        return TORCH_BACKENDS.get(self.backend, self.backend)

    @property
    def type_name(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return TORCH_NAMES.get(name, name)

    @property
    def format(self) -> Format:
        """The number format of the weights."""
        whole = self.type_name == "int8" and not self.per_channel
        return Format(8, granularity="tensor") if whole else FORMATS[self.type_name]


DEFAULT = QuantizationConfig()


class QuantizedModel(nn.Module):
    """Inference with a quantized model: called as the original is, outputs without gradients.

    The first call, and the first after a change of the weights, measures the engines on its inputs
    (a few seconds; `tune` does it ahead of time) and keeps the winner in `choice`. What that
    refuses, such as another size of a fixed graph, float32 computes. `model` is the same network in
    fake quantization: what is saved, evaluated and trained further, and where other attributes are
    looked up. Floats keep the dtype of the original; engines compute in float32 and below.
    """

    def __init__(self, model: nn.Module, config=DEFAULT, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.config, self.dtype = model.eval(), config, dtype
        self.choice: Choice | None = None
        self._fallback: Choice | None = None  # float32, for calls that the chosen engine refuses
        self._limit = math.inf  # rows from which on a batch is warned of
        self._watched, self._built = [], None  # dicts of tensors, and their state in the engines

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():  # the network itself is: it computes in fake quantization
            args, kwargs = cast((args, kwargs), torch.float32)
            return cast(self.model(*args, **kwargs), self.dtype)
        call = Call(args, kwargs)
        if self.dtype == torch.float32:
            return self._run(call)
        return cast(self._run(cast(call, torch.float32)), self.dtype)

    def _run(self, call: Call):
        rows = batch_size(call)
        if self._built not in (None, self._state()):
            self.choice = self._fallback = None
        if self.choice is None and rows:
            self._tune(call)
        if not rows:
            return call(self._floats())
        if rows >= self._limit:
            self._warn_of_growth(rows)
        try:
            return call(self.choice.engine)
        except Exception:  # float32 does what this engine cannot, or says what is wrong
            return call(self._floats())

    def tune(self, *args, **kwargs) -> Choice:
        """Chooses the engine for a call like this; returns the choice and all measurements.

        Warns if none keeps `config.max_error`: then float32 computes with the rounded weights.
        """
        return self._tune(cast(Call(args, kwargs), torch.float32))

    def _tune(self, call: Call) -> Choice:
        allowed, name = self.config.max_error, self.config.engine
        if name == "auto":
            settings = {"reference": self.reference(), "max_error": allowed}
            self.choice = choose_engine(self.model, call, **settings)
            self._limit = GROWTH * batch_size(call)
            error = self.choice.table.set_index("engine")["error"][self.choice.name]
            if error > allowed:
                what = f"rounding the weights alone changes the output by {error:.2g} of its power"
                hint = "allow more, or train with prepare_qat_model"
                warnings.warn(f"{what}, over max_error={allowed:g}: {hint}")
        else:
            self.choice = Choice(name, build_engine(self.model, name, call))
        self._watch()
        return self.choice

    def _warn_of_growth(self, rows: int) -> None:
        chosen = f"{self.choice.name} was chosen for a batch of {self._limit // GROWTH}"
        hint = "another may be faster, call .tune(inputs) to measure again"
        warnings.warn(f"{chosen}, this one has {rows}: {hint}")
        self._limit = math.inf  # once is enough

    def _watch(self) -> None:
        """Notes the weights that the engines were built from."""
        modules = self.model.modules()
        self._watched = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self._built = self._state()

    def _state(self) -> list[tuple[int, int]]:
        """Changes when a tensor of the model is written to or replaced."""
        tensors = [t for held in self._watched for t in held.values() if t is not None]
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def _floats(self) -> nn.Module:
        if self._fallback is None:
            self._fallback = Choice("float32", build_engine(self.model, "float32", ()))
            self._watch()
        return self._fallback.engine

    @property
    def onnx_engine(self) -> str:
        """The form in which the model is exported: QDQ if its inputs are calibrated."""
        if any(hasattr(module, INPUT_QUANTIZER) for module in self.model.modules()):
            return "onnx-static"
        return "onnx-blocks" if self.config.type_name == "int4" else "onnx-int8"

    def reference(self) -> nn.Module:
        """A float copy of the model before its weights were rounded (after loading: as stored)."""
        model = copy_model(self.model)
        for weight in weights(model):
            if weight.find(FakeQuantize):
                weight.drop(FakeQuantize)
        return layers.float_copy(model)

    def save(self, path: str | PathLike) -> int:
        """Writes codes, scales and calibrated ranges (kit.artifact); returns the file's bytes."""
        return artifact.save(self.model, path)

    @classmethod
    def load(cls, path: str | PathLike, model: nn.Module | None = None, config=DEFAULT):
        """The QuantizedModel in a file written by `save`.

        model: an instance of the same architecture, which is not changed; not needed for the kit's
            own models. Raises kit.artifact.ArtifactError if the file is damaged or does not fit it.
        """
        dtype = torch.float32 if model is None else dtype_of(model)
        blank = None if model is None else materialize(model).float()
        loaded = layers.hook_input_quantizers(artifact.load(path, blank, trainable=True))
        return cls(loaded, config, dtype)

    def __getattr__(self, name: str):
        if name.startswith("_") or name in ("model", "parametrizations", INPUT_QUANTIZER):
            return super().__getattr__(name)
        return getattr(self.model, name)

    def __deepcopy__(self, memo):
        made = type(self)(copy.deepcopy(self.model, memo), self.config, self.dtype)
        if self.choice is not None and self._built == self._state():
            made.choice, made._limit = copy.deepcopy(self.choice, memo), self._limit
            made._watch()
        return made

    def __reduce_ex__(self, protocol):
        raise TypeError("write a QuantizedModel with .save(path), read it with .load(path, model)")

    def _apply(self, function, recurse=True):
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(function, recurse)

    def extra_repr(self) -> str:
        return f"engine={self.choice.name if self.choice else 'chosen at the first call'}"


def quantize(model: nn.Module, config=DEFAULT, calibration=None) -> QuantizedModel:
    """A quantized copy of a model. Weights that carry fake quantizers keep theirs.

    Every weight of two or more dimensions is stored as `config.dtype`. calibration: batches
    (`kit.core.protocols.call_of`) on which the ranges of the inputs of linear layers and
    convolutions are fixed; without them each batch has its own.
    Raises ValueError if there is nothing to quantize, or weights are complex or not finite.
    """
    rounded = any(isinstance(module, FakeQuantize) for module in model.modules())
    copied = (copy_model if rounded else materialize)(model).cpu().eval()
    if not rounded:
        quantize_weights(copied.float(), config.format)
    if calibration is not None:
        calibrate_inputs(copied.float(), calibration)
    return QuantizedModel(copied.float(), config, dtype_of(model))
