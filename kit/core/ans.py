"""Static range coding by asymmetric numeral systems (rANS), for matrices of so many codes that the
adaptive coder of kit.core.range_coder takes too long.

The codes are counted first. Each row and each column has a level, twice the base-2 logarithm of its
mean |code| over that of all. The sum of both is the context of a code; the frequencies of each
context stand in the stream. Blocks of rows are coded apart, by all cores. A block interleaves four
32-bit states that take and give 16-bit words (Duda 2013, arXiv:1311.2540; Giesen 2014,
arXiv:1402.3392), so that damage is found: states must end as they began, on the last word.
"""

import itertools
import struct

import numpy as np
import torch

from kit.core import range_coder
from kit.core.compiled import compiled, in_threads

CONTEXTS = 16
MOST_SYMBOLS = 1024
BLOCK = 1 << 18  # codes in a block, about
LEAST = 1 << 16  # value of a state when all is read
HEAD = struct.Struct("<iHII")  # lowest code, symbols, bytes of levels, bytes of frequencies


@compiled()
def _count(codes, low, rows, columns, counts):
    top = counts.shape[0] - 1
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            context = min(max(rows[r] + columns[c], 0), top)
            counts[context, codes[r, c] - low] += 1


@compiled(inline="always")
def _put(state, context, symbol, tables, bits, words, at):
    table = tables[min(max(context, 0), tables.shape[0] - 1), symbol]  # share, start
    share, start = np.uint32(table & np.uint64(0xFFFF)), np.uint32(table >> np.uint64(16))
    words[at - 1] = state & np.uint32(0xFFFF)
    more = np.uint32(state >> np.uint32(32 - bits) >= share)
    state >>= more << np.uint32(4)
    quotient = state // share
    state = (quotient << np.uint32(bits)) + (state - quotient * share) + start
    return state, at - np.int64(more)


@compiled()
def _encode(codes, low, rows, columns, tables, bits, words, first, last):
    """Fills `words` from its end; returns where the block begins. Its four states come first."""
    a = b = c = d = np.uint32(LEAST)
    at, width, low = len(words), codes.shape[1], np.int32(low)
    even = width - width % 4
    for r in range(last - 1, first - 1, -1):
        row, level = codes[r], rows[r]
        for i in range(width + (-width) % 4 - 1, even - 1, -1):
            a, b, c, d = d, a, b, c
            if i < width:
                a, at = _put(a, level + columns[i], row[i] - low, tables, bits, words, at)
        for i in range(even - 4, -1, -4):
            d, at = _put(d, level + columns[i + 3], row[i + 3] - low, tables, bits, words, at)
            c, at = _put(c, level + columns[i + 2], row[i + 2] - low, tables, bits, words, at)
            b, at = _put(b, level + columns[i + 1], row[i + 1] - low, tables, bits, words, at)
            a, at = _put(a, level + columns[i], row[i] - low, tables, bits, words, at)
    for state in (d, c, b, a):
        at -= 2
        words[at] = state & np.uint32(0xFFFF)
        words[at + 1] = state >> np.uint32(16)
    return at


@compiled(inline="always")
def _get(state, context, low, slots, bits, words, at):
    context = min(max(context, 0), slots.shape[0] - 1)
    slot = slots[context, state & np.uint32((1 << bits) - 1)]  # symbol, share, offset
    share = np.uint32(slot >> np.uint64(16) & np.uint64(0xFFFF))
    state = share * (state >> np.uint32(bits)) + np.uint32(slot >> np.uint64(32))
    more = np.uint32(state < np.uint32(LEAST))
    state = (state << (more << np.uint32(4))) | (more * np.uint32(words[at]))
    return state, at + more, low + np.int32(slot & np.uint64(0xFFFF))


@compiled()
def _decode(words, low, rows, columns, slots, bits, codes, first, last):
    """Reads what `_encode` wrote, with room for a row of words behind it; whether it ended as it
    should."""
    a = np.uint32(words[0]) | (np.uint32(words[1]) << np.uint32(16))
    b = np.uint32(words[2]) | (np.uint32(words[3]) << np.uint32(16))
    c = np.uint32(words[4]) | (np.uint32(words[5]) << np.uint32(16))
    d = np.uint32(words[6]) | (np.uint32(words[7]) << np.uint32(16))
    width, low, least = codes.shape[1], np.int32(low), np.uint32(LEAST)
    at, end = np.uint64(8), np.uint64(len(words) - width)
    for r in range(first, last):
        row, level = codes[r], rows[r]
        for i in range(0, width - 3, 4):
            a, at, row[i] = _get(a, level + columns[i], low, slots, bits, words, at)
            b, at, row[i + 1] = _get(b, level + columns[i + 1], low, slots, bits, words, at)
            c, at, row[i + 2] = _get(c, level + columns[i + 2], low, slots, bits, words, at)
            d, at, row[i + 3] = _get(d, level + columns[i + 3], low, slots, bits, words, at)
        for i in range(width - width % 4, width + (-width) % 4):
            if i < width:
                a, at, row[i] = _get(a, level + columns[i], low, slots, bits, words, at)
            a, b, c, d = b, c, d, a
        if at > end:
            return False
    return at == end and a == least and b == least and c == least and d == least


