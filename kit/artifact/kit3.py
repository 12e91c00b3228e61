"""Files of the version before, KIT3, whose tensors knew four kinds of steps in a fixed order."""

import math
import struct
from collections.abc import Iterable

from kit.artifact.layouts import LAYOUTS
from kit.quantization.formats import Format


def upgraded(header: dict, blobs: Iterable[bytes]) -> tuple[dict, list[bytes]]:
    """Header and blobs as KIT4 has them; the codes stay as they are, to the byte. Raises any
    exception for a header that is none."""
    tensors, made, source, steps = [], [], iter(blobs), _Count()
    for entry in header["tensors"]:
        letters, parts, new = _tensor(entry, [next(source) for _ in entry["sizes"]], steps)
        shape = {"name": entry["name"], "shape": entry["shape"]}
        dtype = {"dtype": None if "format" in entry or entry.get("half") else entry["dtype"]}
        found = {"steps": new} if new else {}
        found |= {"in": letters, "sizes": [len(part) for part in parts]}
        tensors.append({**shape, **dtype, **found})
        made += parts
    return {**header, "tensors": tensors}, made


class _Count:
    """Numbers the steps, and remembers the one order of rows that a file has."""

    steps, order = 0, None

    def next(self) -> int:
        self.steps += 1
        return self.steps - 1


def _tensor(entry: dict, parts: list[bytes], count: _Count) -> tuple[str, list[bytes], list]:
    """Layouts, blobs and steps of one tensor: the quantizer's blobs first, then those of the
    others."""
    parts, steps, tail, letters = list(parts), [], [], ""
    classes = parts.pop() if "ordered" in entry else None
    composed = [parts.pop() for _ in range(4)][::-1] if "composed" in entry else None
    if "format" in entry:
        letters, values, settings = _codes(entry, parts)
        steps.append(["fake_quantize", settings])
        count.next()
    else:
        letters, values = LAYOUTS[entry["layout"]].letter, [_joined(entry, parts)]
        if entry.get("half"):
            steps.append(["fake_quantize", {"format": {"bits": 16}}])
            count.next()
    if entry.get("masked"):
        steps.insert(0, ["mask", {}])
        count.next()
    if classes:
        steps.append(["row_order", {"parts": entry["ordered"]} if entry["ordered"] else {}])
        letters, tail, count.order = letters + "i", [classes], count.next()
    elif classes is not None:
        steps.append(["=", count.order])
    if composed is not None:
        basis = entry["composed"]["basis"]
        more, coded, settings = _codes(basis, composed[:2])
        steps.append(["composition", {"parts": entry["composed"]["parts"], "basis": settings}])
        letters, tail = letters + "dd" + more, [*tail, *composed[2:], *coded]
        count.next()
    return letters, [*values, *tail], steps


def _codes(entry: dict, parts: list[bytes]) -> tuple[str, list[bytes], dict]:
    """A quantized tensor: scale, zero points, codes; its entry among the steps."""
    format, parts = Format(**entry["format"]), list(parts)
    zero = [] if format.symmetric else [parts.pop()]
    scale = [parts.pop()]
    if format.scale == "log8":
        scale = [scale[0][:-4], scale[0][-4:]]
    settings = {"format": entry["format"]} if entry["format"] else {}
    shape = entry["shape"]
    if entry["rows"] != (math.prod(shape[:-1]) if len(shape) > 1 else 1):
        settings["rows"] = entry["rows"]
    if entry.get("learned"):
        settings["learned"] = 0.25
    values = [*scale, *zero, _joined(entry, parts)]
    return "d" * (len(values) - 1) + LAYOUTS[entry["layout"]].letter, values, settings


def _joined(entry: dict, parts: list[bytes]) -> bytes:
    if entry["layout"] == "gaps" and entry["nonzero"]:
        return struct.pack("<I", entry["nonzero"]) + parts[1] + parts[0]
    return b"".join(parts)
