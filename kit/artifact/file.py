"""The compressed file: each weight's stored value and the steps on it, and how to rebuild the
model.

Layout: magic (4 bytes), header length (4), header (zlib, JSON), blobs one after another, SHA-256 of
all before it (32). Nothing in it is executable. A weight's steps are written in their order,
whatever they are (kit.core.steps); each tensor takes whichever layout of kit.artifact.layouts is
smallest.
"""

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from kit.artifact import kit3
from kit.artifact.layouts import INTEGERS, LAYOUTS, ArtifactError, Reader, Writer
from kit.core.protocols import bare
from kit.core.steps import STEPS, Step
from kit.core.store import atomic
from kit.core.weights import Weight, materialize, weights
from kit.models import build_model, recipe
from kit.pruning import mask  # noqa: F401 registers its step
from kit.quantization import fake, token_tables  # noqa: F401 register their steps
from kit.quantization.activations import ACTIVATION_MODULES

MAGIC, EARLIER, OTHER_CODERS = b"KIT4", b"KIT3", (b"KIT1", b"KIT2")
CHECKSUM = 32
SAME = "="  # in place of a step: the one that was written as the n-th


def save(model: nn.Module, path: str | os.PathLike, layouts: Sequence[str] = tuple(LAYOUTS)) -> int:
    """Writes the model with the steps its weights carry and returns the bytes of the file.

    Quantized weights are stored as codes, other tensors in their own dtype. Models of kit.models
    can be loaded without further help; any other model needs an instance of the same shapes to load
    into. Transforms of token tables that are not quantized are multiplied out. The file is written
    whole or not at all. Raises ValueError for a module whose extra state is not plain JSON.
    """
    data = serialized(model, layouts)
    with atomic(path) as partial:
        partial.write_bytes(data)
    return len(data)


def nbytes(model: nn.Module, layouts: Sequence[str] = tuple(LAYOUTS)) -> int:
    """Bytes that the file of `save` would have."""
    return len(serialized(model, layouts))


def float32_bytes(model: nn.Module) -> int:
    """Bytes of the model's uncompressed file: every tensor dense, as it is, without steps."""
    return nbytes(materialize(model), layouts=("dense",))


@torch.no_grad()
def tensor_bytes(weight: Weight) -> int:
    """Bytes that a weight, with its steps, takes in a file, without its share of the header."""
    write = Writer()
    _encode(weight, write, {})
    return sum(map(len, write.blobs))


def load(
    path: str | os.PathLike, model: nn.Module | None = None, trainable: bool = False, parts=None
) -> nn.Module:
    """The model in the file, in evaluation mode, its weights multiplied out to floats.

    Its outputs equal those of the model that was saved, to the last bit.

    Args:
        model: an instance to fill, for models that are not the kit's own; it is changed and
            returned.
        trainable: put the steps of the saved model back on, so that training can go on.
        parts: (V, 2), what each token was merged from (`BPETokenizer.parts`), for files whose token
            tables were composed of them.
    Raises ArtifactError: the file is not an artifact, was cut or edited, or has other tensors than
        the model.
    """
    header, blobs = _read(path)
    if model is None:
        model = _rebuild(header, path)
    _restore_modules(bare(model), header, path)
    targets = _targets(bare(model))
    _check_names(header, targets, path)
    made: list[Step] = []
    with torch.no_grad():
        for entry in header["tensors"]:
            read = Reader(entry.get("in", "d"), [next(blobs) for _ in entry["sizes"]])
            target = targets[entry["name"]]
            try:
                if isinstance(target, Weight):
                    _decode(entry, target, read, made, trainable, parts)
                else:
                    target.copy_(read.tensor(target.shape, _dtype(entry)))
            except (ValueError, KeyError, TypeError, RuntimeError) as error:
                raise ArtifactError(f"{path} cannot be read, {entry['name']!r}: {error}") from None
    return model.eval()


def describe(path: str | os.PathLike):
    """Where every byte of the file went: a row a tensor, and one for header and checksum.

    Returns a DataFrame: tensor, shape, bits ("float32" and the like for floats), layout, values,
    bytes, bits_per_value.
    """
    import pandas as pd

    header, _ = _read(path)
    rows = []
    for entry in header["tensors"]:
        sizes, letters = np.array(entry["sizes"]), np.array(list(entry.get("in", "d")))
        formats = [s.get("format", {}) for kind, s in entry.get("steps", ())
                   if kind in STEPS and STEPS[kind].carries]  # fmt: skip
        bits = formats[0].get("bits", 8) if formats else entry.get("dtype", "float32")
        main = letters[sizes.argmax()]
        layout = next((name for name, made in LAYOUTS.items() if made.letter == main), "entropy")
        order, shape = sizes[letters == INTEGERS].sum(), tuple(entry["shape"])
        rows.append((entry["name"], shape, bits, layout, math.prod(shape), sizes.sum() - order))
        if order:
            rows.append(("(order of tokens)", shape[:1], "", "entropy", shape[0], order))
    overhead = os.path.getsize(path) - sum(row[-1] for row in rows)
    rows.append(("(header, checksum)", (), "", "", 0, overhead))
    table = pd.DataFrame(rows, columns=["tensor", "shape", "bits", "layout", "values", "bytes"])
    count = table["values"].where(table["values"] > 0)
    return table.assign(bits_per_value=8 * table["bytes"] / count)


