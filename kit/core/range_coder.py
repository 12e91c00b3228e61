"""Adaptive binary range coding of small integers: the entropy coder behind the artifact.

A code is written as a few binary decisions (zero?, |q| > 1?, ..., then an Elias-gamma tail, and a
sign), each with a probability that adapts, so no table is stored: binarization and range coder of
CABAC, as in DeepCABAC (Wiedemann et al. 2019, arXiv:1905.08318), and LZMA (carries: Martin 1979).
Three contexts tell how large codes of the same row and column have been, recently and on the whole;
each begins with what a two-sided geometric distribution of that size would give. Their estimates
are added as logits, with weights that learn online (logistic mixing: Mahoney 2005). Signs are coded
by column, as its mean is seldom zero. Coding uses integers only, and tables that IEEE 754 rounds
exactly, so that a stream decodes alike on every machine.
"""

import math

import numpy as np

from kit.core.compiled import compiled

UNARY = 14  # decisions before the Elias-gamma tail
TAIL = 32  # decisions on the tail's length
LEVELS = 24  # classes of magnitude, two an octave
COLUMNS = 256  # told apart by their index
BITS = 16  # of a probability
ONE = 1 << BITS
FINE = 22  # bits of a probability while it adapts
LIMIT = 255  # decisions that an estimate remembers; before, it is their mean
BELIEF = 4  # decisions that its first value counts for
LOGIT = 256  # steps of a logit's unit
SPAN = 8  # logits lie within (-SPAN, SPAN)
RATE = 16  # weights of the mixture follow error * logit at 2**-RATE, in 1/65536
LARGE = 4095  # as which larger codes count for averages, which are in 1/65536
START = ONE // 4  # of an average
TOP = np.uint64(1 << 24)
MASK = np.uint64(0xFFFFFFFF)
BYTE = np.uint64(8)
LARGEST = 2**31 - 1  # code
MOST = 128  # bytes that one code can take: 80 decisions of at most 12 bits each, and the flush


