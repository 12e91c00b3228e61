"""Any trained nn.Module quantized, pruned, distilled, exported and measured, without a change to
it."""

import html
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from kit import artifact
from kit.core.measurement import Latency, measure
from kit.core.protocols import Call, call_with
from kit.core.weights import copy_model
from kit.distillation import DistillationTrainer
from kit.engines.choice import INTEGER, Choice, batch_size, flat, relative_error
from kit.engines.layers import dtype_of, float_copy
from kit.engines.quantized import QuantizationConfig, QuantizedModel, prepare_qat, quantize
from kit.models import parameter_count
from kit.pruning import MagnitudePruner, prune_channels
from kit.training import TrainConfig, train
from kit.training.losses import training_loss

STRUCTURED = {"l1": "l1", "l2": "l2", "l1_structured": "l1", "ln_structured": "l2"}
UNSTRUCTURED = {"magnitude": "magnitude", "l1_unstructured": "magnitude"}
UNSTRUCTURED |= {"random": "random", "random_unstructured": "random"}
CONVOLUTION = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class PruningConfig:
    """How much goes, and what.

    amount: the share of outputs of each layer (structured) or of weights (unstructured), in [0, 1).
    method: structured "l1", "l2"; unstructured "magnitude", "random". Torch's names are understood.
    dim: 0 names the outputs of a layer, 1 its inputs; a unit that goes takes both with it, so that
    the two are one choice.
    """

    amount: float = 0.3
    method: str = "l1"
    dim: int = 0

    def __post_init__(self):
        if not 0 <= self.amount < 1:
            raise ValueError(f"amount={self.amount}, the share to prune, must be in [0, 1)")
        if self.method not in (*STRUCTURED, *UNSTRUCTURED):
            known = ", ".join((*STRUCTURED, *UNSTRUCTURED))
            raise ValueError(f"method {self.method!r} is unknown: choose one of {known}")
        if self.dim not in (0, 1):
            raise ValueError(f"dim={self.dim} must be 0 (outputs) or 1 (inputs)")


@dataclass(frozen=True)
class DistillationConfig:
    """alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy, at T = temperature (Hinton et
    al. 2015)."""

    temperature: float = 3.0
    alpha: float = 0.5
    epochs: float = 10
    learning_rate: float = 1e-4

    def __post_init__(self):
        if not (self.epochs > 0 and self.learning_rate > 0):
            values = f"epochs={self.epochs}, learning_rate={self.learning_rate}"
            raise ValueError(f"{values}: both must exceed 0")


