"""What an optimization did to a model, every figure measured: file, latency, output, layers."""

import html
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit import artifact
from kit.core.measurement import Latency, measure
from kit.engines.choice import INTEGER, Choice, flat, relative_error
from kit.engines.layers import float_copy
from kit.models import parameter_count
from kit.core.weights import copy_model
from kit.engines.quantized import QuantizedModel, dtype_of


@dataclass(frozen=True, repr=False)
class OptimizationResult:
    """Before and after. Prints as a table; shows as one in a notebook."""

    bytes_before: int  # of the kit's file of the model as it was, every tensor dense in its own dtype
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
        return 100 * (1 - self.latency_after.median / self.latency_before.median)

    @property
    def speedup(self) -> float:
        return self.latency_before.median / self.latency_after.median

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, change) as text."""
        count = f"{self.parameters_before:,}", f"{self.parameters_after:,}"
        fewer = 1 - self.parameters_after / self.parameters_before
        return [
            ("file, bytes", f"{self.bytes_before:,}", f"{self.bytes_after:,}",
             f"{self.compression_ratio:.2f}x smaller"),
            (f"latency, batch {self.batch_size}, {self.threads} thread{'s' * (self.threads > 1)}",
             _spread(self.latency_before), _spread(self.latency_after), f"{self.speedup:.2f}x as fast"),
            ("parameters", *count, f"{fewer:.1%} fewer" if fewer else ""),
            ("zeros among weights", "", f"{self.sparsity:.1%}", ""),
            ("output: mean squared error", "", f"{self.mse:.3g}", f"{self.relative_error:.2g} of the signal"),
            ("output: cosine similarity", "", f"{self.cosine:.6f}", ""),
            ("computed by", "float32 in torch", self.engine, ""),
        ]

    def __str__(self):
        rows = [("", "before", "after", "change"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def _repr_html_(self):
        table = pd.DataFrame(self.rows(), columns=["", "before", "after", "change"])
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return table.to_html(index=False, border=0) + notes


def _spread(time: Latency) -> str:
    return f"{1e3 * time.median:.3g} ms ({1e3 * time.low:.3g} to {1e3 * time.high:.3g})"


def compare_models(original: nn.Module, optimized: nn.Module, inputs: tuple[Tensor, ...], *,
                   seconds: float = 1.0, notes: tuple[str, ...] = ()) -> OptimizationResult:
    """Measures both models on the same inputs, in evaluation mode and in turns of a few milliseconds.

    optimized: a QuantizedModel, or any module; bytes are those of the file that `save` (kit.artifact) writes.
    """
    before, after = (copy_model(model).eval() for model in (original, optimized))
    with torch.inference_mode():
        expected, outputs = before(*inputs), after(*inputs)
        times = measure({"before": lambda: before(*inputs), "after": lambda: after(*inputs)}, seconds)
    y, r = flat(outputs).double(), flat(expected).double()
    stored = after.model if isinstance(after, QuantizedModel) else after
    layers, sizes = _layers(before, stored)
    weights = float_copy(stored)
    return OptimizationResult(
        *sizes, times["before"], times["after"], len(inputs[0]), torch.get_num_threads(),
        (y - r).square().mean().item(), relative_error(outputs, expected),
        F.cosine_similarity(y, r, dim=0).item(), _sparsity(weights),
        parameter_count(before), parameter_count(weights),
        after.choice.name if stored is not after else "float32 in torch", layers,
        (*notes, *(_speed_notes(after.choice, len(inputs[0])) if stored is not after else ())))


def _layers(before: nn.Module, after: nn.Module) -> tuple[pd.DataFrame, tuple[int, int]]:
    """A row a tensor, and the bytes of the two files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.kit"
        old = artifact.describe(path) if artifact.save(before, path, layouts=("dense",)) else None
        sizes = path.stat().st_size, artifact.save(after, path)
        new = artifact.describe(path)
    table = old.merge(new, on="tensor", how="outer", suffixes=("_before", ""), sort=False)
    return table[["tensor", "shape_before", "shape", "bits_before", "bits", "bytes_before", "bytes"]], sizes


def _sparsity(model: nn.Module) -> float:
    weights = [p for p in model.parameters() if p.ndim >= 2]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def _speed_notes(choice: Choice, rows: int) -> list[str]:
    """Says when integers do not pay at this batch size, and where they would."""
    if choice.table is None or choice.name in INTEGER:
        return []
    reasons = choice.table.set_index("engine")["why not"]
    if not any(reasons[name] in ("", "slower") for name in INTEGER):
        why = "; ".join(f"{name}: {reasons[name]}" for name in INTEGER)
        return [f"computed in floats, since no integer engine can be used ({why})"]
    batch = choice.pays_from
    where = f"they are from a batch of {batch} on" if batch else "nor are they at larger ones"
    return [f"integers are not faster than {choice.name} at a batch of {rows}; {where}, as measured here"]


def example_inputs(model: nn.Module, batch: int = 16) -> tuple[Tensor, ...]:
    """Random inputs that the model accepts, made from its first layer: normal values, or token numbers.

    Raises ValueError if no guess fits; then give inputs.
    """
    kinds = (nn.Linear, nn.Embedding, nn.RNNBase, nn.modules.conv._ConvNd)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    generator = torch.Generator().manual_seed(0)
    probe = copy_model(model).eval()
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
    raise ValueError(f"no input can be guessed for {type(model).__name__}: pass inputs=, a batch it accepts")


def _guesses(first: nn.Module | None, batch: int) -> list[tuple[int, ...]]:
    if isinstance(first, nn.Linear):
        return [(batch, first.in_features), (batch, 16, first.in_features)]
    if isinstance(first, nn.Embedding):
        return [(batch, 32), (batch, 8), (batch,)]
    if isinstance(first, nn.RNNBase):
        return [(batch, 16, first.input_size), (16, batch, first.input_size)]
    if isinstance(first, nn.modules.conv._ConvNd):
        dimensions = first.weight.ndim - 2
        return [(batch, first.in_channels, *[size] * dimensions) for size in (8, 28, 32, 64, 96, 128, 224)]
    return []
