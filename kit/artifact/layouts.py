"""One tensor as bytes and back, in whichever layout is smallest.

dense     every value: codes at their bit width, floats as they are
bitmap    one bit a value for "not zero", then the values that are not
gaps      the range-coded distances between values that are not zero, then those values
entropy   all codes range-coded (kit.core.range_coder); codes only

A tensor is described by an entry of plain JSON and a list of byte strings.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from kit.core import range_coder as coding
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize
from kit.quantization.formats import Format
from kit.quantization.packing import pack, unpack

LAYOUTS = ("dense", "bitmap", "gaps", "entropy")
DEFAULT_FORMAT = dataclasses.asdict(Format())


def encode_float(tensor: Tensor, layouts: tuple[str, ...] = LAYOUTS) -> tuple[dict, list[bytes]]:
    """A tensor of any dtype, in its own dtype."""
    entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    values = tensor.detach().cpu().reshape(-1)
    candidates = {"dense": [_raw(values)]}
    nonzero = (values != 0).numpy()
    if not nonzero.all():
        kept = _raw(values[torch.from_numpy(nonzero)])
        candidates |= {"bitmap": [_bitmap(nonzero), kept], "gaps": [_gaps(nonzero), kept]}
    return _smallest(entry, candidates, nonzero, layouts)


def encode_codes(weight: Tensor, quantizer: FakeQuantize,
                 layouts: tuple[str, ...] = LAYOUTS) -> tuple[dict, list[bytes]]:
    """The integer codes, scales and zero points of a weight under its quantizer."""
    format = quantizer.format
    codes, scale, zero = (None if t is None else t.cpu() for t in quantizer.codes(weight))
    centred = codes.int() if zero is None else _shift(codes.int(), -zero, format)
    nonzero = (centred != 0).reshape(-1).numpy()
    kept = pack(codes.reshape(-1).numpy()[nonzero], format.bits)
    candidates = {"dense": [pack(codes.numpy(), format.bits)], "entropy": [coding.encode(centred.numpy())],
                  "bitmap": [_bitmap(nonzero), kept], "gaps": [_gaps(nonzero), kept]}
    changed = {k: v for k, v in dataclasses.asdict(format).items() if v != DEFAULT_FORMAT[k]}
    entry = {"shape": list(weight.shape), "rows": quantizer.shape[0], "format": changed}
    entry, parts = _smallest(entry, candidates, nonzero, layouts)
    parts.append(_encode_scale(scale, format))
    return entry, parts if zero is None else [*parts, zero.to(torch.int8).numpy().tobytes()]


def decode(entry: dict, parts: list[bytes]) -> Tensor:
    """The tensor that was encoded: floats exactly; codes dequantized, exactly as the fake quantizer does
    it.
    """
    return _decode_codes(entry, list(parts)) if "format" in entry else _decode_float(entry, list(parts))


def decode_grid(entry: dict, parts: list[bytes]) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (blocks, 1) of an encoded weight, the zero point None if its format is
    symmetric.
    """
    format, shape = format_of(entry), shape_of(entry)
    if format.symmetric:
        return _decode_scale(parts[-1], format, shape), None
    return _decode_scale(parts[-2], format, shape), _from_raw(parts[-1], torch.int8).float()[:, None]


def shape_of(entry: dict) -> tuple[int, int]:
    """How the codes of an encoded weight are laid out, as (rows, columns)."""
    rows = entry["rows"]
    return rows, math.prod(entry["shape"]) // rows if rows else 0


def format_of(entry: dict) -> Format:
    return Format(**entry["format"])


def _smallest(entry, candidates, nonzero, layouts):
    allowed = {k: v for k, v in candidates.items() if k in layouts} or {"dense": candidates["dense"]}
    layout, parts = min(allowed.items(), key=lambda item: sum(map(len, item[1])))
    if layout == "gaps":
        entry["nonzero"] = int(nonzero.sum())
    return {**entry, "layout": layout}, list(parts)


def _raw(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _from_raw(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _bitmap(nonzero: np.ndarray) -> bytes:
    return np.packbits(nonzero).tobytes()


def _gaps(nonzero: np.ndarray) -> bytes:
    return coding.encode(np.diff(np.flatnonzero(nonzero), prepend=-1)[None] - 1)


def _nonzero(entry: dict, data: bytes) -> np.ndarray:
    count = math.prod(entry["shape"])
    if entry["layout"] == "bitmap":
        return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)
    mask = np.zeros(count, bool)
    mask[np.cumsum(coding.decode(data, (1, entry["nonzero"]))[0].astype(np.int64) + 1) - 1] = True
    return mask


def _shift(codes: Tensor, zero: Tensor, format: Format) -> Tensor:
    return formats.from_blocks(formats.to_blocks(codes, format) + zero.int(), tuple(codes.shape), format)


def _decode_float(entry: dict, parts: list[bytes]) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    if entry["layout"] == "dense":
        return _from_raw(parts[0], dtype).reshape(entry["shape"])
    values = torch.zeros(math.prod(entry["shape"]), dtype=dtype)
    values[torch.from_numpy(_nonzero(entry, parts[0]))] = _from_raw(parts[1], dtype)
    return values.reshape(entry["shape"])


def _decode_codes(entry: dict, parts: list[bytes]) -> Tensor:
    format, shape = format_of(entry), shape_of(entry)
    scale, zero = decode_grid(entry, parts)
    if entry["layout"] == "dense":
        codes = torch.from_numpy(unpack(parts[0], math.prod(shape), format.bits)).reshape(shape)
    elif entry["layout"] == "entropy":
        codes = torch.from_numpy(coding.decode(parts[0], shape))
        codes = codes if zero is None else _shift(codes, zero, format)
    else:
        nonzero = torch.from_numpy(_nonzero(entry, parts[0]))
        codes = torch.zeros(shape, dtype=torch.int32)
        codes = (codes if zero is None else _shift(codes, zero, format)).reshape(-1)
        codes[nonzero] = torch.from_numpy(unpack(parts[1], int(nonzero.sum()), format.bits)).int()
        codes = codes.reshape(shape)
    values = formats.dequantize(formats.to_blocks(codes, format), scale, zero)
    return formats.from_blocks(values, shape, format).reshape(entry["shape"])


def _encode_scale(scale: Tensor, format: Format) -> bytes:
    if format.scale == "log8":
        codes, largest = formats.log_scale_codes(scale)
        return codes.numpy().tobytes() + _raw(largest.reshape(1))
    return _raw(scale.reshape(-1).half() if format.scale == "float16" else scale.reshape(-1))


def _decode_scale(data: bytes, format: Format, shape: tuple[int, int]) -> Tensor:
    count = formats.block_count(shape, format)
    if format.scale == "log8":
        scale = formats.log_scale_values(_from_raw(data[:count], torch.uint8), _from_raw(data[count:], torch.float32))
    else:
        scale = _from_raw(data, torch.float16 if format.scale == "float16" else torch.float32).float()
    return scale[:, None]