@dataclass(frozen=True, repr=False)
class OptimizationResult:
    """Before and after, all measured. Prints as a table, and shows as one in a notebook."""

    bytes_before: int  # of the kit's file of the model as it was, every tensor dense
    bytes_after: int  # of the optimized model's file
    latency_before: Latency  # seconds a call
    latency_after: Latency
    batch_size: int
    threads: int
    mse: float  # mean squared difference of the outputs
    relative_error: float  # the same over the mean square of the original's
    cosine: float  # of the two outputs as vectors
    sparsity: float  # zeros among the optimized model's weights
    parameters_before: int
    parameters_after: int
    engine: str  # what computes the optimized model
    layers: pd.DataFrame  # a row a tensor: shapes, bits, bytes before and after
    notes: tuple[str, ...] = ()

    @property
    def size_reduction_percent(self) -> float:
        return 100 * (1 - self.bytes_after / self.bytes_before)

    @property
    def compression_ratio(self) -> float:
        return self.bytes_before / self.bytes_after

    @property
    def latency_reduction_percent(self) -> float:
        """Of the median; negative when the optimized model is slower."""
        return 100 * (1 - 1 / self.speedup)

    @property
    def speedup(self) -> float:
        return self.latency_before.median / self.latency_after.median

    def table(self) -> pd.DataFrame:
        """What, before, after, change: all as text."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        fewer = 1 - self.parameters_after / self.parameters_before
        rows = [
            ("file, bytes", f"{self.bytes_before:,}", f"{self.bytes_after:,}",
             f"{self.compression_ratio:.2f}x smaller"),
            (f"latency, batch {self.batch_size}, {threads}", _spread(self.latency_before),
             _spread(self.latency_after), f"{self.speedup:.2f}x as fast"),
            ("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}",
             f"{fewer:.1%} fewer" if fewer else ""),
            ("zeros among weights", "", f"{self.sparsity:.1%}", ""),
            ("output: mean squared error", "", f"{self.mse:.3g}",
             f"{self.relative_error:.2g} of the signal"),
            ("output: cosine similarity", "", f"{self.cosine:.6f}", ""),
            ("computed by", "float32 in torch", self.engine, ""),
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["", "before", "after", "change"])

    def __str__(self):
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.table().to_string(index=False, justify="left"), *notes])

    __repr__ = __str__

    def _repr_html_(self):
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return self.table().to_html(index=False, border=0) + notes


def _spread(time: Latency) -> str:
    return f"{1e3 * time.median:.3g} ms ({1e3 * time.low:.3g} to {1e3 * time.high:.3g})"


INT8 = QuantizationConfig()


class ProductionModelOptimizer:
    """Compression of any trained module; every method returns a new model and changes no argument.

    `inputs` are how the model is called (`kit.core.protocols.call_with`: a tensor, a tuple of
    arguments, a mapping of keyword arguments); where they are left out they are made up from the
    first layer. Training runs on `device`; quantized models run on the CPU.
    """

    def __init__(self, device: str = "cpu", log: bool = False):
        self.device, self.log = torch.device(device), log

    def quantize_dynamic(self, model: nn.Module, config=INT8) -> QuantizedModel:
        """Weights in integers, inputs of layers in the range of each batch.

        Raises ValueError if there is nothing to quantize.
        """
        return quantize(model, config)

    def quantize_static(
        self, model: nn.Module, calibration: Iterable, config=INT8
    ) -> QuantizedModel:
        """Weights in integers, inputs of Linear and convolutions in ranges found on the batches
        `calibration`.

        Raises ValueError if there is no batch or nothing to quantize.
        """
        return quantize(model, config, calibration)

    def prepare_qat_model(self, model: nn.Module, config=INT8, calibration=None) -> nn.Module:
        """A copy to train with rounded weights (and inputs, if calibrated)."""
        return prepare_qat(model, config, calibration).to(self.device)

    def prune_structured(self, model: nn.Module, config=PruningConfig(), inputs=None) -> nn.Module:
        """A smaller dense copy without the `config.amount` least important outputs of each layer.

        Raises ValueError for an unstructured method, or if the layers cannot be taken apart.
        """
        importance = _method(config, STRUCTURED)
        return prune_channels(model, _call(model, inputs), config.amount, importance=importance)

    def prune_unstructured(self, model: nn.Module, config=PruningConfig(method="magnitude")):
        """A copy whose `config.amount` lowest weights of each tensor are zero, in training too.

        Raises ValueError for a structured method, or if no weight has two or more dimensions.
        """
        score = _method(config, UNSTRUCTURED)
        return MagnitudePruner(copy_model(model), score=score).prune(config.amount)

    def distill_knowledge(
        self,
        teacher_model: nn.Module,
        student_model: nn.Module,
        train_loader,
        config=DistillationConfig(),
    ) -> nn.Module:
        """A copy of the student trained to follow the teacher and the labels; in evaluation mode.

        train_loader: batches (`kit.core.protocols.call_of`), of known length.
        Raises ValueError for settings out of range and models of different classes.
        """
        teacher, student = (copy_model(m).to(self.device) for m in (teacher_model, student_model))
        settings = {"temperature": config.temperature, "alpha": config.alpha, "feature_weight": 0}
        trainer = DistillationTrainer(teacher.eval(), student, **settings)
        schedule = _schedule(train_loader, config.epochs, config.learning_rate)
        trainer.fit(train_loader, schedule, log=self.log)
        return student.eval()

    def retrain(
        self,
        model: nn.Module,
        train_loader,
        epochs=1,
        learning_rate=1e-3,
        loss: Callable | None = None,
    ) -> nn.Module:
        """A copy trained further; masks and fake quantizers stay.

        loss(model, batch): by default that of the next token for language models, else
        cross-entropy.
        """
        copied = copy_model(model).to(self.device)
        schedule = _schedule(train_loader, epochs, learning_rate)
        train(copied, train_loader, schedule, loss=loss or training_loss(copied), log=self.log)
        return copied.eval()

    def optimize_full_pipeline(
        self, model: nn.Module, prune_amount=0.3, use_quantization=True, use_pruning=True, *,
        inputs=None, train_loader=None, epochs=1, calibration=None, loss=None, config=INT8,
    ) -> tuple[nn.Module, OptimizationResult]:  # fmt: skip
        """Prune, retrain (with a `train_loader`), quantize (statically with `calibration`),
        measure.

        Units are removed where the model can be taken apart; where it cannot, single weights are
        masked instead, and the result says so.
        """
        call, notes, optimized = _call(model, inputs), [], model
        if use_pruning and prune_amount:
            optimized, notes = self._prune(model, PruningConfig(prune_amount), call)
            if train_loader is not None:
                optimized = self.retrain(optimized, train_loader, epochs, loss=loss)
            else:
                notes.append("pruned without retraining: pass train_loader= to win back its cost")
        if use_quantization:
            optimized = quantize(optimized, config, calibration)
            call(optimized.tune)
        return optimized, compare_models(model, optimized, call, notes=tuple(notes))

    def _prune(self, model: nn.Module, config: PruningConfig, call: Call):
        try:
            return self.prune_structured(model, config, call), []
        except ValueError as reason:
            pruned = self.prune_unstructured(model, PruningConfig(config.amount, "magnitude"))
            return pruned, [f"weights were masked, no units removed: {reason}"]

    def measure(self, original: nn.Module, optimized: nn.Module, inputs=None) -> OptimizationResult:
        """Both models side by side: file, latency, outputs, layers."""
        return compare_models(original, optimized, _call(original, inputs))

    def export_onnx(self, model: nn.Module, path: str | PathLike, inputs=None) -> dict:
        """Writes an .onnx file and checks it in ONNX Runtime against torch (`kit.engines.graph`).

        In floats, or in integers for a QuantizedModel: QDQ if its inputs are calibrated.
        Raises ValueError if the model cannot be exported.
        """
        from kit.engines.graph import export_onnx

        call = _call(model, inputs)
        if isinstance(model, QuantizedModel):
            return export_onnx(model.model, path, call, model.onnx_engine)
        return export_onnx(copy_model(model).float().eval(), path, call)


def _method(config: PruningConfig, known: dict[str, str]) -> str:
    if config.method not in known:
        what = "weights" if known is STRUCTURED else "units"
        raise ValueError(f"method {config.method!r} removes {what}: choose from {', '.join(known)}")
    return known[config.method]


def _schedule(loader, epochs: float, learning_rate: float) -> TrainConfig:
    return TrainConfig(steps=max(1, round(epochs * len(loader))), lr=learning_rate)


def quick_quantize(model: nn.Module, inputs=None, **settings) -> QuantizedModel:
    """The model with INT8 weights on the fastest engine; `settings` are those of
    QuantizationConfig.

    The engine is measured on `inputs` if given, else on those of the first call.
    """
    quantized = quantize(model, QuantizationConfig(**settings))
    if inputs is not None:
        call_with(inputs)(quantized.tune)
    return quantized


def quick_optimize(model: nn.Module, inputs=None, prune_amount: float = 0.3, **arguments):
    """(model, result) of ProductionModelOptimizer().optimize_full_pipeline: pruned and
    quantized."""
    optimize = ProductionModelOptimizer().optimize_full_pipeline
    return optimize(model, prune_amount, inputs=inputs, **arguments)


def compare_models(
    original: nn.Module, optimized: nn.Module, inputs, *, seconds=1.0, notes: tuple[str, ...] = ()
) -> OptimizationResult:
    """Measures both models on the same inputs, in evaluation mode and in turns of a few
    milliseconds.

    optimized: a QuantizedModel, or any module; bytes are those that `kit.artifact.save` writes.
    """
    call, before, after = call_with(inputs), *(copy_model(m).eval() for m in (original, optimized))
    with torch.inference_mode():
        expected, outputs = call(before), call(after)
        times = measure({"before": lambda: call(before), "after": lambda: call(after)}, seconds)
    y, r = flat(outputs).double(), flat(expected).double()
    engine, stored = "float32 in torch", after
    if isinstance(after, QuantizedModel):
        engine, stored = after.choice.name, after.model
        notes = (*notes, *_speed_notes(after.choice, batch_size(call)))
    layers, sizes = _layers(before, stored)
    weights = float_copy(stored)
    return OptimizationResult(
        *sizes, times["before"], times["after"], batch_size(call), torch.get_num_threads(),
        (y - r).square().mean().item(), relative_error(outputs, expected),
        F.cosine_similarity(y, r, dim=0).item(), _sparsity(weights),
        parameter_count(before), parameter_count(weights), engine, layers, notes,
    )  # fmt: skip


def _layers(before: nn.Module, after: nn.Module) -> tuple[pd.DataFrame, tuple[int, int]]:
    """A row a tensor, and the bytes of the two files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.kit"
        small, old = artifact.save(before, path, layouts=("dense",)), artifact.describe(path)
        sizes, new = (small, artifact.save(after, path)), artifact.describe(path)
    table = old.merge(new, on="tensor", how="outer", suffixes=("_before", ""), sort=False)
    both = [name + part for name in ("shape", "bits", "bytes") for part in ("_before", "")]
    return table[["tensor", *both]], sizes


