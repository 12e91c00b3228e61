"""The compressed file: integer codes really packed or range-coded, scales, sparse floats, and how to
rebuild the model.

Layout: magic (4 bytes), header length (4), header (zlib, JSON), blobs one after another, SHA-256 of all
before it (32). Nothing in it is executable. Each tensor is written in whichever layout of kit.artifact.layouts is
smallest.
"""

import hashlib
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
from torch import Tensor

from kit.artifact.layouts import LAYOUTS, decode, decode_grid, encode_codes, encode_float, format_of, shape_of
from kit.models import build_model, recipe
from kit.core.weights import bake, find_step, named_weights, original_of, set_steps, steps_of
from kit.pruning.mask import Mask
from kit.quantization.activations import ACTIVATION_MODULES
from kit.quantization.composition import Composition, parts_checksum
from kit.quantization.fake import FakeQuantize, matrix_shape, seen_by
from kit.quantization.formats import HALF
from kit.quantization.ordering import RowOrder

MAGIC, EARLIER = b"KIT3", (b"KIT1", b"KIT2")  # whose range coders were others
CHECKSUM = 32


class ArtifactError(ValueError):
    """A file that is no artifact, is damaged, or does not fit the model it is loaded into."""


def save(model: nn.Module, path: str | os.PathLike, layouts: tuple[str, ...] = LAYOUTS) -> int:
    """Writes the model, with the formats and masks it carries, and returns the bytes of the file.

    Quantized weights are stored as codes, other tensors in their own dtype. Models of kit.models can be
    loaded without further help; any other model needs an instance of the same shapes to load into. The
    file is written whole or not at all.
    """
    data, path = _serialized(model, layouts), Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
    return len(data)


def nbytes(model: nn.Module, layouts: tuple[str, ...] = LAYOUTS) -> int:
    """Bytes that the file of `save` would have."""
    return len(_serialized(model, layouts))


def load(path: str | os.PathLike, model: nn.Module | None = None, trainable: bool = False,
         parts: np.ndarray | None = None) -> nn.Module:
    """The model in the file, in evaluation mode, its weights dequantized to floats.

    Its outputs equal those of the fake-quantized model that was saved, to the last bit.

    Args:
        model: an instance to fill, for models that are not the kit's own; it is changed and returned.
        trainable: put the masks and fake quantizers of the saved model back on, so that training can go on.
        parts: what each token was merged from (`BPETokenizer.parts`), for files whose token tables were composed of them.
    Raises ArtifactError: the file is not an artifact, was cut or edited, or has other tensors than the model.
    """
    header, blobs = _read(path)
    if model is None:
        model = _rebuild(header, path)
    _restore_modules(model, header["modules"], path)
    targets = _tensors(model)
    _check_shapes(header, targets, path)
    _check_parts(header, parts, path)
    grids, after, order = {}, {}, None
    with torch.no_grad():
        for entry in header["tensors"]:
            data, name = [next(blobs) for _ in entry["sizes"]], entry["name"]
            after[name] = []
            if "ordered" in entry:
                *data, classes = data
                order = RowOrder.decode(classes, entry["shape"][0], parts if entry["ordered"] else None) if classes else order
                after[name].append(order)
            if "composed" in entry:
                after[name].append(_composition(entry, data[-4:], parts))
                data = data[:-4]
            targets[name].copy_(decode(entry, data))
            if trainable and "format" in entry:
                grids[name] = decode_grid(entry, data)
            else:
                targets[name].copy_(nn.Sequential(*after[name])(targets[name]))
    if trainable:
        _restore_steps(model, header["tensors"], grids, after)
    return model.eval()


def _check_parts(header: dict, parts: np.ndarray | None, path) -> None:
    for entry in header["tensors"]:
        checksum, name = entry.get("composed", {}).get("parts") or entry.get("ordered"), entry["name"]
        if checksum and parts is None:
            raise ArtifactError(f"{path} composes {name!r} of the tokenizer's merges: pass load(path, parts=tokenizer.parts)")
        if checksum and parts_checksum(parts) != checksum:
            raise ArtifactError(f"{path} was composed with another tokenizer's merges than the parts given: use its own")


