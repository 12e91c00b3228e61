"""A model with integer weights that runs on the fastest engine of this machine."""

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kit import artifact
from kit.engines import ENGINES, Choice, build_engine, choose_engine
from kit.engines.layers import calibrate_inputs, float_copy, hook_input_quantizers
from kit.core.weights import bake, named_weights, set_steps, steps_of
from kit.core.weights import copy_model
from kit.quantization import HALF, FakeQuantize, Format, quantize_weights, quantizers

FORMATS = {"int8": Format(8), "int4": Format(4, granularity="group", group_size=32), "float16": HALF}
TORCH_NAMES = {"qint8": "int8", "quint8": "int8", "quint4x2": "int4", "half": "float16"}
TORCH_BACKENDS = dict.fromkeys(("x86", "fbgemm", "onednn", "qnnpack"), "torch-int8")
GROWTH = 8  # batches this much larger than the tuned one are warned of


@dataclass(frozen=True)
class QuantizationConfig:
    """How weights are stored, and what computes with them.

    backend: "auto" measures the engines on this machine and takes the fastest; or one of kit.engines.ENGINES. The
        names of torch's own backends (x86, fbgemm, onednn, qnnpack) mean the engines with those kernels.
    dtype: "int8", "int4" (groups of 32) or "float16"; torch.qint8 and the like are understood.
    per_channel: a scale for each row of a weight; False: one for the whole weight (int8 only).
    max_error: for "auto": the mean squared difference from the float outputs, over their mean square, allowed.
    """

    backend: str = "auto"
    dtype: str | torch.dtype = "int8"
    per_channel: bool = True
    max_error: float = 1e-3

    def __post_init__(self):
        if self.backend not in ("auto", *ENGINES, *TORCH_BACKENDS):
            raise ValueError(f"backend {self.backend!r} is unknown: choose from auto, {', '.join(ENGINES)}")
        if self.type_name not in FORMATS:
            raise ValueError(f"dtype {self.dtype!r} cannot be stored: choose one of {', '.join(FORMATS)}")
        if not self.max_error > 0:
            raise ValueError(f"max_error={self.max_error} must be above 0: 1e-3 is 30 dB under the signal")

    @property
    def type_name(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return TORCH_NAMES.get(name, name)

    @property
    def format(self) -> Format:
        """The number format of the weights."""
        tensor = self.type_name == "int8" and not self.per_channel
        return Format(8, granularity="tensor") if tensor else FORMATS[self.type_name]

    @property
    def engine(self) -> str:
        return TORCH_BACKENDS.get(self.backend, self.backend)


class QuantizedModel(nn.Module):
    """Inference with a quantized model: called as the original is, outputs without gradients.

    The first call measures the engines on its inputs (a few seconds; `tune` does it ahead of time) and
    keeps the winner in `choice`. `model` is the same network in fake quantization: what is saved,
    evaluated and trained further. Floating inputs and outputs keep the dtype of the original model; the
    engines compute in float32 and below.
    """

    def __init__(self, model: nn.Module, config: QuantizationConfig = QuantizationConfig(),
                 dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.config, self.dtype = model.eval(), config, dtype
        self.choice: Choice | None = None
        self._rows, self._limit = 0, 0

    def forward(self, *inputs: Tensor):
        if self.choice is None:
            self.tune(*inputs)
        elif inputs[0].shape[0] >= self._limit:
            self._warn_of_growth(len(inputs[0]))
        if self.dtype == torch.float32:
            return self.choice.engine.forward(*inputs)
        return self._cast(self.choice.engine(*self._cast(inputs, torch.float32)), self.dtype)

    def tune(self, *inputs: Tensor) -> Choice:
        """Chooses the engine for inputs like these; returns the choice with the table of what was measured.

        Warns if no engine keeps `config.max_error`: then float32 computes with the rounded weights.
        """
        inputs = self._cast(inputs, torch.float32)
        if self.config.engine != "auto":
            engine = build_engine(self.model, self.config.engine, inputs)
            self.choice = Choice(self.config.engine, engine)
        else:
            allowed = self.config.max_error
            self.choice = choose_engine(self.model, inputs, reference=self.reference(), max_error=allowed)
            error = self.choice.table.set_index("engine")["error"][self.choice.name]
            if error > allowed:
                warnings.warn(f"rounding the weights alone changes the output by {error:.2g} of its power, "
                              f"over max_error={allowed:g}: allow more, or train with prepare_qat_model")
        self._rows = len(inputs[0])
        self._limit = GROWTH * self._rows if self.config.backend == "auto" else sys.maxsize
        return self.choice

    def reference(self) -> nn.Module:
        """A float copy of the model before its weights were rounded (after loading: as they were stored)."""
        model = copy_model(self.model)
        for _, module, attribute in list(named_weights(model)):
            steps = steps_of(module, attribute)
            kept = [step for step in steps if not isinstance(step, FakeQuantize)]
            if len(kept) < len(steps):
                set_steps(model, module, attribute, kept)
        return float_copy(model)

    def save(self, path: str | PathLike) -> int:
        """Writes codes, scales and calibrated ranges (kit.artifact); returns the bytes of the file."""
        return artifact.save(self.model, path)

    @classmethod
    def load(cls, path: str | PathLike, model: nn.Module | None = None,
             config: QuantizationConfig = QuantizationConfig()) -> "QuantizedModel":
        """The model in a file written by `save`.

        model: an instance of the same architecture, which is not changed; not needed for the kit's own
        models. Raises kit.artifact.ArtifactError if the file is damaged or does not fit the model.
        """
        dtype = dtype_of(model) if model is not None else torch.float32
        blank = None if model is None else bake(copy_model(model)).float()
        return cls(hook_input_quantizers(artifact.load(path, blank, trainable=True)), config, dtype)

    def _cast(self, values, dtype: torch.dtype):
        def cast(x):
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return pytree.tree_map(cast, values)

    def _warn_of_growth(self, rows: int) -> None:
        self._limit = sys.maxsize  # once is enough
        warnings.warn(f"{self.choice.name} was chosen for a batch of {self._rows}, this one has {rows}: "
                      "another engine may be faster, call .tune(inputs) to measure again")

    def extra_repr(self) -> str:
        return f"engine={self.choice.name if self.choice else 'chosen at the first call'}"


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def quantize(model: nn.Module, config: QuantizationConfig = QuantizationConfig(),
             calibration: Iterable | None = None) -> QuantizedModel:
    """A quantized copy of a model. Weights that carry fake quantizers, after training with them, keep theirs.

    Every weight of two or more dimensions is stored as `config.dtype`. calibration: batches (inputs, or
    tuples that begin with them) on which the ranges of the inputs of linear layers and convolutions are
    fixed; without them each batch has its own. Batch norms are folded by the engines, which leaves codes
    a row as they are. Raises ValueError if there is nothing to quantize, or weights are complex or not
    finite.
    """
    copy = copy_model(model).cpu().eval()
    copy = (copy if quantizers(copy) else bake(copy)).float()
    if not quantizers(copy):
        quantize_weights(copy, config.format)
    if calibration is not None:
        calibrate_inputs(copy, (_input_of(batch) for batch in calibration))
    return QuantizedModel(copy, config, dtype_of(model))


def _input_of(batch) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    return x if not x.is_floating_point() else x.float()


def prepare_qat(model: nn.Module, config: QuantizationConfig = QuantizationConfig(),
                calibration: Iterable | None = None) -> nn.Module:
    """A copy to be trained with rounded weights (and inputs, if calibrated), gradients straight through.

    `quantize` turns it into a QuantizedModel with the weights it was trained with. Errors as for `quantize`.
    """
    copy = quantize_weights(copy_model(model), config.format)
    if calibration is not None:
        calibrate_inputs(copy, (_input_of(batch) for batch in calibration))
    return copy.train(model.training)
