"""How the entries of a tensor become bytes: a class a layout, of which the smallest is taken.

dense     every entry: codes at their bit width, anything else as it is
bitmap    one bit an entry for "not zero", then the entries that are not
gaps      the entries that are not zero, and the range-coded distances between them
entropy   all codes range-coded (kit.core.range_coder); codes only
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kit.core import range_coder
from kit.quantization.packing import pack, packed_bytes, unpack


class ArtifactError(ValueError):
    """A file that is no artifact, is damaged, or does not fit the model it is loaded into."""


@dataclass(frozen=True)
class Raw:
    """Entries of any dtype as they are in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, count: int) -> int:
        return count * self.dtype.itemsize

    def nonzero(self, values: np.ndarray) -> np.ndarray:
        return values.any(1)  # a negative zero is none

    def array(self, tensor: Tensor) -> np.ndarray:
        """(count, bytes of an entry) uint8."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().reshape(self.count, self.dtype.itemsize)

    def pack(self, values: np.ndarray) -> bytes:
        return values.tobytes()

    def unpack(self, data: bytes, count: int) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(count, self.dtype.itemsize)

    def zeros(self) -> np.ndarray:
        return np.zeros((self.count, self.dtype.itemsize), np.uint8)

    def tensor(self, values: np.ndarray) -> Tensor:
        if not self.count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.from_numpy(values.reshape(-1).copy()).view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Codes:
    """A matrix of integers of `bits`; `origin`, an integer each, is the code that means zero."""

    shape: tuple[int, int]
    bits: int | str
    origin: Tensor | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, count: int) -> int:
        return packed_bytes(count, self.bits)

    def nonzero(self, values: np.ndarray) -> np.ndarray:
        return values != self.zeros()

    def array(self, codes: Tensor) -> np.ndarray:
        return codes.cpu().numpy().astype(np.int32).reshape(-1)

    def pack(self, values: np.ndarray) -> bytes:
        return pack(values, self.bits)

    def unpack(self, data: bytes, count: int) -> np.ndarray:
        return unpack(data, count, self.bits)

    def zeros(self) -> np.ndarray:
        zero = np.zeros(self.count, np.int32)
        return zero if self.origin is None else self.origin.cpu().numpy().reshape(-1).astype(np.int32)

    def tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).reshape(self.shape)


class Dense:
    letter = "d"

    def encode(self, kind: Raw | Codes, values: np.ndarray) -> bytes:
        return kind.pack(values)

    def decode(self, kind: Raw | Codes, data: bytes) -> np.ndarray:
        _expect(len(data), kind.nbytes(kind.count))
        return kind.unpack(data, kind.count)


class Bitmap:
    letter = "b"

    def encode(self, kind: Raw | Codes, values: np.ndarray) -> bytes:
        nonzero = kind.nonzero(values)
        return np.packbits(nonzero).tobytes() + kind.pack(values[nonzero])

    def decode(self, kind: Raw | Codes, data: bytes) -> np.ndarray:
        length = -(-kind.count // 8)
        bits = np.unpackbits(np.frombuffer(data[:length], np.uint8))[: kind.count].astype(bool)
        _expect(len(data), length + kind.nbytes(int(bits.sum())))
        values = kind.zeros()
        values[bits] = kind.unpack(data[length:], int(bits.sum()))
        return values


class Gaps:
    letter = "g"

    def encode(self, kind: Raw | Codes, values: np.ndarray) -> bytes:
        at = np.flatnonzero(kind.nonzero(values))
        if not len(at):
            return b""
        gaps = range_coder.encode(np.diff(at, prepend=-1)[None] - 1)
        return struct.pack("<I", len(at)) + kind.pack(values[at]) + gaps

    def decode(self, kind: Raw | Codes, data: bytes) -> np.ndarray:
        if not data:
            return kind.zeros()
        (count,) = struct.unpack("<I", data[:4].ljust(4, b"\0"))
        end = 4 + kind.nbytes(count)
        _expect(min(len(data), end), end)
        gaps = range_coder.decode(data[end:], (1, min(count, kind.count)))[0].astype(np.int64)
        at, values = np.cumsum(gaps + 1) - 1, kind.zeros()
        if count > kind.count or (len(at) and not 0 <= at.min() <= at.max() < kind.count):
            raise ArtifactError("its sparse entries lie outside their tensor")
        values[at] = kind.unpack(data[4:end], count)
        return values


class Entropy:
    letter = "e"

    def encode(self, kind: Raw | Codes, values: np.ndarray) -> bytes | None:
        if isinstance(kind, Raw):
            return None
        return range_coder.encode((values - kind.zeros()).reshape(kind.shape))

    def decode(self, kind: Codes, data: bytes) -> np.ndarray:
        return range_coder.decode(data, kind.shape).reshape(-1) + kind.zeros()


def _bits(shape: Sequence[int]) -> Codes:
    """Booleans as codes of one bit, 0 and -1."""
    first = shape[0] if len(shape) > 1 else 1
    return Codes((first, math.prod(shape) // max(first, 1)), 1)


LAYOUTS = {"dense": Dense(), "bitmap": Bitmap(), "gaps": Gaps(), "entropy": Entropy()}
LETTERS = {layout.letter: layout for layout in LAYOUTS.values()}
INTEGERS = "i"  # range-coded numbers of no particular width


def _expect(found: int, expected: int) -> None:
    if found != expected:
        raise ArtifactError(f"it holds {found} bytes where {expected} belong")


class Writer:
    """Collects the tensors of a file as bytes, and `letters` that tell each one's layout."""

    def __init__(self, layouts: Sequence[str] = tuple(LAYOUTS)):
        self.layouts = [layout for name, layout in LAYOUTS.items() if name in layouts]
        self.blobs, self.letters = [], ""

    def tensor(self, tensor: Tensor) -> None:
        if tensor.dtype == torch.bool:
            self._smallest(_bits(tensor.shape), -tensor.int())
        else:
            self._smallest(Raw(tuple(tensor.shape), tensor.dtype), tensor)

    def codes(self, codes: Tensor, bits: int | str, origin: Tensor | None = None) -> None:
        """codes: (rows, columns) integers of `bits`; origin: the codes that mean zero, if not 0."""
        self._smallest(Codes(tuple(codes.shape), bits, origin), codes)

    def integers(self, values: np.ndarray) -> None:
        """Integers (n,) of any size below 2**31, best when most are small."""
        self._add(INTEGERS, range_coder.encode(values[:, None]))

    def _smallest(self, kind: Raw | Codes, tensor: Tensor) -> None:
        values, found = kind.array(tensor), []
        for layout in self.layouts or [LAYOUTS["dense"]]:
            data = layout.encode(kind, values)
            if data is not None:
                found.append((len(data), layout.letter, data))
        if not found:
            found = [(0, "d", LAYOUTS["dense"].encode(kind, values))]
        _, letter, data = min(found, key=lambda candidate: candidate[0])
        self._add(letter, data)

    def _add(self, letter: str, data: bytes) -> None:
        self.letters += letter
        self.blobs.append(data)


class Reader:
    """Gives the tensors back in the order in which a Writer took them."""

    def __init__(self, letters: str, blobs: Sequence[bytes]):
        self._left = list(zip(letters, blobs, strict=True))

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype == torch.bool:
            return (self._read(_bits(shape)) != 0).reshape(tuple(shape))
        return self._read(Raw(tuple(shape), dtype))

    def codes(self, shape: tuple[int, int], bits: int | str, origin: Tensor | None = None) -> Tensor:
        return self._read(Codes(shape, bits, origin))

    def integers(self, count: int) -> np.ndarray:
        _, data = self._next()
        return range_coder.decode(data, (count, 1))[:, 0].astype(np.int64)

    def _read(self, kind: Raw | Codes) -> Tensor:
        letter, data = self._next()
        if letter not in LETTERS:
            raise ArtifactError(f"its layout {letter!r} is unknown")
        return kind.tensor(LETTERS[letter].decode(kind, data))

    def _next(self) -> tuple[str, bytes]:
        if not self._left:
            raise ArtifactError("a tensor has fewer parts than its steps need")
        return self._left.pop(0)
