"""Adaptive binary range coding of small integers: the entropy coder behind the artifact.

A code is written as a few binary decisions (zero?, sign, |q| > 1?, |q| > 2?, ... , then an Elias-gamma
tail), each but sign and low tail bits coded with a probability that adapts as coding goes on, so no table
is stored. The context of a decision is the recent magnitude in the same row and in the same column, for
rows of a weight matrix differ in spread, and so do columns. This is the scheme of CABAC as DeepCABAC uses
it for weights (Wiedemann et al. 2019, arXiv:1905.08318), with the carry-propagating range coder of LZMA
(Martin 1979). Integers only, so a stream decodes alike on every machine.
"""

import numpy as np
from numba import njit

LEVELS = 10           # magnitudes told apart in a row or column average
UNARY = 14            # decisions before the Elias-gamma tail
TAIL = 32             # decisions on the tail's length
BITS = 15             # of a probability
ONE = 1 << BITS
TOP = np.uint64(1 << 24)
MASK = np.uint64(0xFFFFFFFF)
BYTE = np.uint64(8)
MOST = 128            # bytes that one code can take: under 80 decisions of at most 10 bits each, and the flush


@njit(cache=True)
def _level(average):
    """Magnitude class of a running mean of |q|, in 1/256 units: 0 for none, then doubling from 1/16."""
    level = 0
    while level < LEVELS - 1 and average >= (8 << level):
        level += 1
    return level