def _composition(entry: dict, data: list[bytes], parts: np.ndarray) -> Composition:
    composition = Composition(parts, entry["shape"][-1])
    composition.basis.copy_(decode(entry["composed"]["basis"], data[:2]))
    for factor, half in zip((composition.left, composition.right), data[2:]):
        factor.copy_(torch.frombuffer(bytearray(half), dtype=torch.float16))
    return composition


def float32_bytes(model: nn.Module) -> int:
    """Bytes of the model's uncompressed file: every tensor dense, as it is, without masks or formats."""
    return nbytes(bake(model), layouts=("dense",))


def describe(path: str | os.PathLike) -> pd.DataFrame:
    """Where every byte of the file went: a row a tensor, and one for header and checksum.

    Columns: tensor, shape, bits ("float32" and the like for floats), layout, values, bytes, bits_per_value.
    """
    header, _ = _read(path)
    rows = [{"tensor": e["name"], "shape": tuple(e["shape"]), "bits": format_of(e).bits if "format" in e else e["dtype"],
             "layout": e["layout"], "values": math.prod(e["shape"]), "bytes": sum(e["sizes"])} for e in header["tensors"]]
    for row, entry in zip(list(rows), header["tensors"]):
        if "ordered" in entry and (size := entry["sizes"][-1]):
            row["bytes"] -= size
            rows.append({"tensor": "(order of tokens)", "shape": (entry["shape"][0],), "bits": "", "layout": "entropy",
                         "values": entry["shape"][0], "bytes": size})
    overhead = os.path.getsize(path) - sum(row["bytes"] for row in rows)
    rows.append({"tensor": "(header, checksum)", "shape": (), "bits": "", "layout": "", "values": 0, "bytes": overhead})
    table = pd.DataFrame(rows)
    return table.assign(bits_per_value=8 * table["bytes"] / table["values"].where(table["values"] > 0))


# Writing


def _serialized(model: nn.Module, layouts: tuple[str, ...]) -> bytes:
    header, blobs = {"model": recipe(model), "modules": _activation_modules(model), "tensors": []}, []
    for name, entry, parts in _encoded_tensors(model, layouts):
        header["tensors"].append({"name": name, **entry, "sizes": [len(part) for part in parts]})
        blobs += parts
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = MAGIC + struct.pack("<I", len(text)) + text + b"".join(blobs)
    return body + hashlib.sha256(body).digest()


def _activation_modules(model: nn.Module) -> dict:
    found = {path: module for path, module in model.named_modules() if type(module) in ACTIVATION_MODULES.values()}
    return {path: {"class": type(module).__name__, **module.settings()} for path, module in found.items()
            if path.rpartition(".")[0] not in found}


def _buffers(model: nn.Module):
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


def _encoded_tensors(model: nn.Module, layouts: tuple[str, ...]):
    written = set()
    for name, module, attribute in named_weights(model):
        with torch.no_grad():
            entry, parts = _encode(module, attribute, layouts)
        order = find_step(module, attribute, RowOrder)
        if order is not None and "format" in entry:  # the tensors of a model that have one share it
            entry["ordered"] = 0 if order.parts is None else parts_checksum(order.parts)
            parts.append(b"" if order in written else order.encode())
            written.add(order)
        if find_step(module, attribute, Mask) is not None:
            entry["masked"] = True
        yield name, entry, parts
    for name, buffer in _buffers(model):
        yield name, *encode_float(buffer, layouts)


def _encode(module: nn.Module, attribute: str, layouts: tuple[str, ...]) -> tuple[dict, list[bytes]]:
    quantizer = find_step(module, attribute, FakeQuantize)
    if quantizer is None:
        return encode_float(getattr(module, attribute), layouts)
    if quantizer.format.bits == 16:
        entry, parts = encode_float(getattr(module, attribute).half(), layouts)
        return {**entry, "half": True}, parts
    entry, parts = encode_codes(seen_by(quantizer, module, attribute), quantizer, layouts)
    composition = find_step(module, attribute, Composition)
    if composition is not None:
        basis, more = encode_codes(composition.basis, composition.rounding, ("entropy",))
        entry["composed"] = {"parts": parts_checksum(composition.parts), "basis": basis}
        parts += more + [encode_float(factor.half(), ("dense",))[1][0] for factor in (composition.left, composition.right)]
    return ({**entry, "learned": True} if quantizer.learned else entry), parts


