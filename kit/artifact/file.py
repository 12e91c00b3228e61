"""The compressed file: each weight's stored value and the steps on it, and how to rebuild the
model.

Layout: magic (4 bytes), header length (4), header (zlib, JSON), blobs one after another, SHA-256 of
all before it (32). Nothing in it is executable. A weight's steps are written in their order,
whatever they are (kit.core.steps); each tensor takes whichever layout of kit.artifact.layouts is
smallest.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kit.artifact import kit3
from kit.artifact.header import MAGIC, SAME, Entry, Header, sealed, unsealed
from kit.artifact.layouts import INTEGERS, LAYOUTS, MOST, ArtifactError, Reader, Writer, is_finite
from kit.core.protocols import bare
from kit.core.steps import STEPS, Step
from kit.core.store import atomic
from kit.core.weights import Weight, materialize, weights
from kit.models import build_model, recipe
from kit.pruning import mask  # noqa: F401 registers its step
from kit.quantization import fake, token_tables  # noqa: F401 register their steps
from kit.quantization.activations import ACTIVATION_MODULES

SPARSEST = 2**10  # entries a byte of a file, beyond MOST in all: larger ones need `load(model=)`


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
        model: an instance to fill and return, for models that are not the kit's own.
        trainable: put the steps of the saved model back on, so that training can go on.
        parts: (V, 2), what each token was merged from, for tables composed of them.
    Raises ArtifactError: the file is no artifact, was cut or edited, contradicts itself, has other
        tensors than the model, or NaN or infinities where that has none. Nothing is allocated that
        the model or the file's bytes do not justify.
    """
    header, blobs = _read(path)
    what = "its header"
    try:
        filled = _prepared(header, None if model is None else bare(model), sum(map(len, blobs)))
        targets, made, rest = _targets(filled), [], iter(blobs)
        for entry in header.tensors:
            what, target = repr(entry.name), targets[entry.name]
            original = target.original if isinstance(target, Weight) else target
            read = Reader(entry.letters, [next(rest) for _ in entry.sizes], original.numel())
            with torch.no_grad():
                if isinstance(target, Weight):
                    _decode(entry, target, read, made, trainable, parts)
                else:
                    target.copy_(read.tensor(target.shape, target.dtype, like=target))
            if read.left:
                raise ArtifactError("it has more parts than its steps need")
    except Exception as error:  # steps and models may be anybody's: what they raise is told alike
        why = str(error).partition("\n")[0][:500] or type(error).__name__
        raise ArtifactError(f"{path} cannot be read, {what}: {why}") from error
    return (filled if model is None else model).eval()


def describe(path: str | os.PathLike):
    """Where every byte of the file went: a row a tensor, and one for header and checksum.

    Returns a DataFrame: tensor, shape, bits ("float32" and the like for floats), layout, values,
    bytes, bits_per_value.
    """
    import pandas as pd

    header, _ = _read(path)
    rows = []
    for entry in header.tensors:
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
            write.tensor(target)
            entry = _kind(target)
        entry |= {"in": write.letters} if write.letters != "d" else {}
        sizes = [len(blob) for blob in write.blobs]
        header["tensors"].append({"name": name, **entry, "sizes": sizes})
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
    if not is_finite(stored):
        raise ValueError(f"{weight.name!r} holds NaN or infinities, which `load` would refuse")
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
    return _kind(weight.original) | ({"steps": entries} if entries else {})


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