# Writing


def serialized(model: nn.Module, layouts: Sequence[str] = tuple(LAYOUTS)) -> bytes:
    """The bytes of the file."""
    model = bare(model)
    header = {"model": recipe(model), "modules": _activation_modules(model), "tensors": []}
    if extra := _extra_state(model):
        header["extra"] = extra
    blobs, written = [], {}
    for name, target in _targets(model).items():
        write = Writer(layouts)
        if isinstance(target, Weight):
            with torch.no_grad():
                entry = _encode(target, write, written)
        else:
            entry = _plain(target, write)
        entry |= {"in": write.letters} if write.letters != "d" else {}
        sizes = [len(blob) for blob in write.blobs]
        header["tensors"].append({"name": name, **entry, "sizes": sizes})
        blobs += write.blobs
    return sealed(header, blobs)


def sealed(header: dict, blobs: Sequence[bytes]) -> bytes:
    """A file of this header and these blobs."""
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = MAGIC + struct.pack("<I", len(text)) + text + b"".join(blobs)
    return body + hashlib.sha256(body).digest()


def _encode(weight: Weight, write: Writer, written: dict[Step, int]) -> dict:
    """Writes a weight's stored value and its steps; returns its entry in the header.

    written: the steps of earlier weights, which a step shared by several is not written again.
    """
    steps, x, seen = weight.steps, weight.original, []
    for step in steps:
        seen.append(x)
        x = step(x)
    carrier, leading = _leading(steps, weight.name)
    stored = [*seen, x][leading]
    entry: dict = {"shape": list(weight.original.shape)}
    if weight.original.dtype != torch.float32:
        entry["dtype"] = _name(weight.original.dtype)
    if carrier is None:
        if leading < len(steps):  # transforms of floats save no bytes: what they compute is stored
            steps, stored = [], x
        write.tensor(stored)
    entries: list = [None] * len(steps)
    for i in sorted(range(len(steps)), key=lambda i: i != carrier):
        if steps[i] in written:
            entries[i] = [SAME, written[steps[i]]]
        else:
            entries[i] = [steps[i].kind, steps[i].encode(seen[i], stored, write)]
            written[steps[i]] = len(written)
    return {**entry, "steps": entries} if entries else entry


def _leading(steps: Sequence[Step | type[Step]], name: str) -> tuple[int | None, int]:
    """Which step carries the stored value, and how many steps it already went through."""
    carries = [getattr(step, "carries", False) for step in steps]
    projections = [getattr(step, "projection", False) for step in steps]
    leading = projections.index(False) if False in projections else len(steps)
    if True not in carries:
        return None, leading
    carrier = carries.index(True)
    if leading <= carrier:
        raise ValueError(f"{name!r} is changed before it is quantized, which a file cannot hold")
    return carrier, carrier + 1


def _plain(tensor: Tensor, write: Writer) -> dict:
    write.tensor(tensor)
    dtype = {} if tensor.dtype == torch.float32 else {"dtype": _name(tensor.dtype)}
    return {"shape": list(tensor.shape), **dtype}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(entry: dict) -> torch.dtype:
    return getattr(torch, entry.get("dtype", "float32"))


def _targets(model: nn.Module) -> dict[str, Weight | Tensor]:
    """Everything that a file holds, by name: weights and buffers."""
    return {weight.name: weight for weight in weights(model)} | dict(_buffers(model))


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


def _activation_modules(model: nn.Module) -> dict:
    kinds = tuple(ACTIVATION_MODULES.values())
    found = {path: module for path, module in model.named_modules() if type(module) in kinds}
    outer = {path: m for path, m in found.items() if path.rpartition(".")[0] not in found}
    return {path: {"class": type(m).__name__, **m.settings()} for path, m in outer.items()}


def _extra_state(model: nn.Module) -> dict:
    found = {}
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[path] = module.get_extra_state()
            try:
                json.dumps(found[path])
            except TypeError:
                raise ValueError(
                    f"the extra state of {path!r} is no plain JSON, all that a file holds"
                ) from None
    return found


# Reading


