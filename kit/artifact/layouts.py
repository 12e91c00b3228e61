"""How the entries of a tensor become bytes: a class a layout, of which the smallest is taken.

dense     every entry: codes at their bit width, anything else as it is
bitmap    one bit an entry for "not zero", then the entries that are not
gaps      the entries that are not zero, and the range-coded distances between them
entropy   all codes range-coded (kit.core.range_coder); codes only
streams   all codes by rANS (kit.core.ans); codes only, and in place of `entropy` where that is slow

All of them work on a flat array of integers: codes, or the bits of a float (so -0.0 is not zero).
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kit.core import ans, range_coder
from kit.core.weights import is_finite
from kit.quantization.packing import pack, packed_bytes, unpack


class ArtifactError(ValueError):
    """A file that is no artifact, is damaged, or does not fit the model it is loaded into."""


@dataclass(frozen=True)
class Entries:
    """What a tensor's entries are.

    bits: of a code, or "ternary"; None for entries as they are in memory, of `dtype`.
    origin: int array, the code of each entry that means zero; None where that is 0.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int32
    bits: int | str | None = None
    origin: np.ndarray | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape) * (2 if self.dtype == torch.complex128 else 1)

    @property
    def unit(self) -> str:
        return f"u{min(self.dtype.itemsize, 8)}" if self.bits is None else "i4"

    def zeros(self) -> np.ndarray:
        return np.zeros(self.count, self.unit) if self.origin is None else self.origin.copy()

    def nbytes(self, count: int) -> int:
        return count * int(self.unit[1]) if self.bits is None else packed_bytes(count, self.bits)

    def pack(self, values: np.ndarray) -> bytes:
        return values.tobytes() if self.bits is None else pack(values, self.bits)

    def unpack(self, data: bytes, count: int) -> np.ndarray:
        if self.bits is None:
            return np.frombuffer(data, self.unit)
        return unpack(data, count, self.bits)

    def array(self, tensor: Tensor) -> np.ndarray:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if self.bits is not None:
            return flat.to(torch.int32).numpy()
        return np.frombuffer(flat.view(torch.uint8).numpy().tobytes(), self.unit)

    def tensor(self, values: np.ndarray) -> Tensor:
        values = np.require(values, self.unit, "W")  # a copy where it may not be written
        if self.bits is not None:
            return torch.from_numpy(values).reshape(self.shape)
        raw = torch.from_numpy(values.view(np.uint8)) if self.count else torch.empty(0)
        return raw.view(self.dtype).reshape(self.shape)


class Dense:
    letter = "d"

    def encode(self, kind: Entries, values: np.ndarray) -> bytes:
        return kind.pack(values)

    def decode(self, kind: Entries, data: bytes) -> np.ndarray:
        _expect(len(data), kind.nbytes(kind.count))
        return kind.unpack(data, kind.count)


