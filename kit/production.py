"""Any trained nn.Module quantized, pruned, distilled, exported and measured, and left as it was."""

import html
import tempfile
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from kit import artifact
from kit.core.measurement import Latency, flat, measure, relative_error
from kit.core.protocols import Call, call_with, pick_device, tensors_of
from kit.core.settings import BelowOne, Positive, Share, settings
from kit.core.weights import materialize
from kit.distillation import DistillationTrainer
from kit.engines.choice import INTEGER, Choice, batch_size
from kit.engines.layers import calibrate_inputs, copy_of, dtype_of, float_copy, unwrapped
from kit.engines.quantized import DEFAULT, QuantizationConfig, QuantizedModel, quantize
from kit.models import parameter_count
from kit.pruning import MagnitudePruner, prune_channels
from kit.quantization import quantize_weights
from kit.training import TrainConfig, steps_in, train
from kit.training.losses import training_loss

STRUCTURED = {"l1": "l1", "l2": "l2", "l1_structured": "l1", "ln_structured": "l2"}
UNSTRUCTURED = {"magnitude": "magnitude", "l1_unstructured": "magnitude"}
UNSTRUCTURED |= {"random": "random", "random_unstructured": "random"}
WIDE = 0.5  # between the quartiles of a latency, of its median
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@settings
class PruningConfig:
    """How much goes, and what.

    amount: the share of outputs of each layer (structured) or of weights (unstructured), in [0, 1).
    method: structured "l1", "l2"; unstructured "magnitude", "random". Torch's names are understood.
    dim: 0 names a layer's outputs, 1 its inputs; a unit that goes takes both: the two are one.
    """

    amount: BelowOne = 0.3
    method: Literal[(*STRUCTURED, *UNSTRUCTURED)] = "l1"
    dim: Literal[0, 1] = 0

    def score(self, known: dict[str, str], does: str) -> str:
        """The method's name in the kit. Raises ValueError if it is not among the known."""
        if self.method not in known:
            raise ValueError(f"method {self.method!r} {does}: choose from {', '.join(known)}")
        return known[self.method]


WEIGHTS = PruningConfig(method="magnitude")


@settings
class DistillationConfig:
    """alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy, at temperature T."""

    temperature: Positive = 3.0
    alpha: Share = 0.5
    epochs: Positive = 10
    learning_rate: Positive = 1e-4


@dataclass(frozen=True, repr=False)
class OptimizationResult:
    """Before and after, all measured. Prints as a table, and shows as one in a notebook."""

    bytes_before: int  # of the kit's file of the model as it was, every tensor dense in its dtype
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
        times = [
            f"{1e3 * t.median:.3g} ms ({1e3 * t.low:.3g} to {1e3 * t.high:.3g})"
            for t in (self.latency_before, self.latency_after)
        ]
        ratio, of_signal = f"{self.compression_ratio:.2f}x smaller", f"{self.relative_error:.2g}"
        faster = f"{self.speedup:.2f}x as fast"
        fewer = f"{1 - self.parameters_after / self.parameters_before:.1%} fewer"
        rows = [
            ("file, bytes", f"{self.bytes_before:,}", f"{self.bytes_after:,}", ratio),
            (f"latency, batch {self.batch_size}, {threads}", *times, faster),
            ("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}", fewer),
            ("zeros among weights", "", f"{self.sparsity:.1%}", ""),
            ("output: mean squared error", "", f"{self.mse:.3g}", f"{of_signal} of the signal"),
            ("output: cosine similarity", "", f"{self.cosine:.6f}", ""),
            ("computed by", "float32 in torch", self.engine, ""),
        ]
        return pd.DataFrame(rows, columns=["", "before", "after", "change"])

    def __repr__(self):
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.table().to_string(index=False, justify="left"), *notes])

    def _repr_html_(self):
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return self.table().to_html(index=False, border=0) + notes