def _read(path: str | os.PathLike) -> tuple[dict, Iterator[bytes]]:
    """Header and an iterator over the blobs of a file that is whole."""
    data = Path(path).read_bytes()
    magic = data[:4]
    if magic not in (MAGIC, EARLIER, *OTHER_CODERS):
        raise ArtifactError(f"{path} is not a kit artifact: it begins with {magic!r}")
    if len(data) < 8 + CHECKSUM or hashlib.sha256(data[:-CHECKSUM]).digest() != data[-CHECKSUM:]:
        raise ArtifactError(f"{path} is damaged (its checksum differs): copy or write it again")
    length = struct.unpack("<I", data[4:8])[0]
    try:
        header = json.loads(zlib.decompress(data[8 : 8 + length]))
        sizes = [size for entry in header["tensors"] for size in entry["sizes"]]
        header["model"], header["modules"]
        other_coder = magic in OTHER_CODERS and kit3.is_range_coded(header)
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} has no readable header ({error}): write it again") from None
    if other_coder:
        raise ArtifactError(f"{path} is range-coded by an earlier version: make it again")
    held = len(data) - 8 - length - CHECKSUM
    if sum(sizes) != held or any(size < 0 for size in sizes):
        raise ArtifactError(f"{path} announces {sum(sizes)} bytes of tensors but holds {held}")
    offsets = np.cumsum([8 + length, *sizes]).tolist()
    blobs = [data[a:b] for a, b in zip(offsets, offsets[1:])]
    if magic != MAGIC:
        header, blobs = kit3.upgraded(header, blobs)
    return header, iter(blobs)


def _decode(entry: dict, weight: Weight, read: Reader, made: list, trainable: bool, parts) -> None:
    """Fills a weight with its stored value and puts its steps on, or what they compute in place."""
    entries = entry.get("steps", [])
    for kind, _ in entries:
        if kind != SAME and kind not in STEPS:
            raise ValueError(f"no step {kind!r} is known: import the file that registers it first")
    kinds = [made[settings] if kind == SAME else STEPS[kind] for kind, settings in entries]
    carrier, leading = _leading(kinds, weight.name)
    stored = read.tensor(weight.original.shape, _dtype(entry)) if carrier is None else None
    steps: list = [None] * len(entries)
    for i in sorted(range(len(entries)), key=lambda i: i != carrier):
        kind, settings = entries[i]
        if kind == SAME:
            steps[i] = made[settings]
            continue
        steps[i], value = STEPS[kind].decode(settings, read, weight, stored, parts)
        stored = value if i == carrier else stored
        made.append(steps[i])
    for step in [] if trainable else steps[leading:]:
        stored = step(stored)
    weight.assign(stored)
    if trainable and steps:
        weight.set_steps(steps)


def _rebuild(header: dict, path) -> nn.Module:
    stated = header["model"]
    if stated is None:
        raise ArtifactError(f"{path} holds a model that is not ours: pass load(path, model=...)")
    with torch.device("meta"):
        skeleton = build_model(stated["class"], stated["config"])
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    stored = {entry["name"]: tuple(entry["shape"]) for entry in header["tensors"]}
    if any(stored.get(name, shape) != shape for name, shape in shapes.items()):
        raise ArtifactError(f"{path} contradicts itself: config and tensors differ in shape")
    with torch.random.fork_rng(devices=[]):
        return build_model(stated["class"], stated["config"])


def _restore_modules(model: nn.Module, header: dict, path) -> None:
    for name, settings in header["modules"].items():
        kind = settings.pop("class")
        if kind not in ACTIVATION_MODULES:
            raise ArtifactError(f"{path} needs a module {kind!r}, which the kit lacks")
        model.set_submodule(name, ACTIVATION_MODULES[kind](**settings))
    for name, state in header.get("extra", {}).items():
        model.get_submodule(name).set_extra_state(state)


def _check_names(header: dict, targets: dict[str, Weight | Tensor], path) -> None:
    stored = {entry["name"]: tuple(entry["shape"]) for entry in header["tensors"]}
    for name in stored.keys() ^ targets.keys():
        here, there = ("file", "model") if name in stored else ("model", "file")
        where = f"in the {here} but not in the {there}"
        raise ArtifactError(f"{path} does not fit: {name!r} is {where}; use the same config")
    for entry in header["tensors"]:
        target = targets[entry["name"]]
        tensor = target.original if isinstance(target, Weight) else target
        ours, theirs = tuple(tensor.shape), tuple(entry["shape"])
        if ours != theirs:
            shapes = f"shape {theirs}, the model expects {ours}"
            raise ArtifactError(f"{path} holds {entry['name']!r} with {shapes}")
        if _dtype(entry) != tensor.dtype and not header.get("earlier"):
            dtypes = f"{_dtype(entry)}, the model expects {tensor.dtype}"
            raise ArtifactError(f"{path} holds {entry['name']!r} as {dtypes}: convert it first")
