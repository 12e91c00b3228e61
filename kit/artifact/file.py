"""The compressed file: each weight's stored value and the steps on it, and how to rebuild the
model.

Layout: magic (4 bytes), header length (4), header (zlib, JSON), blobs one after another, SHA-256 of
all before it (32). Nothing in it is executable. A weight's steps are written in their order,
whatever they are (kit.core.steps); each tensor takes whichever layout of kit.artifact.layouts is
smallest.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from kit.artifact import kit3
from kit.artifact.header import MAGIC, SAME, Entry, Header, sealed, unsealed
from kit.artifact.layouts import INTEGERS, LAYOUTS, ArtifactError, Reader, Writer
from kit.artifact.model import (
    activation_modules,
    extra_state,
    fill_buffer,
    kind_of,
    prepared,
    targets_of,
)
from kit.core.protocols import bare
from kit.core.settings import reason_of
from kit.core.steps import STEPS, Step
from kit.core.store import atomic
from kit.core.weights import Weight, is_finite, materialize, weights
from kit.models import recipe
from kit.pruning import mask  # noqa: F401 registers its step
from kit.quantization import fake, token_tables  # noqa: F401 register their steps
from kit.quantization.integers import GroupWiseQuantizer, pack_layers, packed_parts, packs


def save(model: nn.Module, path: str | os.PathLike, layouts: Sequence[str] = tuple(LAYOUTS)) -> int:
    """Writes the model with the steps its weights carry and returns the bytes of the file.

    Quantized weights are stored as codes, other tensors in their own dtype. Models of kit.models
    can be loaded without further help; any other model needs an instance of the same shapes to load
    into. Transforms of token tables that are not quantized are multiplied out. The file is written
    whole or not at all. Raises ValueError for a module whose extra state is not plain JSON.
    """
    parts = serialized(model, layouts)
    with atomic(path) as partial, open(partial, "wb") as file:
        return sum(file.write(part) for part in parts)


def nbytes(model: nn.Module, layouts: Sequence[str] = tuple(LAYOUTS)) -> int:
    """Bytes that the file of `save` would have."""
    return sum(map(len, serialized(model, layouts)))


def float32_bytes(model: nn.Module) -> int:
    """Bytes of the model's uncompressed file: every tensor dense, without steps, doubles as floats
    and all else as it is."""
    single = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    model = materialize(model)._apply(lambda x: x.to(single.get(x.dtype, x.dtype)))
    return nbytes(model, layouts=("dense",))


@torch.no_grad()
def tensor_bytes(weight: Weight) -> int:
    """Bytes that a weight, with its steps, takes in a file, without its share of the header."""
    write = Writer()
    _encode(weight, write, {})
    return sum(map(len, write.blobs))


def load(
    path: str | os.PathLike, model: nn.Module | None = None, trainable: bool = False, parts=None,
    packed: bool = False,
) -> nn.Module:  # fmt: skip
    """The model in the file, in evaluation mode, its weights multiplied out to floats.

    Its outputs equal those of the model that was saved, to the last bit.

    Args:
        model: an instance to fill and return, for models that are not the kit's own; made within
            `without_values`, it takes no memory before.
        trainable: put the steps of the saved model back on, so that training can go on.
        parts: (V, 2), what each token was merged from, for tables composed of them.
        packed: for inference in little memory, on the CPU: layers as `pack_layers` makes them, one
            after another, so that no more than one layer's floats are there at a time.
    Raises ArtifactError: the file is no artifact, was cut or edited, contradicts itself, has other
        tensors than the model, or NaN or infinities where that has none. Nothing is allocated that
        the model or the file's bytes do not justify.
    """
    if trainable and packed:
        raise ValueError(
            "trainable=True and packed=True: packed layers cannot be trained, give one"
        )
    what = "its header"
    with _opened(path) as (header, blobs):
        try:
            filled = prepared(header, None if model is None else bare(model))
            targets, made = targets_of(filled), []
            originals = [t.original for t in targets.values() if isinstance(t, Weight)]
            taken = {original.untyped_storage().data_ptr() for original in originals}
            layers = _emptied(filled, targets) if packed else {}
            for entry in header.tensors:
                what, target = repr(entry.name), targets.pop(entry.name)
                original = target.original if isinstance(target, Weight) else target
                read = Reader(entry.letters, [next(blobs) for _ in entry.sizes], original.numel())
                with torch.no_grad():
                    if isinstance(target, Weight):
                        kept = trainable or entry.name in layers
                        _decode(entry, target, read, made, kept, parts)
                    else:
                        value = read.tensor(target.shape, target.dtype, like=target)
                        fill_buffer(filled, entry.name, value, taken)
                if read.left:
                    raise ArtifactError("it has more parts than its steps need")
                for name in layers.get(entry.name, ()):
                    for path, layer in packed_parts(filled.get_submodule(name)).items():
                        filled.set_submodule(f"{name}.{path}".rstrip("."), layer)
            if packed and any(weight.steps for weight in weights(filled)):
                filled = model = pack_layers(filled)
        except Exception as error:  # steps and models may be anybody's: all they raise is told
            raise ArtifactError(f"{path} cannot be read, {what}: {reason_of(error)}") from error
    return (filled if model is None else model).eval()


def describe(path: str | os.PathLike):
    """Where every byte of the file went: a row a tensor, and one for header and checksum.

    Returns a DataFrame: tensor, shape, bits ("float32" and the like for floats), layout, values,
    bytes, bits_per_value.
    """
    import pandas as pd

    rows = []
    with _opened(path) as (header, _):
        tensors = header.tensors
    for entry in tensors:
        sizes, letters = np.array(entry.sizes), np.array(list(entry.letters))
        formats = [getattr(s, "format", {}) for kind, s in entry.steps
                   if kind in STEPS and STEPS[kind].carries]  # fmt: skip
        bits = formats[0].get("bits", 8) if formats else entry.dtype or "float32"
        main = letters[sizes.argmax()]
        layout = next((name for name, made in LAYOUTS.items() if made.letter == main), "entropy")
        order, shape = sizes[letters == INTEGERS].sum(), tuple(entry.shape)
        rows.append((entry.name, shape, bits, layout, math.prod(shape), sizes.sum() - order))
        if order:
            rows.append(("(order of tokens)", shape[:1], "", "entropy", shape[0], order))
    overhead = os.path.getsize(path) - sum(row[-1] for row in rows)
    rows.append(("(header, checksum)", (), "", "", 0, overhead))
    table = pd.DataFrame(rows, columns=["tensor", "shape", "bits", "layout", "values", "bytes"])
    count = table["values"].where(table["values"] > 0)
    return table.assign(bits_per_value=8 * table["bytes"] / count)


# Writing


def serialized(model: nn.Module, layouts: Sequence[str] = tuple(LAYOUTS)) -> Iterator[bytes]:
    """The bytes of the file, part after part."""
    model = bare(model)
    if any(isinstance(module, GroupWiseQuantizer) for module in model.modules()):
        what = "a packed model has no steps that a file could hold"
        raise ValueError(f"{what}: save the model that it was made of")
    header = {"model": recipe(model), "modules": activation_modules(model), "tensors": []}
    if extra := extra_state(model):
        header["extra"] = extra
    blobs, written = [], {}
    for name, target in targets_of(model).items():
        write = Writer(layouts)
        if isinstance(target, Weight):
            with torch.no_grad():
                entry = _encode(target, write, written)
        else:
            if target.layout != torch.strided:
                raise ValueError(f"buffer {name!r} is sparse: make it dense, as a file holds it")
            write.tensor(target)
            entry = kind_of(target)
        entry |= {"in": write.letters} if write.letters != "d" else {}
        header["tensors"].append({"name": name, **entry, "sizes": [*map(len, write.blobs)]})
        blobs += write.blobs
    return sealed(header, blobs)


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
    if stored.is_meta or not is_finite(stored):
        held = "no values on the meta device" if stored.is_meta else "NaN or infinities"
        raise ValueError(f"{weight.name!r} holds {held}, which `load` would refuse")
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
    return kind_of(weight.original) | ({"steps": entries} if entries else {})


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


# Reading


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Header, Iterator[bytes]]]:
    """Header of a file that is whole, and its blobs, read one by one."""
    with open(path, "rb") as file:
        try:
            earlier = file.read(4) != MAGIC
            header = unsealed(file, path)
            blobs = (_part(file, size) for entry in header["tensors"] for size in entry["sizes"])
            if earlier:
                header, blobs = kit3.upgraded(header, map(bytes, blobs))
            header = msgspec.convert(header, Header)
            for entry in header.tensors:
                kinds = [STEPS[kind].settings if kind in STEPS else Any for kind, _ in entry.steps]
                entry.steps = [(kind, msgspec.convert(stated, known))
                               for (kind, stated), known in zip(entry.steps, kinds)]  # fmt: skip
        except Exception as error:  # it may be any JSON
            if isinstance(error, ArtifactError):
                raise
            why = f"{type(error).__name__}: {reason_of(error)}"
            raise ArtifactError(f"{path} has no readable header ({why}): write it again") from None
        yield header, iter(blobs)


def _part(file: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) < size:
        raise ArtifactError("the file was cut while it was read")
    return data


def _emptied(model: nn.Module, targets: dict) -> dict[str, list[str]]:
    """Takes the values of all weights away. Returns, for each matrix of a layer that can be packed,
    the paths of the layers that can once it is read, the matrices being read in their order."""
    names, found, outer = {}, {}, ()
    for name, target in targets.items():
        if isinstance(target, Weight):
            target.become(torch.empty_like(target.original, device="meta"))
            names[id(target.original)] = name
    order = {key: i for i, key in enumerate(names)}
    for path, module in model.named_modules():
        if path and packs(module) and not path.startswith(outer):
            outer += (f"{path}.",)
            held = {id(weight.original) for weight in weights(module, matrices=True)}
            for key in sorted(held, key=order.get):
                last = found.setdefault(names[key], [])
            last.append(path)
    return found


def _decode(entry: Entry, weight: Weight, read: Reader, made: list, trainable: bool, parts) -> None:
    """Fills a weight with its stored value and puts its steps on, or what they compute in place."""
    kinds, original = [], weight.original
    for kind, settings in entry.steps:
        if kind == SAME and not 0 <= settings < len(made):
            raise ArtifactError(f"it shares step {settings} of {len(made)} before it")
        if kind != SAME and kind not in STEPS:
            raise ArtifactError(f"no step {kind!r} is known: import the file that registers it")
        kinds.append(made[settings] if kind == SAME else STEPS[kind])
    ranks = [kind.rank for kind in kinds]
    if ranks != sorted(set(ranks)):
        raise ArtifactError("its steps are not in their order, one of each")
    carrier, leading = _leading(kinds, weight.name)
    stored = None
    if carrier is None:
        stored = read.tensor(original.shape, original.dtype, like=original)
    steps: list = [None] * len(kinds)
    for i in sorted(range(len(kinds)), key=lambda i: i != carrier):
        kind, settings = entry.steps[i]
        if kind == SAME:
            steps[i] = made[settings]
            continue
        steps[i], value = STEPS[kind].decode(settings, read, weight, stored, parts)
        if i == carrier:
            stored = _checked(value, original)
        made.append(steps[i])
    value = stored
    for i, (kind, _) in enumerate(entry.steps):
        if i >= leading or kind == SAME:
            value = _checked(steps[i](value), original)
        if i < leading and value is not stored and not torch.equal(value, stored):
            raise ArtifactError("a step that it shares changes its stored value")
    value = stored if trainable else value
    if original.is_meta:
        weight.become(value.contiguous())
    else:
        weight.assign(value)
    if trainable and steps:
        weight.set_steps(steps)


def _checked(value: Tensor, original: Tensor) -> Tensor:
    """What a step gave, if it can be the weight's value."""
    if value.shape != original.shape or value.dtype != original.dtype or not is_finite(value):
        found = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ArtifactError(f"its steps give {found}, or NaN or infinities, which it cannot hold")
    return value