def _sparsity(model: nn.Module) -> float:
    weights = [p for p in model.parameters() if p.ndim >= 2]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def _speed_notes(choice: Choice, rows: int) -> list[str]:
    """Says when integers do not pay at this batch size, and where they would."""
    if choice.table is None or choice.name in INTEGER:
        return []
    reasons = choice.table.set_index("engine")["why not"]
    reasons = reasons[reasons.index.isin(INTEGER)]
    if not reasons.isin(["", "slower"]).any():
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        return [f"computed in floats, since no integer engine can be used ({why})"]
    batch = choice.pays_from
    where = f"they are from a batch of {batch} on" if batch else "nor are they at larger ones"
    return [
        f"integers are not faster than {choice.name} at a batch of {rows}; {where}, measured here"
    ]


def _call(model: nn.Module, inputs) -> Call:
    return call_with(example_inputs(model) if inputs is None else inputs)


def example_inputs(model: nn.Module, batch: int = 16) -> tuple[torch.Tensor, ...]:
    """Random inputs that the model accepts, made from its first layer: normal values, or tokens.

    Raises ValueError if no guess fits; then give inputs.
    """
    kinds = (nn.Linear, nn.Embedding, nn.RNNBase, CONVOLUTION)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    generator, probe = torch.Generator().manual_seed(0), copy_model(model).eval()
    for shape in _guesses(first, batch):
        if isinstance(first, nn.Embedding):
            x = torch.randint(0, first.num_embeddings, shape, generator=generator)
        else:
            x = torch.randn(shape, generator=generator).to(dtype_of(model))
        try:
            with torch.no_grad():
                probe(x)
            return (x,)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
    name = type(model).__name__
    raise ValueError(f"no input can be guessed for {name}: pass inputs=, a batch it accepts")


def _guesses(first: nn.Module | None, batch: int) -> list[tuple[int, ...]]:
    if isinstance(first, nn.Linear):
        return [(batch, first.in_features), (batch, 16, first.in_features)]
    if isinstance(first, nn.Embedding):
        return [(batch, 32), (batch, 8), (batch,)]
    if isinstance(first, nn.RNNBase):
        return [(batch, 16, first.input_size), (16, batch, first.input_size)]
    if isinstance(first, CONVOLUTION):
        sizes = (8, 28, 32, 64, 96, 128, 224)
        return [(batch, first.in_channels, *[size] * (first.weight.ndim - 2)) for size in sizes]
    return []
