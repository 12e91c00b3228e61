"""How much each weight tensor can lose: one cached scan, and the sparsities that suit a byte budget best."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kit.training.evaluation import evaluate
from kit.artifact.layouts import encode_codes, encode_float
from kit.core.weights import find_step
from kit.pruning.magnitude import MagnitudePruner
from kit.pruning.mask import Slot, copy_model
from kit.pruning.criteria import check_sparsity
from kit.budget.allocation import allocate
from kit.quantization.fake import FakeQuantize
from kit.core.store import write_json

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def scan(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], tensors: str | Iterable[str] = "*",
         sparsities: Sequence[float] = SPARSITIES, *, cache: str | Path | None = None) -> pd.DataFrame:
    """Loss of the model with one tensor at a time pruned by magnitude, for every tensor and sparsity.

    Args:
        batches: (inputs, targets) of the validation split, evaluated once for each cell.
        cache: folder for the result; a scan of the same weights, batches and settings is then only read.

    Returns:
        a row a tensor and sparsity: tensor, sparsity, loss (nats a token), increase over the unpruned loss,
        bytes of the tensor in the artifact. The model is untouched.

    Raises:
        ValueError: a sparsity outside [0, 1), or a pattern that matches nothing.
    """
    sparsities = sorted({0.0, *(check_sparsity(value) for value in sparsities)})
    copied = copy_model(model)
    pruner = MagnitudePruner(copied, tensors)
    file = None
    if cache is not None:
        file = Path(cache) / f"sensitivity-{_digest(model, batches, list(pruner.slots), sparsities)}.json"
        if file.exists():
            return pd.DataFrame(json.loads(file.read_text()))
    dense = evaluate(copied, batches).loss
    rows = []
    for name, slot in pruner.slots.items():
        before = slot.mask.clone()
        for sparsity in sparsities:
            pruner.prune({name: sparsity})
            loss = dense if bool((slot.mask == before).all()) else evaluate(copied, batches).loss
            rows.append({"tensor": name, "sparsity": sparsity, "loss": loss, "increase": loss - dense,
                         "bytes": tensor_bytes(slot)})
            slot.set_mask(before)
    if file is not None:
        write_json(file, rows)
    return pd.DataFrame(rows)


@torch.no_grad()
def tensor_bytes(slot: Slot) -> int:
    """Bytes the tensor takes in an artifact, in its cheapest layout, masked and quantized as it is."""
    quantizer = find_step(slot.module, slot.attribute, FakeQuantize)
    if quantizer is None:
        parts = encode_float(getattr(slot.module, slot.attribute))[1]
    else:
        parts = encode_codes(torch.where(slot.mask, slot.parameter, 0.0), quantizer)[1]
    return sum(len(part) for part in parts)


def _digest(model: nn.Module, batches: Sequence, names: list[str], sparsities: list[float]) -> str:
    sha = hashlib.sha256(json.dumps([names, sparsities, str(model)]).encode())
    for tensor in [*model.state_dict().values(), *(part for batch in batches for part in batch)]:
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def sparsities_for_budget(table: pd.DataFrame, budget: int) -> dict[str, float]:
    """One sparsity a tensor such that all of them fit `budget` bytes and the summed loss increase is least.

    Args:
        table: from `scan`. The increases of single tensors are taken to add up.

    Returns:
        tensor -> sparsity, for `MagnitudePruner.prune`.

    Raises:
        ValueError: even the highest sparsities scanned do not fit the budget.
    """
    options = {name: list(rows[["bytes", "increase"]].itertuples(index=False, name=None))
               for name, rows in table.groupby("tensor", sort=False)}
    chosen = allocate(options, budget)
    values = {name: rows["sparsity"].tolist() for name, rows in table.groupby("tensor", sort=False)}
    return {name: values[name][position] for name, position in chosen.items()}