def _kind(tensor: Tensor) -> dict:
    dtype = {} if tensor.dtype == torch.float32 else {"dtype": _name(tensor.dtype)}
    return {"shape": list(tensor.shape), **dtype}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
                json.dumps(found[path], allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(
                    f"the extra state of {path!r} is no plain JSON, all that a file holds"
                ) from None
    return found


# Reading


def _read(path: str | os.PathLike) -> tuple[Header, list]:
    """Header and blobs of a file that is whole."""
    data = memoryview(Path(path).read_bytes())
    try:
        header, blobs = unsealed(data, path)
        if data[:4] != MAGIC:
            header, blobs = kit3.upgraded(header, [bytes(blob) for blob in blobs])
        header = msgspec.convert(header, Header)
        for entry in header.tensors:
            kinds = [STEPS[kind].settings if kind in STEPS else Any for kind, _ in entry.steps]
            entry.steps = [(kind, msgspec.convert(stated, known))
                           for (kind, stated), known in zip(entry.steps, kinds)]  # fmt: skip
    except Exception as error:  # it may be any JSON
        if isinstance(error, ArtifactError):
            raise
        why = f"{type(error).__name__}: {error}".partition("\n")[0][:500]
        raise ArtifactError(f"{path} has no readable header ({why}): write it again") from None
    return header, blobs


def _prepared(header: Header, model: nn.Module | None, held: int) -> nn.Module:
    """The model to fill, with modules and extra state, after all that the header says was held
    against it, or against a skeleton that takes no memory. held: bytes of the file's tensors."""
    shown = _skeleton(header, held) if model is None else model
    with torch.device("meta"):
        modules = {name: _quantizer(stated) for name, stated in header.modules.items()}
    kinds = (nn.Identity, *ACTIVATION_MODULES.values())
    for name in modules:
        path, _, leaf = name.rpartition(".")
        holder = shown.get_submodule(path)
        if not isinstance(holder._modules.get(leaf), kinds) and (not leaf or hasattr(holder, leaf)):
            raise ArtifactError(f"the model has no place for a quantizer at {name!r}")
    for name in header.extra.keys() ^ _extra_state(shown).keys():
        raise ArtifactError(f"extra state of {name!r} is in one of file and model only")
    _check_tensors(header, shown, modules)
    if model is None:
        with torch.random.fork_rng(devices=[]):
            model = build_model(header.model.kind, header.model.config)
    for name, stated in header.modules.items():
        model.set_submodule(name, _quantizer(stated))
    for name, state in header.extra.items():
        model.get_submodule(name).set_extra_state(state)
    return model


def _quantizer(stated: dict) -> nn.Module:
    """The activation quantizer that the header states: a class of the kit's and its settings."""
    made = ACTIVATION_MODULES[stated["class"]](**{k: v for k, v in stated.items() if k != "class"})
    if json.dumps({"class": stated["class"], **made.settings()}) != json.dumps(stated):
        raise ArtifactError(f"{stated} are not the settings of a {stated['class']}")
    return made


class _Calls(TorchFunctionMode):
    """Ends the building of a model that calls torch more often than its tensors can need, and
    writes to none of them, as a skeleton holds no values."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.left -= 1
        if self.left < 0:
            raise ArtifactError("its config describes more layers than it holds tensors of")
        name, options = getattr(function, "__name__", ""), options or {}
        if name.endswith("_") and not name.endswith("__"):
            return (*arguments, *options.values())[0]
        return function(*arguments, **options)


def _skeleton(header: Header, held: int) -> nn.Module:
    """The kit's own model of the header, on the meta device. No size in its config can exceed the
    entries of its tensors, and these not by far the bytes that are there."""
    if header.model is None:
        raise ArtifactError("it holds a model that is not the kit's: pass load(path, model=...)")
    entries = sum(math.prod(entry.shape) for entry in header.tensors)
    if entries > MOST + SPARSEST * held:
        much = f"{entries:,} entries in {held:,} bytes"
        raise ArtifactError(f"{much} are hardly a model: pass load(path, model=...) if they are")
    for name, value in header.model.config.items():
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and size > entries:
                raise ArtifactError(f"its config has {name} = {value} for {entries:,} entries")
    grad = torch.set_grad_enabled(torch.is_grad_enabled())  # stays, wherever the building ends
    with grad, torch.device("meta"), _Calls(100 * (len(header.tensors) + 10)):
        return build_model(header.model.kind, header.model.config)


def _check_tensors(header: Header, model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Raises ArtifactError unless the file has the tensors of the model and these modules."""
    inside = tuple(f"{name}." for name in modules)
    targets = {k: v for k, v in _targets(model).items() if not k.startswith(inside)}
    targets |= {f"{k}.{name}": b for k, m in modules.items() for name, b in m.named_buffers()}
    stored = {entry.name: entry for entry in header.tensors}
    if len(stored) < len(header.tensors):
        raise ArtifactError("it has two tensors of one name")
    for name in stored.keys() ^ targets.keys():
        here, there = ("file", "model") if name in stored else ("model", "file")
        where = f"in the {here} but not in the {there}"
        raise ArtifactError(f"it does not fit: {name!r} is {where}; use the same config")
    for name, target in targets.items():
        tensor, entry = target.original if isinstance(target, Weight) else target, stored[name]
        ours = _name(tensor.dtype), list(tensor.shape)
        theirs = entry.dtype or ours[0], entry.shape
        if ours != theirs:
            kinds = "{} of shape {}, the model expects {} of shape {}".format(*theirs, *ours)
            raise ArtifactError(f"it holds {name!r} as {kinds}: convert it first")


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
    weight.assign(stored if trainable else value)
    if trainable and steps:
        weight.set_steps(steps)


def _checked(value: Tensor, original: Tensor) -> Tensor:
    """What a step gave, if it can be the weight's value."""
    if value.shape != original.shape or value.dtype != original.dtype or not is_finite(value):
        found = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ArtifactError(f"its steps give {found}, or NaN or infinities, which it cannot hold")
    return value
