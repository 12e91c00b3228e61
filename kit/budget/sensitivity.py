"""What pruning or rounding one weight costs in loss, and the best choice within some bytes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from kit import artifact
from kit.budget.allocation import allocate
from kit.core.store import digest, read_json, write_json
from kit.core.weights import copy_model, materialize, weights
from kit.pruning.criteria import check_sparsity
from kit.pruning.magnitude import MagnitudePruner
from kit.quantization import HALF, Format, quantize_weights
from kit.training.evaluation import evaluate

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def scan(
    model: nn.Module, batches: Sequence,
    choices: Mapping[str, Format] | Sequence[float] = SPARSITIES,
    tensors: str | Iterable[str] = "*", *, cache: str | Path | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Loss with one weight matrix at a time rounded or pruned, all else as it is.

    Args:
        batches: (inputs, targets) of the validation split, a list.
        choices: label -> format, such as {"4": Format(4)}; or sparsities for magnitude pruning.
        tensors: shell patterns of the weights to try.
        cache: folder; a scan of the same weights, batches and choices is then only read.
    Returns a row a tensor and choice: tensor, format (the label) or sparsity, loss (nats a token),
    increase over the untouched loss, bytes of the tensor in the artifact. The model is untouched.
    Raises ValueError for a sparsity outside [0, 1) or a pattern that matches nothing.
    """
    rounding, model = isinstance(choices, Mapping), copy_model(model)
    if not rounding:
        choices = sorted({0.0, *map(check_sparsity, choices)})
    found, file = weights(model, tensors, matrices=True), None
    if cache is not None:
        formats = list(choices.values()) if rounding else []
        settings = [list(choices), formats, [weight.name for weight in found]]
        file = Path(cache) / f"scan-{digest(model, list(batches), settings)}.json"
        if file.exists():
            return pd.DataFrame(read_json(file, list[dict]))
    untouched, rows = evaluate(model, batches).loss, []
    for weight in found:
        steps, value = weight.steps, weight.value.detach().clone()
        for choice in choices:
            if rounding:
                quantize_weights(model, {weight.name: choices[choice]})
            else:
                MagnitudePruner(model, weight.name).prune(choice)
            changed = not torch.equal(weight.value, value)
            loss = evaluate(model, batches).loss if changed else untouched
            size = artifact.tensor_bytes(weight)
            rows.append((weight.name, choice, loss, loss - untouched, size))
            weight.set_steps(steps)
    column = "format" if rounding else "sparsity"
    table = pd.DataFrame(rows, columns=["tensor", column, "loss", "increase", "bytes"])
    if file is not None:
        write_json(file, table.to_dict("records"))
    return table


def _chosen(table: pd.DataFrame, column: str, budget: int) -> dict:
    groups = dict(list(table.groupby("tensor", sort=False)))
    options = {name: list(zip(rows["bytes"], rows["increase"])) for name, rows in groups.items()}
    return {n: groups[n][column].tolist()[at] for n, at in allocate(options, budget).items()}


def sparsities_for_budget(table: pd.DataFrame, budget: int) -> dict[str, float]:
    """One sparsity a tensor such that all of them fit `budget` bytes and the summed loss increase
    is least; the increases of single tensors are taken to add up.

    table: from `scan`. Returns tensor -> sparsity, for `MagnitudePruner.prune`.
    Raises ValueError if even the highest sparsities scanned do not fit.
    """
    return _chosen(table, "sparsity", budget)


def plan_for_budget(
    model: nn.Module, table: pd.DataFrame, formats: Mapping[str, Format], budget: int,
    convert: Callable = quantize_weights,
) -> dict[str, Format]:  # fmt: skip
    """A plan for `quantize_weights` whose artifact has at most `budget` bytes, header, vectors
    (float16) and checksum included, and whose summed loss increase is least.

    Args:
        table: from `scan` with the same `formats`.
        convert: (model, plan) -> the model that is saved, which the budget is kept for: codes of
            other values, as GPTQ's, take other bytes where they are range-coded.
    Raises ValueError if no choice of formats fits.
    """
    dense, room = materialize(model), budget
    for turn in range(16):
        plan = {name: formats[label] for name, label in _chosen(table, "format", room).items()}
        plan |= {weight.name: HALF for weight in weights(dense) if weight.name not in plan}
        size = artifact.nbytes(convert(copy_model(dense), plan))
        if size <= budget:
            return plan
        room -= max(size - budget, 4 << turn)  # the same choice came again: by more and more
    raise ValueError(f"no choice of formats fits {budget} bytes: the last one tried takes {size}")