class ProductionModelOptimizer:
    """Compression of any trained module: methods return a new model and leave theirs as it was.

    `inputs` are how the model is called (`kit.core.protocols.call_with`: a tensor, a tuple of
    arguments, a mapping of keyword arguments), made up from the first layer if left out; a
    `calibration` is an iterable of batches, a `train_loader` one of known length
    (`kit.core.protocols.call_of`). Training runs on `device`; quantized models run on the CPU.
    """

    def __init__(self, device: str = "cpu", log: bool = False):
        self.device, self.log = pick_device(device), log

    def quantize_dynamic(self, model: nn.Module, config=DEFAULT) -> QuantizedModel:
        """Weights in integers, inputs of layers in the range of each batch (see `quantize`)."""
        return quantize(model, config)

    def quantize_static(self, model: nn.Module, calibration, config=DEFAULT) -> QuantizedModel:
        """Weights in integers, inputs of Linear and convolutions in ranges of the calibration."""
        return quantize(model, config, calibration)

    def prepare_qat_model(self, model: nn.Module, config=DEFAULT, calibration=None) -> nn.Module:
        """A copy to train with rounded weights (and inputs, if calibrated), gradients straight
        through; `quantize_dynamic` keeps the weights that it is trained to."""
        copied = quantize_weights(copy_of(model), config.format)
        if calibration is not None:
            calibrate_inputs(copied, calibration)
        return copied.train(model.training).to(self.device)

    def prune_structured(self, model: nn.Module, config=PruningConfig(), inputs=None) -> nn.Module:
        """A smaller dense copy without the `config.amount` least important outputs of each layer.

        Raises ValueError for an unstructured method, or if the layers cannot be taken apart.
        """
        importance = config.score(STRUCTURED, "removes weights")
        inner = copy_of(model)
        return prune_channels(inner, _call(model, inputs), config.amount, importance=importance)

    def prune_unstructured(self, model: nn.Module, config=WEIGHTS) -> nn.Module:
        """A copy whose `config.amount` lowest weights of each tensor are and remain zero.

        Raises ValueError for a structured method, or without weights of two or more dimensions.
        """
        score = config.score(UNSTRUCTURED, "removes units")
        return MagnitudePruner(copy_of(model), score=score).prune(config.amount)

    def distill_knowledge(
        self, teacher_model, student_model, train_loader, config=DistillationConfig()
    ) -> nn.Module:
        """A copy of the student trained to follow the teacher and the labels; evaluation mode.

        Raises ValueError for settings out of range and models of different classes.
        """
        teacher, student = (copy_of(m).to(self.device) for m in (teacher_model, student_model))
        trainer = DistillationTrainer(
            teacher.eval(), student, config.temperature, config.alpha, 0.0
        )
        schedule = TrainConfig(steps_in(train_loader, config.epochs), config.learning_rate)
        trainer.fit(train_loader, schedule, log=self.log)
        return student.eval()

    def retrain(self, model, train_loader, epochs=1, learning_rate=1e-3, loss=None) -> nn.Module:
        """A copy trained further; masks and fake quantizers stay.

        loss(model, batch): by default the next token's for language models, else cross-entropy.
        """
        copied = copy_of(model).to(self.device)
        schedule = TrainConfig(steps_in(train_loader, epochs), learning_rate)
        train(copied, train_loader, schedule, loss=loss or training_loss(copied), log=self.log)
        return copied.eval()

    def optimize_full_pipeline(
        self, model: nn.Module, prune_amount=0.3, use_quantization=True, use_pruning=True, *,
        inputs=None, train_loader=None, epochs=1, calibration=None, loss=None, config=DEFAULT,
    ) -> tuple[nn.Module, OptimizationResult]:  # fmt: skip
        """Prune, retrain (with a `train_loader`), quantize (static with `calibration`), measure.

        Where a model cannot be taken apart to remove units, weights are masked; the result says so.
        """
        call, notes, optimized = _call(model, inputs), [], model
        if use_pruning and prune_amount:
            try:
                optimized = self.prune_structured(model, PruningConfig(prune_amount), call)
            except ValueError as reason:
                optimized = self.prune_unstructured(model, PruningConfig(prune_amount, "magnitude"))
                notes.append(f"weights were masked, no units removed: {reason}")
            if train_loader is not None:
                optimized = self.retrain(optimized, train_loader, epochs, loss=loss)
            else:
                notes.append("pruned without retraining: a train_loader= wins back what that cost")
        if use_quantization:
            optimized = quantize(optimized, config, calibration)
            call(optimized.tune)
        return optimized, compare_models(model, optimized, call, notes=tuple(notes))

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
        return export_onnx(copy_of(model).float().eval(), path, call)


def quick_quantize(model: nn.Module, inputs=None, **settings) -> QuantizedModel:
    """The model with INT8 weights on the fastest engine; `settings` are QuantizationConfig's.

    The engine is measured on `inputs` if given, else on those of the first call.
    """
    quantized = quantize(model, QuantizationConfig(**settings))
    if inputs is not None:
        _call(model, inputs)(quantized.tune)
    return quantized


def quick_optimize(
    model: nn.Module, inputs=None, prune_amount: float = 0.3, **arguments
) -> tuple[nn.Module, OptimizationResult]:
    """ProductionModelOptimizer().optimize_full_pipeline: the optimized model, and the result."""
    optimizer = ProductionModelOptimizer()
    return optimizer.optimize_full_pipeline(model, prune_amount, inputs=inputs, **arguments)