def _logistic() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of all logits in units of 1 / LOGIT, and logits of all probabilities in units
    of 16 / ONE, by integer arithmetic: floats differ from machine to machine."""
    one, powers = 1 << 160, [1 << 160]
    root = sum(one // (LOGIT**k * math.factorial(k)) for k in range(20))  # exp(1 / LOGIT)
    for _ in range(SPAN * LOGIT):
        powers.append(powers[-1] * root // one)
    upper = [ONE * e // (e + one) for e in powers]
    squash = np.array([ONE - p for p in upper[:0:-1]] + upper[:-1], np.int64)
    return squash, np.searchsorted(squash, np.arange(8, ONE, 16)) - SPAN * LOGIT


SQUASH, STRETCH = _logistic()
RECIPROCAL = np.array([2 * ONE // (2 * n + 3) for n in range(LIMIT + 1)], np.int64)
# Averages that part two classes: from 1536 / 65536 in steps of sqrt(2).
EDGES = np.array([math.isqrt(1536**2 << k) for k in range(LEVELS - 1)], np.int64)


def _first_chances() -> np.ndarray:
    """P(|q| <= n given |q| >= n) for n = 0 and more, and averages of classes a and b: (2, a, b)."""
    centres = np.append(EDGES, 2 * EDGES[-2]) / math.sqrt(math.sqrt(2)) / ONE
    mean = np.sqrt(centres[:, None] * centres)
    theta = (np.sqrt(1 + mean * mean) - 1) / mean
    return (np.stack([(1 - theta) / (1 + theta), 1 - theta]) * (1 << FINE)).astype(np.int64)


FIRST_CHANCES = _first_chances()


@compiled()
def _level(average, level):
    """The class of an average, searched from a class that it had before."""
    while level < LEVELS - 1 and average >= EDGES[level]:
        level += 1
    while level > 0 and average < EDGES[level - 1]:
        level -= 1
    return level


@compiled()
def _adapt(chances, counts, i, bit):
    """Moves P(bit = 0) towards what came."""
    chances[i] += (((0 if bit else 1 << FINE) - chances[i]) * RECIPROCAL[counts[i]]) >> BITS
    counts[i] = min(counts[i] + 1, LIMIT)


@compiled()
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


@compiled()
def _byte(buffer, position):
    """A byte of the stream, 0 past its end."""
    return np.uint64(buffer[position]) if position < np.uint64(len(buffer)) else np.uint64(0)


@compiled()
def _code(buffer, coder, probability, bit):
    """Writes `bit`, or reads and returns it if it is negative, where P(0) = probability / ONE.
    coder: low (or code), range, cached byte, pending 0xFF count, bytes written (or read)."""
    bound = (coder[1] >> np.uint64(BITS)) * np.uint64(probability)
    reads = bit < 0
    if reads:
        bit = 1 if coder[0] >= bound else 0
    if bit:
        coder[1] -= bound
        coder[0] = coder[0] - bound if reads else coder[0] + bound
    else:
        coder[1] = bound
    while coder[1] < TOP:
        coder[1] = (coder[1] << BYTE) & MASK
        if reads:
            coder[0] = ((coder[0] << BYTE) | _byte(buffer, coder[4])) & MASK
            coder[4] += np.uint64(1)
        else:
            _shift(buffer, coder)
    return bit


@compiled()
def _code_alone(buffer, coder, chances, counts, i, bit):
    """Codes a bit by one adaptive estimate."""
    probability = min(max(chances[i] >> (FINE - BITS), 32), ONE - 32)
    bit = _code(buffer, coder, probability, bit)
    _adapt(chances, counts, i, bit)
    return bit


@compiled(inline="always")  # a call would count references to its arrays, at three times the cost
def _code_mixed(buffer, coder, chances, counts, contexts, weights, logits, step, bit):
    """Codes a bit by the mixture of its contexts' estimates."""
    total = 0
    for k in range(3):
        logits[k] = STRETCH[chances[step, contexts[k]] >> (FINE - 12)]
        total += weights[step, k] * logits[k]
    probability = SQUASH[min(max((total >> 16) + SPAN * LOGIT, 0), 2 * SPAN * LOGIT - 1)]
    bit = _code(buffer, coder, probability, bit)
    error = (0 if bit else ONE) - probability
    for k in range(3):
        weights[step, k] += (error * logits[k]) >> RATE
        _adapt(chances, counts, (step, contexts[k]), bit)
    return bit


