"""A model with integer weights that runs on the fastest engine of this machine."""

import copy
import math
import warnings
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from kit import artifact
from kit.core.measurement import relative_error
from kit.core.protocols import Call, tensors_of, tree_map
from kit.core.settings import Positive, settings
from kit.core.steps import without_cast
from kit.core.weights import copy_model, materialize, weights
from kit.engines import layers
from kit.engines.choice import ENGINES, Choice, batch_size, build_engine, choose_engine, opaque
from kit.engines.layers import INPUT_QUANTIZER, calibrate_inputs, cast, copy_of, dtype_of
from kit.quantization import HALF, FakeQuantize, Format, quantize_weights

GROUPS = {"granularity": "group", "group_size": 32}
FORMATS = {"int4": Format(4, **GROUPS), "int8": Format(8), "int8-groups": Format(8, **GROUPS)}
FORMATS |= {"float16": HALF}
SAMPLES = 8  # values of each tensor that are compared at every call
TORCH_NAMES = {"qint8": "int8", "quint8": "int8", "quint4x2": "int4", "half": "float16"}
TORCH_BACKENDS = dict.fromkeys(("x86", "fbgemm", "onednn", "qnnpack"), "torch-int8")
GROWTH = 8  # batches this much larger than the tuned one are warned of


@settings
class QuantizationConfig:
    """How weights are stored, and what computes with them.

    backend: "auto" measures the engines on this machine and takes the fastest; or one of
        kit.engines.ENGINES. Torch's own backends (x86, fbgemm, onednn, qnnpack) mean torch-int8.
    dtype: "int4" and "int8-groups" (groups of 32), "int8" or "float16"; torch.qint8 and the like
        are understood.
    per_channel: a scale for each row of a weight; False: one for the whole weight (int8 only).
    max_error: for "auto": the allowed relative error (`kit.core.measurement.relative_error`).
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
    refuses, such as another size of a fixed graph or a call with a cache, float32 computes. `model`
    is the same network in fake quantization: what is saved, evaluated and trained further, and
    where other attributes are looked up. Floats keep the dtype of the original; engines compute in
    float32 and below. A change through `.data`, which torch does not count, is seen in 8 values of
    each tensor (to read all takes as long as a call): after one of single entries, call `tune`.
    """

    def __init__(self, model: nn.Module, config=DEFAULT, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.settings, self.dtype = model.eval(), config, dtype
        self.choice: Choice | None = None
        self._fallback: Choice | None = None  # float32, for calls that the chosen engine refuses
        self._limit = math.inf  # rows from which on a batch is warned of
        self._watched, self._samples = [], []  # dicts of modules and tensors, and their values
        self._built = None  # the state of both in the engines

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
        if not rows or opaque(call):  # nothing to measure, or what a call would change
            return call(self._floats())
        if self.choice is None:
            self._tune(call)
        if rows >= self._limit:
            self._warn_of_growth(rows)
        strict = self.choice.name.startswith("onnx-")  # it makes numbers of NaN, and of index -1
        try:
            if strict and not all(map(_is_ordinary, tensors_of(call))):
                return call(self._floats())
            return call(self.choice.engine)
        except Exception:  # float32 does what this engine cannot, or says what is wrong
            return call(self._floats())

    def tune(self, *args, **kwargs) -> Choice:
        """Chooses the engine for a call like this; returns the choice and all measurements.

        Warns if none keeps `config.max_error`: then float32 computes with the rounded weights.
        """
        call = cast(Call(args, kwargs), torch.float32)
        if found := opaque(call):
            raise ValueError(f"a call with a {found} cannot be repeated: tune with one without it")
        if not batch_size(call):
            raise ValueError("an empty batch cannot be measured: tune with one row at least")
        return self._tune(call)

    def _tune(self, call: Call) -> Choice:
        allowed, name = self.settings.max_error, self.settings.engine
        call = tree_map(torch.Tensor.clone, call)
        if name == "auto":
            reference = self.reference()
            arguments = {"reference": reference, "max_error": allowed}
            self.choice = choose_engine(self.model, call, **arguments)
            self._limit = GROWTH * batch_size(call)
            error = self.choice.table.set_index("engine")["error"][self.choice.name]
            if error > allowed:
                what = f"rounding the weights alone changes the output by {error:.2g} of its power"
                hint = f"allow more, {self._finer(reference, call)}or train with prepare_qat_model"
                warnings.warn(f"{what}, over max_error={allowed:g}: {hint}")
        else:
            self.choice = Choice(name, build_engine(self.model, name, call))
        self._watch()
        return self.choice

    @torch.no_grad()
    def _finer(self, reference: nn.Module, call: Call) -> str:
        """The next format that keeps max_error, for a hint."""
        names, expected = list(FORMATS), call(reference)
        for name in names[names.index(self.settings.type_name) + 1 :]:
            error = relative_error(call(quantize_weights(reference, FORMATS[name])), expected)
            if error <= self.settings.max_error:
                return f"store {name!r} ({error:.2g}), "
        return ""

    def _warn_of_growth(self, rows: int) -> None:
        chosen = f"{self.choice.name} was chosen for a batch of {self._limit // GROWTH}"
        hint = "another may be faster, call .tune(inputs) to measure again"
        warnings.warn(f"{chosen}, this one has {rows}: {hint}")
        self._limit = math.inf  # once is enough

    def _watch(self) -> None:
        """Notes the weights that the engines were built from."""
        parts = [(m._modules, m._parameters, m._buffers) for m in self.model.modules()]
        self._watched = [held for part in parts for held in part if held]
        found = [x for held in self._watched for x in held.values() if isinstance(x, torch.Tensor)]
        self._samples = [_sample(x) for x in found if x.numel() and x.layout == torch.strided]
        self._built = self._state()

    def _state(self) -> tuple[list, list[bytes]]:
        """Changes when a module or tensor of the model is replaced, or a tensor written to."""
        held = [value for held in self._watched for value in held.values() if value is not None]
        tensors = [x for x in held if isinstance(x, torch.Tensor) and x.layout == torch.strided]
        marks = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]
        return [*map(id, held), *marks], [sample.tobytes() for sample in self._samples]

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
        return "onnx-int8" if self.settings.type_name == "int8" else "onnx-blocks"

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
        made = type(self)(copy_model(self.model), self.settings, self.dtype)
        if self.choice is not None and self._built == self._state():
            made.choice, made._limit = copy.deepcopy(self.choice, memo), self._limit
            made._watch()
        return made

    def __reduce_ex__(self, protocol):
        raise TypeError("write a QuantizedModel with .save(path), read it with .load(path, model)")

    def _apply(self, function, recurse=True):
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(without_cast(function), recurse)

    def extra_repr(self) -> str:
        return f"engine={self.choice.name if self.choice else 'chosen at the first call'}"


