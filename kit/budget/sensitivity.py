"""What each weight's bits cost in loss: one cached scan, and the formats that suit a byte budget best."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kit import artifact
from kit.training.evaluation import evaluate
from kit.artifact.layouts import encode_codes
from kit.core.weights import bake, find_step, named_weights, original_of, weight_matrices
from kit.budget.allocation import allocate
from kit.quantization.fake import FakeQuantize, quantize_weights
from kit.quantization.formats import HALF, Format
from kit.core.store import write_json


def scan(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], formats: Mapping[str, Format], *,
         cache: str | Path | None = None) -> pd.DataFrame:
    """Loss with one weight matrix at a time in each format, all else as it is.

    Args:
        batches: (inputs, targets) of the validation split, a list.
        formats: label -> format, such as {"4": Format(4)}.
        cache: folder; a scan of the same weights, batches and formats is then only read.
    Returns a row a tensor and format: tensor, format (the label), loss (nats a token), increase over the unquantized
    loss, bytes of the tensor in the artifact (codes and scales, in its smallest layout). The model is untouched.
    """
    baked = bake(model)
    file = None
    if cache is not None:
        file = Path(cache) / f"bits-{_digest(baked, batches, formats)}.json"
        if file.exists():
            return pd.DataFrame(json.loads(file.read_text()))
    dense, rows = evaluate(baked, batches).loss, []
    for name, module, attribute in list(weight_matrices(baked)):
        for label, format in formats.items():
            quantize_weights(baked, {name: format})
            loss = evaluate(baked, batches).loss
            rows.append({"tensor": name, "format": label, "loss": loss, "increase": loss - dense,
                         "bytes": tensor_bytes(module, attribute)})
            quantize_weights(baked, {name: None})
    if file is not None:
        write_json(file, rows)
    return pd.DataFrame(rows)


def tensor_bytes(module: nn.Module, attribute: str) -> int:
    """Bytes that a quantized weight's codes, scales and zero points take in an artifact."""
    quantizer = find_step(module, attribute, FakeQuantize)
    return sum(len(part) for part in encode_codes(original_of(module, attribute), quantizer)[1])


def _digest(model: nn.Module, batches: Sequence, formats: Mapping[str, Format]) -> str:
    settings = {label: dataclasses.asdict(format) for label, format in formats.items()}
    sha = hashlib.sha256(json.dumps([settings, str(model)]).encode())
    for tensor in [*model.state_dict().values(), *(part for batch in batches for part in batch)]:
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def plan_for_budget(model: nn.Module, table: pd.DataFrame, formats: Mapping[str, Format],
                    budget: int, convert: Callable = quantize_weights) -> dict[str, Format]:
    """A plan for `quantize_weights` whose artifact has at most `budget` bytes, header, vectors (float16) and checksum
    included, and whose summed loss increase is least; the increases of single tensors are taken to add up.

    table: from `scan` with the same `formats`.
    convert: (model, plan) -> the model that is saved, which the budget is kept for: codes of other values, as GPTQ's,
        take other bytes where they are range-coded.
    Raises ValueError if no choice of formats fits.
    """
    labels = {name: rows["format"].tolist() for name, rows in table.groupby("tensor", sort=False)}
    options = {name: list(rows[["bytes", "increase"]].itertuples(index=False, name=None))
               for name, rows in table.groupby("tensor", sort=False)}
    dense, room = bake(model), budget
    for _ in range(8):
        chosen = allocate(options, room)
        plan = {name: formats[labels[name][position]] for name, position in chosen.items()}
        plan |= {name: HALF for name, _, _ in named_weights(dense) if name not in plan}
        size = artifact.nbytes(convert(copy.deepcopy(dense), plan))
        if size <= budget:
            return plan
        room -= max(size - budget, 16)
    raise ValueError(f"no choice of formats fits {budget} bytes: the last one tried takes {size}")