def compare_models(
    original: nn.Module, optimized: nn.Module, inputs, *, seconds=1.0, notes: tuple[str, ...] = ()
) -> OptimizationResult:
    """Measures two models on the same inputs, in evaluation mode, in turns of a few milliseconds.

    optimized: a QuantizedModel, or any module; bytes are those of `kit.artifact.save`'s file.
    """
    call, before, after = _call(original, inputs), *map(copy_of, (original, optimized))
    before, after = before.eval(), after.eval()
    with torch.inference_mode():
        expected, outputs = call(before), call(after)
        if not tensors_of(expected):
            what = f"a {type(expected).__name__} from {type(before).__name__} holds no tensor"
            raise ValueError(f"{what} to be compared: return tensors, such as its parameters")
        times = measure({"before": partial(call, before), "after": partial(call, after)}, seconds)
    (y, r), engine = (flat(outputs).double(), flat(expected).double()), "float32 in torch"
    if y.shape != r.shape:
        raise ValueError(f"the outputs have {len(r)} and {len(y)} values: compare models of a kind")
    before, stored = materialize(before), after  # somebody else's parametrizations have no file
    if isinstance(after, QuantizedModel):
        engine, stored = after.choice.name, after.model
        notes = (*_speed_notes(after.choice, batch_size(call)), *notes)
    wide = [time for time in times.values() if time.high - time.low > WIDE * time.median]
    if wide:
        hint = "stop other jobs or call torch.set_num_threads(1), and measure again"
        notes = (*notes, f"latencies spread too widely to be trusted: {hint}")
    floats, (layers, *sizes) = float_copy(stored), _layers(before, stored)
    found = [p.flatten() for p in floats.parameters() if p.ndim >= 2]
    weights = torch.cat([*found, torch.ones(int(not found))])
    mse, cosine = (y - r).square().mean().item(), F.cosine_similarity(y, r, dim=0).item()
    errors = mse, relative_error(outputs, expected), cosine, (weights == 0).float().mean().item()
    settings = *times.values(), batch_size(call), torch.get_num_threads()
    counts = parameter_count(before), parameter_count(floats)
    return OptimizationResult(*sizes, *settings, *errors, *counts, engine, layers, notes)


def _layers(before: nn.Module, after: nn.Module) -> tuple[pd.DataFrame, int, int]:
    """A row a tensor, and the bytes of the two files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.kit"
        old_size, old = artifact.save(before, path, layouts=("dense",)), artifact.describe(path)
        size, new = artifact.save(after, path), artifact.describe(path)
    table = old.merge(new, on="tensor", how="outer", suffixes=("_before", ""), sort=False)
    both = [name + part for name in ("shape", "bits", "bytes") for part in ("_before", "")]
    return table[["tensor", *both]], old_size, size


def _speed_notes(choice: Choice, rows: int) -> list[str]:
    """Says when integers do not pay at this batch size, and where they would."""
    kept = getattr(choice.engine, "kept", {})
    if choice.name in INTEGER:
        names = {why: [n or "the model" for n in kept if kept[n] == why] for why in kept.values()}
        return [f"computed in floats: {', '.join(n)} ({why})" for why, n in names.items()]
    if choice.table is None:
        return [f"computed in floats, as asked: {choice.name}"]
    table = choice.table.set_index("engine")
    table = table[table.index.isin(INTEGER)]
    if not table["why not"].isin(["", "slower"]).any():
        why = "; ".join(f"{name}: {reason}" for name, reason in table["why not"].items())
        least = table["error"].astype(float).min()
        hint = f"; max_error={least:.1g} would allow integers" if 0 < least < 1 else ""
        return [f"computed in floats, since no integer engine can be used ({why}){hint}"]
    batch = choice.pays_from
    where = f"they are from a batch of {batch} on" if batch else "nor are they at larger ones"
    what = f"integers are not faster than {choice.name} at a batch of {rows}"
    return [f"{what}; {where}, as measured here"]


def _call(model: nn.Module, inputs) -> Call:
    call = call_with(example_inputs(unwrapped(model)) if inputs is None else inputs)
    if not batch_size(call):
        raise ValueError("inputs are an empty batch, which has no output: give one row at least")
    return call


def example_inputs(model: nn.Module, batch: int = 16) -> tuple[torch.Tensor, ...]:
    """Random inputs that the model accepts, by its first layer: normal values, or token numbers.

    Raises ValueError if no guess fits; then give inputs.
    """
    kinds = (nn.Linear, nn.Embedding, nn.RNNBase, *CONVOLUTIONS)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    generator, probe = torch.Generator().manual_seed(0), copy_of(model).eval()
    for shape in _guesses(first, batch):
        x = torch.randn(shape, generator=generator).to(dtype_of(model))
        if isinstance(first, nn.Embedding):
            x = torch.randint(0, first.num_embeddings, shape, generator=generator)
        try:
            with torch.no_grad():
                probe(x)
            return (x,)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
    raise ValueError(f"no input can be guessed for {type(model).__name__}: pass inputs= for a call")


def _guesses(first: nn.Module | None, batch: int) -> list[tuple[int, ...]]:
    if isinstance(first, nn.Linear):
        return [(batch, first.in_features), (batch, 16, first.in_features)]
    if isinstance(first, nn.Embedding):
        return [(batch, 32), (batch, 8), (batch,)]
    if isinstance(first, nn.RNNBase):
        return [(batch, 16, first.input_size), (16, batch, first.input_size)]
    if isinstance(first, CONVOLUTIONS):
        sizes = (8, 28, 32, 64, 96, 128, 224)
        return [(batch, first.in_channels, *[size] * len(first.kernel_size)) for size in sizes]
    return []