def _is_ordinary(tensor: torch.Tensor) -> bool:
    """No NaN, infinity or negative index: asked at every call, so by one sum, which is fast."""
    if tensor.is_floating_point():
        return math.isfinite(tensor.sum())
    return tensor.dtype == torch.bool or not tensor.numel() or bool(tensor.min() >= 0)


def _sample(tensor: torch.Tensor):
    """Some values of a tensor, as an array that shares its memory."""
    flat = tensor.detach().as_strided(
        (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0
    )
    return flat[:: max(1, len(flat) // SAMPLES)].numpy()


def quantize(model: nn.Module, config=DEFAULT, calibration=None) -> QuantizedModel:
    """A quantized copy of a model. Weights that carry fake quantizers keep theirs.

    Every weight of two or more dimensions is stored as `config.dtype`. calibration: batches
    (`kit.core.protocols.call_of`) on which the ranges of the inputs of linear layers and
    convolutions are fixed; without them each batch has its own.
    Raises ValueError if there is nothing to quantize, or weights are complex or not finite.
    """
    rounded = any(isinstance(module, FakeQuantize) for module in model.modules())
    copied = copy_of(model).cpu().eval()
    if not rounded:
        copied = quantize_weights(materialize(copied).float(), config.format)
    if calibration is not None:
        calibrate_inputs(copied.float(), calibration)
    return QuantizedModel(copied.float(), config, dtype_of(model))
