"""A model with integer weights that runs on the fastest engine of this machine."""

import copy
import sys
import warnings
from dataclasses import dataclass
from os import PathLike

import torch
from torch import nn

from kit import artifact
from kit.core.protocols import Call
from kit.core.weights import copy_model, materialize, weights
from kit.engines import layers
from kit.engines.choice import ENGINES, Choice, batch_size, build_engine, choose_engine
from kit.engines.layers import INPUT_QUANTIZER, calibrate_inputs, cast, dtype_of
from kit.quantization import HALF, FakeQuantize, Format, quantize_weights, quantizers

INT4 = Format(4, granularity="group", group_size=32)
FORMATS = {"int8": Format(8), "int4": INT4, "float16": HALF}
TORCH_NAMES = {"qint8": "int8", "quint8": "int8", "quint4x2": "int4", "half": "float16"}
TORCH_BACKENDS = dict.fromkeys(("x86", "fbgemm", "onednn", "qnnpack"), "torch-int8")
GROWTH = 8  # batches this much larger than the tuned one are warned of


@dataclass(frozen=True)
class QuantizationConfig:
    """How weights are stored, and what computes with them.

    backend: "auto" measures the engines on this machine and takes the fastest; or one of
        kit.engines.ENGINES. Torch's own backends (x86, fbgemm, onednn, qnnpack) mean torch-int8.
    dtype: "int8", "int4" (groups of 32) or "float16"; torch.qint8 and the like are understood.
    per_channel: a scale for each row of a weight; False: one for the whole weight (int8 only).
    max_error: for "auto": the relative error (`kit.engines.choice.relative_error`) that is allowed.
    """

    backend: str = "auto"
    dtype: str | torch.dtype = "int8"
    per_channel: bool = True
    max_error: float = 1e-3

    def __post_init__(self):
        if self.backend not in ("auto", *ENGINES, *TORCH_BACKENDS):
            known = ", ".join(("auto", *ENGINES))
            raise ValueError(f"backend {self.backend!r} is unknown: choose from {known}")
        if self.type_name not in FORMATS:
            known = ", ".join(FORMATS)
            raise ValueError(f"dtype {self.dtype!r} cannot be stored: choose from {known}")
        if not self.max_error > 0:
            raise ValueError(f"max_error={self.max_error} must be above 0: 1e-3 is 30 dB below")

    @property
    def type_name(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return TORCH_NAMES.get(name, name)

    @property
    def format(self) -> Format:
        """The number format of the weights."""
        whole = self.type_name == "int8" and not self.per_channel
        return Format(8, granularity="tensor") if whole else FORMATS[self.type_name]

    @property
    def engine(self) -> str:
        return TORCH_BACKENDS.get(self.backend, self.backend)


DEFAULT = QuantizationConfig()


class QuantizedModel(nn.Module):
    """Inference with a quantized model: called as the original is, outputs without gradients.

    The first call, and the first after a change of the weights, measures the engines on its inputs
    (a few seconds; `tune` does it ahead of time) and keeps the winner in `choice`. Calls that it
    does not take, such as other sizes of a fixed ONNX graph, are computed in float32. `model` is
    the same network in fake quantization: what is saved, evaluated and trained further, and where
    attributes and methods of the original are looked up. Floating inputs and outputs keep the dtype
    of the original; the engines compute in float32 and below.
    """

    def __init__(self, model: nn.Module, config: QuantizationConfig = DEFAULT, dtype=torch.float32):
        super().__init__()
        self.model, self.config, self.dtype = model.eval(), config, dtype
        self.choice: Choice | None = None
        self._floats: nn.Module | None = None  # for calls that the chosen engine does not take
        self._rows, self._limit = 0, sys.maxsize  # the batch that the engine was chosen for
        self._watched, self._built = (), None  # the weights, and their state in the engines

    def forward(self, *args, **kwargs):
        call = Call(args, kwargs)
        if self.dtype != torch.float32:
            return cast(self._run(cast(call, torch.float32)), self.dtype)
        return self._run(call)

    def _run(self, call: Call):
        rows = batch_size(call)
        if self._built is not None and self._built != self._state():
            self.choice = self._floats = self._built = None
        if self.choice is None or (rows and not self._rows):
            self._tune(call)
        if not getattr(self.choice.engine, "takes", lambda call: True)(call):
            return call(self._float_engine())
        if rows >= self._limit:
            self._warn_of_growth(rows)
        return call(self.choice.engine)

    def tune(self, *args, **kwargs) -> Choice:
        """Chooses the engine for a call like this; returns the choice and what was measured.

        Warns if no engine keeps `config.max_error`: then float32 computes with the rounded weights.
        """
        return self._tune(cast(Call(args, kwargs), torch.float32))

    def _tune(self, call: Call) -> Choice:
        name, allowed = self.config.engine, self.config.max_error
        self._rows = batch_size(call)
        if not self._rows:  # there is nothing to measure, and exporters freeze what is empty
            self.choice = Choice("float32", self._float_engine())
        elif name != "auto":
            self.choice = Choice(name, build_engine(self.model, name, call))
        else:
            settings = {"reference": self.reference(), "max_error": allowed}
            self.choice = choose_engine(self.model, call, **settings)
            error = self.choice.table.set_index("engine")["error"][self.choice.name]
            if error > allowed:
                why = f"by {error:.2g} of its power, over max_error={allowed:g}"
                advice = "allow more, or train with prepare_qat_model"
                warnings.warn(f"rounding the weights alone changes the output {why}: {advice}")
        self._limit = GROWTH * self._rows if name == "auto" and self._rows else sys.maxsize
        self._watch()
        return self.choice

    def _watch(self) -> None:
        """Notes which weights the engines were built from."""
        holders = [(module._parameters, module._buffers) for module in self.model.modules()]
        self._watched = [tensors for pair in holders for tensors in pair if tensors]
        self._built = self._state()

    def _state(self) -> int:
        """Changes when a tensor of the model is written to or replaced."""
        found = [t for tensors in self._watched for t in tensors.values() if t is not None]
        return hash(tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in found))

    def _float_engine(self) -> nn.Module:
        if self._floats is None:
            self._floats = build_engine(self.model, "float32", ())
            self._watch()
        return self._floats

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
        """Writes codes, scales and calibrated ranges (kit.artifact); returns the bytes."""
        return artifact.save(self.model, path)

    @classmethod
    def load(cls, path: str | PathLike, model: nn.Module | None = None, config=DEFAULT):
        """The model in a file written by `save`.

        model: an instance of the same architecture, which is not changed; not needed for the kit's
            own models. Raises kit.artifact.ArtifactError if the file is damaged or does not fit.
        """
        dtype = torch.float32 if model is None else dtype_of(model)
        blank = None if model is None else materialize(model).float()
        loaded = artifact.load(path, blank, trainable=True)
        return cls(layers.hook_input_quantizers(loaded), config, dtype)

    def __getattr__(self, name: str):
        own = name.startswith("_") or name in ("model", "parametrizations", INPUT_QUANTIZER)
        if own or name in self._parameters or name in self._modules or name in self._buffers:
            return super().__getattr__(name)
        return getattr(self.model, name)

    def __deepcopy__(self, memo):
        made = type(self)(copy.deepcopy(self.model, memo), self.config, self.dtype)
        if self._built is not None and self._built == self._state():
            made.choice, made._floats = copy.deepcopy((self.choice, self._floats), memo)
            made._rows, made._limit = self._rows, self._limit
            made._watch()
        return made

    def __reduce_ex__(self, protocol):
        advice = "write it with .save(path), and read it with QuantizedModel.load(path, model)"
        raise TypeError(f"a QuantizedModel is not pickled: {advice}")

    def _apply(self, function, recurse=True):
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(function, recurse)

    def _warn_of_growth(self, rows: int) -> None:
        self._limit = sys.maxsize  # once is enough
        chosen = f"{self.choice.name} was chosen for a batch of {self._rows}, this one has {rows}"
        warnings.warn(f"{chosen}: another may be faster, call .tune(inputs) to measure again")

    def extra_repr(self) -> str:
        return f"engine={self.choice.name if self.choice else 'chosen at the first call'}"


def quantize(model: nn.Module, config=DEFAULT, calibration=None) -> QuantizedModel:
    """A quantized copy of a model. Weights that carry fake quantizers keep theirs.

    Every weight of two or more dimensions is stored as `config.dtype`. calibration: batches
    (`kit.core.protocols.call_of`) on which the ranges of the inputs of linear layers and
    convolutions are fixed; without them each batch has its own. Batch norms are folded by the
    engines.
    Raises ValueError if there is nothing to quantize, or weights are complex or not finite.
    """
    copied = copy_model(model).cpu().eval()
    if not quantizers(copied):
        copied = quantize_weights(materialize(copied).float(), config.format)
    if calibration is not None:
        calibrate_inputs(copied.float(), calibration)
    return QuantizedModel(copied.float(), config, dtype_of(model))


def prepare_qat(model: nn.Module, config=DEFAULT, calibration=None) -> nn.Module:
    """A copy to be trained with rounded weights (and inputs, if calibrated), gradients straight
    through; `quantize` makes a QuantizedModel of it with the weights it was trained with."""
    copied = quantize_weights(copy_model(model), config.format)
    if calibration is not None:
        calibrate_inputs(copied, calibration)
    return copied.train(model.training)