def _levels(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level of each row (R,) and of each column (C,), the rows' from 0 to CONTEXTS, int32."""
    size, half = np.abs(codes), CONTEXTS // 2
    means = size.mean(1), size.mean(0)
    means = (np.maximum(mean, 1e-9) / max(mean.mean(), 1e-9) for mean in means)
    levels = (np.rint(2 * np.log2(mean)).clip(-half, half) for mean in means)
    rows, columns = (level.astype(np.int32) for level in levels)
    return rows + half, columns


def _bits(symbols: int) -> int:
    return 12 if symbols <= 32 else 14


def _frequencies(counts: np.ndarray, bits: int) -> np.ndarray:
    """Integers (contexts, symbols) in the ratio of the counts that sum to 2**bits, none of them 0
    where there is a count."""
    shares = np.zeros_like(counts)
    for count, share in zip(counts, shares):
        if count.sum():
            share[:] = np.maximum(np.rint(count / count.sum() * 2**bits), count > 0)
            while excess := int(share.sum()) - 2**bits:
                at = share.argmax()
                share[at] -= min(excess, int(share[at]) // 2) if excess > 0 else excess
    return shares


def _slots(share: np.ndarray, bits: int) -> np.ndarray:
    """What `_get` looks up, (2**bits,) uint64: symbol, its share, offset in 16 bits each."""
    if not share.any():
        return np.zeros(2**bits, np.uint64)
    shares, offsets = np.repeat(share, share), np.arange(2**bits)
    offsets -= np.repeat(np.cumsum(share) - share, share)
    slots = np.repeat(np.arange(len(share)), share) | shares << 16 | offsets << 32
    return slots.astype(np.uint64)


def _spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """Rows of each block."""
    pieces = max(1, min(rows, round(rows * columns / BLOCK)))
    return list(itertools.pairwise(rows * k // pieces for k in range(pieces + 1)))


def _all(work, spans: list) -> None:
    """`work(number, first, last)` for all blocks, on all cores."""
    supply = enumerate(spans)

    def run():
        for number, (first, last) in supply:
            work(number, first, last)

    in_threads(run, min(torch.get_num_threads(), len(spans)))


def _model(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels of rows and of columns, and how often each symbol comes in each context."""
    low, (rows, columns) = int(codes.min()), _levels(codes)
    counts = np.zeros((CONTEXTS, int(codes.max()) - low + 1), np.int64)
    _count(codes, low, rows, columns, counts)
    return rows, columns, counts


def _side(rows: np.ndarray, columns: np.ndarray, shares: np.ndarray) -> tuple[bytes, bytes]:
    return range_coder.encode(np.concatenate([rows, columns])[:, None]), range_coder.encode(shares)


def fits(codes: np.ndarray) -> bool:
    """Whether `encode` takes these codes."""
    return codes.size > 0 and int(codes.max()) - int(codes.min()) < MOST_SYMBOLS


def estimate(codes: np.ndarray) -> float:
    """Bytes that `encode` takes for a large matrix (R, C) int32, within about 1 %, from its counts
    alone."""
    rows, columns, counts = _model(codes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = _side(rows, columns, _frequencies(counts, _bits(counts.shape[1])))
    return sum(map(len, side)) - float((counts * np.log2(np.maximum(shares, 1e-30))).sum()) / 8


def encode(codes: np.ndarray) -> bytes:
    """Bytes of a matrix (R, C) of integers that `fits`."""
    codes, low = np.ascontiguousarray(codes, np.int32), int(codes.min())
    rows, columns, counts = _model(codes)
    bits, spans = _bits(counts.shape[1]), _spans(*codes.shape)
    shares = _frequencies(counts, bits)
    tables = (shares | (np.cumsum(shares, 1) - shares) << 16).astype(np.uint64)
    blocks = [b""] * len(spans)

    def work(number, first, last):
        words = np.empty((last - first) * codes.shape[1] + 9, np.uint16)
        at = _encode(codes, low, rows, columns, tables, bits, words, first, last)
        blocks[number] = words[at:].astype("<u2").tobytes()

    _all(work, spans)
    parts = _side(rows, columns, shares)
    lengths = np.array([len(block) // 2 for block in blocks], "<u4").tobytes()
    return b"".join([HEAD.pack(low, counts.shape[1], *map(len, parts)), lengths, *parts, *blocks])


def decode(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The int32 matrix that `encode` wrote; ValueError for bytes that it cannot have written."""
    wrong = ValueError("its coded entries are damaged")
    spans = _spans(*shape)
    if len(data) < HEAD.size + 4 * len(spans):
        raise wrong
    low, symbols, *sizes = HEAD.unpack_from(data)
    at = HEAD.size + 4 * len(spans)
    lengths = np.frombuffer(data[HEAD.size : at], "<u4").astype(np.int64)
    ends = at + sizes[0] + sizes[1] + np.cumsum(2 * lengths)
    if ends[-1] != len(data) or not 0 < symbols <= MOST_SYMBOLS or lengths.min() < 8:
        raise wrong
    middle = at + sizes[0]
    levels = range_coder.decode(data[at:middle], (sum(shape), 1))[:, 0]
    shares = range_coder.decode(data[middle : middle + sizes[1]], (CONTEXTS, symbols))
    bits, totals = _bits(symbols), shares.sum(1, dtype=np.int64)
    fits = np.abs(levels).max() <= CONTEXTS and shares.min() >= 0
    if not (fits and np.isin(totals, (0, 2**bits)).all()):
        raise wrong
    rows, columns = levels[: shape[0]], levels[shape[0] :]
    slots = np.stack([_slots(share, bits) for share in shares])
    codes, right = np.empty(shape, np.int32), [False] * len(spans)

    def work(number, first, last):
        words = np.frombuffer(data[ends[number] - 2 * lengths[number] : ends[number]], "<u2")
        words = np.append(words, np.zeros(shape[1], np.uint16))
        right[number] = _decode(words, low, rows, columns, slots, bits, codes, first, last)

    _all(work, spans)
    if not all(right):
        raise wrong
    return codes