# Reading


def _read(path) -> tuple[dict, Iterator[bytes]]:
    """Header and an iterator over the blobs of a file that is whole."""
    data = Path(path).read_bytes()
    if data[:4] not in (MAGIC, *EARLIER):
        raise ArtifactError(f"{path} is not a kit artifact: it begins with {data[:4]!r}, expected {MAGIC!r}")
    if len(data) < 8 + CHECKSUM or hashlib.sha256(data[:-CHECKSUM]).digest() != data[-CHECKSUM:]:
        raise ArtifactError(f"{path} is damaged (its checksum does not match): copy or write it again")
    length = struct.unpack("<I", data[4:8])[0]
    try:
        header = json.loads(zlib.decompress(data[8 : 8 + length]))
        sizes = [size for entry in header["tensors"] for size in entry["sizes"]]
        header["model"], header["modules"]
        coded = any(entry["layout"] in ("entropy", "gaps") or entry.keys() & {"composed", "ordered"} for entry in header["tensors"])
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} has no readable header ({error}): write it again with kit.artifact.save") from None
    if coded and data[:4] in EARLIER:
        raise ArtifactError(f"{path} was range-coded by an earlier version of the kit: make it again with this one")
    if 8 + length + sum(sizes) + CHECKSUM != len(data) or any(size < 0 for size in sizes):
        held = len(data) - 8 - length - CHECKSUM
        raise ArtifactError(f"{path} announces {sum(sizes)} bytes of tensors but holds {held}")
    offsets = np.cumsum([8 + length, *sizes]).tolist()
    return header, (data[a:b] for a, b in zip(offsets, offsets[1:]))


def _rebuild(header: dict, path) -> nn.Module:
    stated = header["model"]
    if stated is None:
        raise ArtifactError(f"{path} holds a model that is not the kit's own: pass load(path, model=...) an instance")
    with torch.device("meta"):
        skeleton = build_model(stated["class"], stated["config"])
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    stored = {entry["name"]: tuple(entry["shape"]) for entry in header["tensors"]}
    if any(stored.get(name, shape) != shape for name, shape in shapes.items()):
        raise ArtifactError(f"{path} contradicts itself: its config and its tensors have different shapes")
    with torch.random.fork_rng(devices=[]):
        return build_model(stated["class"], stated["config"])


def _restore_modules(model: nn.Module, modules: dict, path) -> None:
    for name, settings in modules.items():
        kind = settings.pop("class")
        if kind not in ACTIVATION_MODULES:
            raise ArtifactError(f"{path} needs a module {kind!r}, which this version of the kit does not have")
        model.set_submodule(name, ACTIVATION_MODULES[kind].from_settings(settings))


def _restore_steps(model: nn.Module, entries: list[dict], grids: dict, after: dict[str, list[nn.Module]]) -> None:
    entries = {entry["name"]: entry for entry in entries}
    for name, module, attribute in list(named_weights(model)):
        entry, weight, steps = entries[name], getattr(module, attribute).detach(), []
        if entry.get("masked"):
            steps.append(Mask(weight != 0))
        if "format" in entry or entry.get("half"):
            format = format_of(entry) if "format" in entry else HALF
            shape = shape_of(entry) if "format" in entry else matrix_shape(module, weight.shape)
            quantizer = FakeQuantize(weight, shape, format, entry.get("learned", False))
            if name in grids and (quantizer.scale is not None or not torch.equal(quantizer(weight), weight)):
                quantizer.set_grid(*grids[name])  # also where rounded weights would not give their own range again
            steps.append(quantizer)
        if steps := steps + after[name]:
            set_steps(model, module, attribute, steps)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(_buffers(model))


def _check_shapes(header: dict, targets: dict[str, Tensor], path) -> None:
    stored = {entry["name"]: tuple(entry["shape"]) for entry in header["tensors"]}
    for name in stored.keys() ^ targets.keys():
        where = "the file but not in the model" if name in stored else "the model but not in the file"
        raise ArtifactError(f"{path} does not fit {name!r}: it is in {where}; load into a model of the same config")
    for name, shape in stored.items():
        if shape != tuple(targets[name].shape):
            raise ArtifactError(f"{path} holds {name!r} with shape {shape}, the model expects "
                                f"{tuple(targets[name].shape)}")