@njit(cache=True)
def _tables():
    """Two estimates of each decision's P(bit = 0), one quick and one slow to adapt; they are averaged."""
    return np.full((LEVELS * LEVELS, UNARY + 2 * TAIL, 2), ONE // 2, np.int32)


@njit(cache=True)
def _probability(state):
    p = (state[0] + state[1]) >> 1
    return min(max(p, 32), ONE - 32)


@njit(cache=True)
def _adapt(state, bit):
    for i, shift in ((0, 5), (1, 8)):
        if bit:
            state[i] -= state[i] >> shift
        else:
            state[i] += (ONE - state[i]) >> shift


@njit(cache=True)
def _put(out, coder, probability, bit):
    """coder: low, range, cached byte, pending 0xFF count, bytes written. Codes one bit with P(0) =
    probability / ONE.
    """
    bound = (coder[1] >> np.uint64(BITS)) * np.uint64(probability)
    if bit:
        coder[0] += bound
        coder[1] -= bound
    else:
        coder[1] = bound
    while coder[1] < TOP:
        coder[1] = (coder[1] << BYTE) & MASK
        _shift(out, coder)


@njit(cache=True)
def _shift(out, coder):
    low = coder[0]
    if low < np.uint64(0xFF000000) or low > MASK:
        carry = low >> np.uint64(32)
        position = coder[4]
        out[position] = (coder[2] + carry) & np.uint64(0xFF)
        position += np.uint64(1)
        while coder[3] > np.uint64(0):
            out[position] = (np.uint64(0xFF) + carry) & np.uint64(0xFF)
            position += np.uint64(1)
            coder[3] -= np.uint64(1)
        coder[4] = position
        coder[2] = (low >> np.uint64(24)) & np.uint64(0xFF)
    else:
        coder[3] += np.uint64(1)
    coder[0] = (low << BYTE) & MASK


@njit(cache=True)
def _get(data, coder, probability):
    """coder: code, range, position. The inverse of `_put`; past the end it reads zeros."""
    bound = (coder[1] >> np.uint64(BITS)) * np.uint64(probability)
    if coder[0] < bound:
        coder[1] = bound
        bit = 0
    else:
        coder[0] -= bound
        coder[1] -= bound
        bit = 1
    while coder[1] < TOP:
        coder[1] = (coder[1] << BYTE) & MASK
        byte = np.uint64(data[coder[2]]) if coder[2] < np.uint64(len(data)) else np.uint64(0)
        coder[0] = ((coder[0] << BYTE) | byte) & MASK
        coder[2] += np.uint64(1)
    return bit


@njit(cache=True)
def _put_adaptive(out, coder, state, bit):
    """Codes a bit by its adaptive probability; returns its information content in bits."""
    p = _probability(state)
    _put(out, coder, p, bit)
    _adapt(state, bit)
    return -np.log2((ONE - p if bit else p) / ONE)


@njit(cache=True)
def _get_adaptive(data, coder, state):
    bit = _get(data, coder, _probability(state))
    _adapt(state, bit)
    return bit


@njit(cache=True)
def _encode(codes, out):
    rows, columns = codes.shape
    tables = _tables()
    column_mean = np.full(columns, 64, np.int64)
    row_mean = 64
    coder = np.array([0, 0xFFFFFFFF, 0, 0, 0], np.uint64)
    ideal = 0.0
    for r in range(rows):
        for c in range(columns):
            if coder[4] + coder[3] + np.uint64(MOST) > np.uint64(len(out)):
                return np.int64(-1), ideal
            q = np.int64(codes[r, c])
            size = abs(q)
            states = tables[_level(row_mean) * LEVELS + _level(column_mean[c])]
            for step in range(min(size + 1, UNARY)):
                ideal += _put_adaptive(out, coder, states[step], 1 if size > step else 0)
            if size:
                _put(out, coder, ONE // 2, 1 if q < 0 else 0)
                ideal += 1
            if size >= UNARY:
                tail = size - UNARY + 1
                length = 0
                while tail >> (length + 1):
                    length += 1
                for i in range(length + 1):
                    ideal += _put_adaptive(out, coder, states[UNARY + i], 1 if i < length else 0)
                for i in range(length - 1, -1, -1):
                    if i == length - 1:
                        ideal += _put_adaptive(out, coder, states[UNARY + TAIL + length], (tail >> i) & 1)
                    else:
                        _put(out, coder, ONE // 2, (tail >> i) & 1)
                        ideal += 1
            row_mean += ((size << 8) - row_mean) >> 4
            column_mean[c] += ((size << 8) - column_mean[c]) >> 4
    for _ in range(5):
        _shift(out, coder)
    return np.int64(coder[4]), ideal


@njit(cache=True)
def _decode(data, codes):
    rows, columns = codes.shape
    tables = _tables()
    column_mean = np.full(columns, 64, np.int64)
    row_mean = 64
    coder = np.array([0, 0xFFFFFFFF, 5], np.uint64)
    for i in range(5):
        byte = np.uint64(data[i]) if i < len(data) else np.uint64(0)
        coder[0] = ((coder[0] << BYTE) | byte) & MASK
    for r in range(rows):
        for c in range(columns):
            states = tables[_level(row_mean) * LEVELS + _level(column_mean[c])]
            size = 0
            while size < UNARY and _get_adaptive(data, coder, states[size]):
                size += 1
            negative = _get(data, coder, ONE // 2) if size else 0
            if size >= UNARY:
                length = 0
                while length < TAIL - 1 and _get_adaptive(data, coder, states[UNARY + length]):
                    length += 1
                tail = 1
                for i in range(length):
                    if i == 0:
                        tail = 2 | _get_adaptive(data, coder, states[UNARY + TAIL + length])
                    else:
                        tail = (tail << 1) | _get(data, coder, ONE // 2)
                size = UNARY + tail - 1
            codes[r, c] = -size if negative else size
            row_mean += ((size << 8) - row_mean) >> 4
            column_mean[c] += ((size << 8) - column_mean[c]) >> 4
    return np.int64(coder[2])


def encode(codes: np.ndarray) -> bytes:
    """Range-codes a matrix (rows, columns) of integers below 2**31 in magnitude, best when most are small."""
    return encode_with_entropy(codes)[0]


def encode_with_entropy(codes: np.ndarray) -> tuple[bytes, float]:
    """`encode`, and the information content in bits under the coder's own adaptive model."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or (codes.size and not -(2**31) < codes.min() <= codes.max() < 2**31):
        raise ValueError(f"the range coder takes a matrix of integers below 2**31 in magnitude, not shape {codes.shape}"
                         + (f" with {codes.min()} to {codes.max()}" if codes.size else ""))
    codes, room, length = np.ascontiguousarray(codes, np.int32), 2 * codes.size + MOST, -1
    while length < 0:
        out = np.empty(room, np.uint8)
        length, bits = _encode(codes, out)
        room *= 4
    return out[:length].tobytes().rstrip(b"\0"), bits


def decode(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The int32 matrix of `shape` that `encode` wrote. Any bytes decode to something: check a checksum
    first.
    """
    codes = np.empty(shape, np.int32)
    _decode(np.frombuffer(data, np.uint8), codes)
    return codes