class Bitmap:
    letter = "b"

    def encode(self, kind: Entries, values: np.ndarray) -> bytes:
        nonzero = values != kind.zeros()
        return np.packbits(nonzero).tobytes() + kind.pack(values[nonzero])

    def decode(self, kind: Entries, data: bytes) -> np.ndarray:
        length, values = -(-kind.count // 8), kind.zeros()
        _expect(min(len(data), length), length)
        bits = np.unpackbits(np.frombuffer(data[:length], np.uint8))[: kind.count].astype(bool)
        _expect(len(data), length + kind.nbytes(int(bits.sum())))
        values[bits] = kind.unpack(data[length:], int(bits.sum()))
        return values


class Gaps:
    letter = "g"

    def encode(self, kind: Entries, values: np.ndarray) -> bytes | None:
        at = np.flatnonzero(values != kind.zeros())
        if not len(at):
            return b""
        if len(at) >= MANY:
            return None
        gaps = range_coder.encode(np.diff(at, prepend=-1)[None] - 1)
        return struct.pack("<I", len(at)) + kind.pack(values[at]) + gaps

    def decode(self, kind: Entries, data: bytes) -> np.ndarray:
        values = kind.zeros()
        if not data:
            return values
        count = int.from_bytes(data[:4], "little")
        end = 4 + kind.nbytes(count)
        _expect(min(len(data), end), end)
        if not 1 <= count <= kind.count:
            raise ArtifactError(f"it holds {count} sparse entries where {kind.count} belong")
        gaps = range_coder.decode(data[end:], (1, count))[0].astype(np.int64)
        at = np.cumsum(gaps + 1) - 1
        if gaps.min() < 0 or at[-1] >= kind.count:
            raise ArtifactError("its sparse entries lie outside their tensor")
        values[at] = kind.unpack(data[4:end], count)
        return values


class Coded:
    """All codes by a coder, where it `takes` them."""

    def __init__(self, letter: str, coder, takes: Callable[[np.ndarray], bool]):
        self.letter, self.coder, self.takes = letter, coder, takes

    def encode(self, kind: Entries, values: np.ndarray) -> bytes | None:
        if kind.bits is None:
            return None
        codes = (values - kind.zeros()).reshape(kind.shape)
        return self.coder.encode(codes) if self.takes(codes) else None

    def decode(self, kind: Entries, data: bytes) -> np.ndarray:
        if kind.bits is None:
            raise ArtifactError("its layout is for codes, which it does not hold")
        codes = self.coder.decode(data, kind.shape).reshape(-1)
        if kind.origin is not None:
            codes = codes + kind.origin
        half = 1 if kind.bits == "ternary" else 2 ** (kind.bits - 1)
        top = 1 if kind.bits == "ternary" else half - 1
        if codes.size and not -half <= codes.min() <= codes.max() <= top:
            raise ArtifactError(f"its codes leave the range of {kind.bits} bits")
        return codes


def _streamed(codes: np.ndarray) -> float | None:
    """Bytes of rANS, estimated, where the adaptive coder would take long and gain little: many
    codes of over a bit; else None."""
    if codes.size < MANY or not ans.fits(codes):
        return None
    size = ans.estimate(codes)
    return size if 8 * size > codes.size else None


def coded_bytes(codes: np.ndarray) -> int:
    """Bytes that a matrix of codes takes, range-coded; within 1 % where it is large."""
    size = _streamed(codes)
    return len(range_coder.encode(codes)) if size is None else round(size)


LAYOUTS = {
    "dense": Dense(),
    "bitmap": Bitmap(),
    "gaps": Gaps(),
    "entropy": Coded("e", range_coder, lambda codes: _streamed(codes) is None),
    "streams": Coded("s", ans, ans.fits),
}
LETTERS = {layout.letter: layout for layout in LAYOUTS.values()}
MANY = 1 << 20  # numbers that take the adaptive coder too long
INTEGERS = "i"  # range-coded numbers of no particular width
MOST = 2**24  # entries that anything may have; more only what is no larger than its weight


def _expect(found: int, expected: int) -> None:
    if found != expected:
        raise ArtifactError(f"it holds {found} bytes where {expected} belong")


def _entries(shape: Sequence[int], dtype: torch.dtype) -> Entries:
    """Booleans are codes of one bit, 0 and -1, in a matrix."""
    shape = tuple(shape)
    if dtype != torch.bool:
        return Entries(shape, dtype)
    rows = shape[0] if len(shape) > 1 else 1
    return Entries((rows, math.prod(shape) // max(rows, 1)), bits=1)


def _codes(shape: tuple[int, int], bits: int | str, origin: Tensor | None) -> Entries:
    flat = None if origin is None else origin.cpu().numpy().reshape(-1).astype(np.int32)
    return Entries(tuple(shape), bits=bits, origin=flat)


class Writer:
    """Collects the tensors of a file as bytes, and `letters` that tell each one's layout."""

    def __init__(self, layouts: Sequence[str] = tuple(LAYOUTS)):
        self.layouts = [layout for name, layout in LAYOUTS.items() if name in layouts]
        self.blobs, self.letters = [], ""

    def tensor(self, tensor: Tensor) -> None:
        kind = _entries(tensor.shape, tensor.dtype)
        self._smallest(kind, -tensor.int() if tensor.dtype == torch.bool else tensor)

    def codes(self, codes: Tensor, bits: int | str, origin: Tensor | None = None) -> None:
        """codes: (rows, columns) integers of `bits`; origin: the codes that mean zero, if not 0."""
        self._smallest(_codes(codes.shape, bits, origin), codes)

    def integers(self, values: np.ndarray) -> None:
        """Integers (n,) of any size below 2**31, best when most are small."""
        self._add(INTEGERS, range_coder.encode(values[:, None]))

    def _smallest(self, kind: Entries, tensor: Tensor) -> None:
        values = kind.array(tensor)
        least = kind.nbytes(kind.count)  # of the dense form, which is made only where it is kept
        coders = [layout for layout in self.layouts if not isinstance(layout, Dense)]
        tried = [(layout.letter, layout.encode(kind, values)) for layout in coders]
        tried = [found for found in tried if found[1] is not None]
        best = min(tried, key=lambda found: len(found[1]), default=None)
        dense = best is None or (LAYOUTS["dense"] in self.layouts and least <= len(best[1]))
        self._add(*(("d", kind.pack(values)) if dense else best))

    def _add(self, letter: str, data: bytes) -> None:
        self.letters += letter
        self.blobs.append(data)


class Reader:
    """Gives the tensors back in the order in which a Writer took them, whatever the bytes are: of
    the shape and dtype asked for, codes within their bits, floats finite, and nothing is allocated
    that is larger than the weight (`size` entries) or 2**24 entries; or it raises ArtifactError."""

    def __init__(self, letters: str, blobs: Sequence[bytes], size: int = 0):
        self.left, self._most = list(zip(letters, blobs, strict=True)), max(size, MOST)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, like: Tensor | None = None):
        """like: a tensor that may hold NaN or infinities where the file has them."""
        found = self._read(_entries(shape, dtype))
        if dtype == torch.bool:
            return (found != 0).reshape(tuple(shape))
        if not is_finite(found) and (
            like is None or not (found.isfinite() | found.isclose(like, 0, 0, True)).all()
        ):
            raise ArtifactError("it holds NaN or infinite values")
        return found

    def codes(
        self, shape: tuple[int, int], bits: int | str, origin: Tensor | None = None
    ) -> Tensor:
        return self._read(_codes(shape, bits, origin))

    def integers(self, count: int) -> np.ndarray:
        return range_coder.decode(self._next(INTEGERS, count), (count, 1))[:, 0].astype(np.int64)

    def _read(self, kind: Entries) -> Tensor:
        letter = self.left[0][0] if self.left else ""
        data = self._next("".join(LETTERS), kind.count)
        return kind.tensor(LETTERS[letter].decode(kind, data))

    def _next(self, layouts: str, count: int) -> bytes:
        if not self.left:
            raise ArtifactError("it has fewer parts than its steps need")
        letter, data = self.left.pop(0)
        if letter not in layouts:
            raise ArtifactError(f"its layout {letter!r} is none of {layouts!r}")
        if count > self._most:
            raise ArtifactError(f"a part of {count:,} entries is larger than the weight itself")
        return data
