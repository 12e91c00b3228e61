"""Integer codes as bytes, at every width, and back."""

import numpy as np

TRITS = np.array([1, 3, 9, 27, 81], np.uint8)
SHIFTS = {bits: np.arange(0, 8, bits, np.uint8) for bits in (1, 2, 4)}


def packed_bytes(count: int, bits: int | str) -> int:
    """Bytes that `count` codes take: bits / 8 each, or five ternary codes a byte."""
    return -(-count // 5) if bits == "ternary" else -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int | str) -> bytes:
    """Signed codes of a `bits`-wide two's-complement range (or -1, 0, 1: "ternary") as bits.

    >>> len(pack(np.array([-4, 3, 0]), 3))
    2
    """
    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.int16)
    if bits == "ternary":
        digits = np.pad(flat + 1, (0, -len(flat) % 5)).astype(np.uint8).reshape(-1, 5)
        return (digits * TRITS).sum(1, dtype=np.uint8).tobytes()
    unsigned = (flat + 2 ** (bits - 1)).astype("<u2" if bits > 8 else "u1")
    if bits == 8:
        return unsigned.tobytes()
    if 8 % bits == 0:
        parts = np.pad(unsigned, (0, -len(flat) % (8 // bits))).reshape(-1, 8 // bits)
        return np.bitwise_or.reduce(parts << SHIFTS[bits], axis=1).tobytes()
    raw = unsigned[:, None].view(np.uint8)
    planes = np.unpackbits(raw, axis=1, bitorder="little")[:, :bits]
    return np.packbits(planes, bitorder="little").tobytes()


def unpack(data: bytes, count: int, bits: int | str) -> np.ndarray:
    """The `count` codes that `pack` wrote, int8 (of 12 bits int16); len(data) must be
    `packed_bytes(count, bits)`."""
    raw = np.frombuffer(data, np.uint8)
    if bits == "ternary":
        return (raw[:, None] // TRITS % 3).astype(np.int8).reshape(-1)[:count] - np.int8(1)
    if bits == 8:
        return (raw ^ 0x80).view(np.int8)
    if 8 % bits == 0:
        parts = raw[:, None] >> SHIFTS[bits] & np.uint8(2**bits - 1)
        return parts.reshape(-1)[:count].view(np.int8) - np.int8(2 ** (bits - 1))
    planes = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
    whole = np.packbits(planes, axis=1, bitorder="little").reshape(-1)
    unsigned = whole.view("<u2" if bits > 8 else "u1").astype(np.int16)
    return (unsigned - 2 ** (bits - 1)).astype(np.int16 if bits > 8 else np.int8)