@compiled()
def _code_tail(buffer, coder, chances, counts, tail):
    """Elias-gamma: codes tail >= 1, or reads it if it is 0."""
    length, reads = 0, tail == 0
    while length < TAIL - 1:
        more = -1 if reads else int(tail >> (length + 1) > 0)
        if not _code_alone(buffer, coder, chances, counts, length, more):
            break
        length += 1
    value = 1
    for i in range(length - 1, -1, -1):
        bit = -1 if reads else (tail >> i) & 1
        if i == length - 1:
            bit = _code_alone(buffer, coder, chances, counts, TAIL + length, bit)
        else:
            bit = _code(buffer, coder, ONE // 2, bit)
        value = (value << 1) | bit
    return value


@compiled()
def _estimates(columns):
    """First values of P(bit = 0) for each step of the unary part and each context: (classes recent
    in row and column), (on the whole), (column, class of the row)."""
    pairs, indexed = LEVELS * LEVELS, min(columns, COLUMNS)
    chances = np.empty((UNARY, 2 * pairs + indexed * LEVELS), np.int64)
    for step in range(UNARY):
        classes = FIRST_CHANCES[min(step, 1)]
        chances[step, :pairs], chances[step, pairs : 2 * pairs] = classes.ravel(), classes.ravel()
        chances[step, 2 * pairs :].reshape(indexed, LEVELS)[:] = np.diag(classes)
    return chances


@compiled()
def _pass(codes, buffer, coder, reads):
    """Writes the codes into `buffer`, or reads them from it; whether they fit."""
    rows, columns = codes.shape
    chances, first = _estimates(columns), LEVELS * LEVELS
    counts = np.full(chances.shape, BELIEF, np.int64)
    tails, tail_counts = np.full(2 * TAIL, 1 << (FINE - 1), np.int64), np.zeros(2 * TAIL, np.int64)
    signs, sign_counts = np.full(columns, 1 << (FINE - 1), np.int64), np.full(columns, 2, np.int64)
    weights = np.full((UNARY, 3), ONE // 3, np.int64)
    logits, contexts = np.zeros(3, np.int64), np.zeros(3, np.int64)
    column_recent = np.full(columns, START, np.int64)
    column_mean = column_recent.copy()
    recent_level, mean_level = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    recent, row_mean, level, row, fits = START, START, 0, 0, True
    for r in range(rows):
        row_sum = 0
        for c in range(columns):
            if not reads and coder[4] + coder[3] + np.uint64(MOST) > np.uint64(len(buffer)):
                return False
            row, level = _level((row_sum + 8 * row_mean) // (c + 8), row), _level(recent, level)
            recent_level[c] = _level(column_recent[c], recent_level[c])
            mean_level[c] = _level(column_mean[c], mean_level[c])
            contexts[0] = level * LEVELS + recent_level[c]
            contexts[1] = first + row * LEVELS + mean_level[c]
            contexts[2] = 2 * first + (c % COLUMNS) * LEVELS + row
            size, known = 0, abs(np.int64(codes[r, c]))
            while size < UNARY:
                bit = -1 if reads else int(known > size)
                if not _code_mixed(
                    buffer, coder, chances, counts, contexts, weights, logits, size, bit
                ):
                    break
                size += 1
            if size == UNARY:
                tail = 0 if reads else known - UNARY + 1
                size += _code_tail(buffer, coder, tails, tail_counts, tail) - 1
                if size > LARGEST:
                    fits = False
            if size:
                bit = -1 if reads else int(codes[r, c] < 0)
                bit = _code_alone(buffer, coder, signs, sign_counts, c, bit)
                codes[r, c] = -size if bit else size
            else:
                codes[r, c] = 0
            size = min(size, LARGE) << 16
            row_sum += size
            recent += (size - recent) >> 4
            column_recent[c] += (size - column_recent[c]) >> 4
            column_mean[c] += (size - column_mean[c]) >> 7
        row_mean += (row_sum // max(columns, 1) - row_mean) >> 3
    return fits


@compiled()
def _encode(codes, out):
    coder = np.array([0, 0xFFFFFFFF, 0, 0, 0], np.uint64)
    if not _pass(codes, out, coder, False):
        return np.int64(-1)
    for _ in range(5):
        _shift(out, coder)
    return np.int64(coder[4])


@compiled()
def _decode(data, codes):
    coder = np.array([0, 0xFFFFFFFF, 0, 0, 5], np.uint64)
    for i in range(5):
        coder[0] = ((coder[0] << BYTE) | _byte(data, np.uint64(i))) & MASK
    read = coder[0] < coder[1] and _pass(codes, data, coder, True)  # beyond: by no encoder
    return read and _byte(data, np.uint64(0)) == coder[0] == 0 and coder[4] >= len(data)


def encode(codes: np.ndarray) -> bytes:
    """Bytes of a matrix of integers below 2**31 in magnitude: few where most integers are small."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or (codes.size and not -(2**31) < codes.min() <= codes.max() < 2**31):
        found = f" with {codes.min()} to {codes.max()}" if codes.size else ""
        what = "a matrix of integers below 2**31 in magnitude"
        raise ValueError(f"the range coder takes {what}, not shape {codes.shape}{found}")
    codes, room, length = np.array(codes, np.int32, order="C"), 2 * codes.size + MOST, -1
    while length < 0:
        out = np.empty(room, np.uint8)
        length, room = _encode(codes, out), 4 * room
    return out[:length].tobytes().rstrip(b"\0")


def decode(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The int32 matrix that `encode` wrote. Raises ValueError for other bytes: they must end with
    the last code, in the state that `encode` leaves, which by chance one in 2**32 does."""
    codes = np.empty(shape, np.int32)
    if not _decode(np.frombuffer(bytearray(data), np.uint8), codes):
        raise ValueError(f"{len(data)} bytes are no range-coded stream of {codes.size} integers")
    return codes
