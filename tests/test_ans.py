"""Static range coding: exact for all shapes, close to the entropy of its counts, damage found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.artifact import layouts
from kit.artifact.layouts import Entries, Writer
from kit.core import ans, range_coder


def matrix(rows, columns, spread, seed=0, rows_spread=0.0):
    rng = np.random.default_rng(seed)
    sizes = spread * np.exp(rows_spread * rng.normal(size=(rows, 1)))
    return np.rint(sizes * rng.normal(size=(rows, columns))).astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 23), st.floats(0, 40), st.integers(0, 99), st.floats(0, 3)
)
def test_codes_come_back(rows, columns, spread, seed, rows_spread):
    codes = matrix(rows, columns, spread, seed, rows_spread).clip(-500, 500)
    assert np.array_equal(ans.decode(ans.encode(codes), codes.shape), codes)


@pytest.mark.parametrize("shape", [(3000, 300), (1, 600_001), (600_001, 1)])
def test_many_blocks_of_any_shape_come_back(shape):
    codes = matrix(*shape, 3.0)
    assert len(ans._spans(*shape)) >= 2 or shape[0] == 1
    assert np.array_equal(ans.decode(ans.encode(codes), shape), codes)


def scalar_decode(words, low, levels, tables, bits, shape):
    """One block, code by code, as Duda 2013 defines it, in Python's integers."""
    words = [int(word) for word in words]
    states = [words[2 * k] + (words[2 * k + 1] << 16) for k in range(4)]
    words, codes = words[8:], np.empty(shape, np.int32)
    for r, c in np.ndindex(shape):
        table = tables[min(max(levels[r] + levels[shape[0] + c], 0), len(tables) - 1)]
        begins = [sum(table[:n]) for n in range(len(table) + 1)]
        slot, state = states[c % 4] % (1 << bits), states[c % 4]
        symbol = next(n for n in range(len(table)) if begins[n] <= slot < begins[n + 1])
        state = table[symbol] * (state >> bits) + slot - begins[symbol]
        if state < 1 << 16:
            state = (state << 16) + words.pop(0)
        states[c % 4], codes[r, c] = state, low + symbol
    assert states == [1 << 16] * 4 and not words
    return codes


def test_the_stream_is_what_the_definition_says():
    codes = matrix(9, 7, 3.0, rows_spread=1.0)
    data, at = ans.encode(codes), ans.HEAD.size + 4
    low, symbols, *sizes = ans.HEAD.unpack_from(data)
    middle, end = at + sizes[0], at + sum(sizes)
    levels = range_coder.decode(data[at:middle], (16, 1))[:, 0]
    tables = range_coder.decode(data[middle:end], (ans.CONTEXTS, symbols)).tolist()
    words = np.frombuffer(data[end:], "<u2")
    bits = ans._bits(symbols)
    assert np.array_equal(scalar_decode(words, low, levels, tables, bits, codes.shape), codes)


@pytest.mark.parametrize("spread, rows_spread", [(0.3, 0.0), (2.0, 0.0), (2.0, 1.0), (30.0, 0.0)])
def test_bytes_are_those_of_the_entropy_and_of_the_estimate(spread, rows_spread):
    codes = matrix(1000, 300, spread, rows_spread=rows_spread).clip(-127, 127)
    _, counts = np.unique(codes, return_counts=True)
    entropy = -(counts * np.log2(counts / codes.size)).sum() / 8
    size = len(ans.encode(codes))
    assert size < 1.015 * entropy and ans.estimate(codes) == pytest.approx(size, rel=0.02)
    if rows_spread:  # rows apart in size are told apart
        assert size < 0.93 * entropy


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_a_sentence_or_codes_of_the_same_shape(data):
    codes = matrix(30, 11, 4.0)
    wrong = bytearray(ans.encode(codes))
    for _ in range(data.draw(st.integers(1, 3))):
        wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    wrong = bytes(
        wrong[: data.draw(st.integers(0, len(wrong)))] if data.draw(st.booleans()) else wrong
    )
    try:
        assert ans.decode(wrong, codes.shape).shape == codes.shape
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("cut", [-2, -1, 1, 2])
def test_a_stream_ends_where_its_bytes_end(cut):
    codes = matrix(30, 11, 4.0)
    data = ans.encode(codes)
    with pytest.raises(ValueError, match="damaged"):
        ans.decode(data[:cut] if cut < 0 else data + bytes(cut), codes.shape)


@pytest.mark.parametrize("what", ["levels", "shares"])
def test_levels_and_shares_that_no_encoder_writes_are_refused(what):
    codes = matrix(30, 11, 4.0)
    data = ans.encode(codes)
    low, symbols, first, second = ans.HEAD.unpack_from(data)
    at = ans.HEAD.size + 4  # one block
    levels = range_coder.decode(data[at : at + first], (41, 1))
    middle = at + first
    shares = range_coder.decode(data[middle : middle + second], (ans.CONTEXTS, symbols))
    if what == "levels":
        levels[0] = ans.CONTEXTS + 1
    else:
        shares[:, :2] += np.where(shares.any(1), 1, 0)[:, None] * (shares[:, :1] + 1) * [-1, 1]
    parts = range_coder.encode(levels), range_coder.encode(shares)
    forged = ans.HEAD.pack(low, symbols, *map(len, parts)) + data[at - 4 : at]
    with pytest.raises(ValueError, match="its coded entries are damaged"):
        ans.decode(forged + b"".join(parts) + data[middle + second :], codes.shape)


def test_files_take_the_streams_where_the_adaptive_coder_would_be_slow(monkeypatch):
    monkeypatch.setattr(layouts, "MANY", 1 << 12)
    dense, sparse = matrix(100, 100, 3.0).clip(-7, 7), matrix(100, 100, 0.15)
    kind = Entries(dense.shape, bits=4)
    entropy = layouts.LAYOUTS["entropy"]
    assert entropy.encode(kind, dense.reshape(-1)) is None
    assert entropy.encode(kind, sparse.reshape(-1)) is not None
    assert layouts.coded_bytes(dense) == pytest.approx(len(ans.encode(dense)), rel=0.02)
    assert layouts.coded_bytes(sparse) == len(range_coder.encode(sparse))
    write = Writer()
    import torch

    write.codes(torch.from_numpy(dense), 4)
    assert write.letters == "s"
