"""The range coder: exact round trips of random and adversarial streams, and sizes close to the
entropy of what is coded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kit.core import range_coder as coding

LARGEST = 2**31 - 1
STREAM = "00ffffc85c1f3bd682ef4a491e576905de9c039a7debfe98b90801ed0dc6a400219f3996"


def round_trip(codes):
    data = coding.encode(codes)
    assert np.array_equal(coding.decode(data, codes.shape), codes)
    return data


@given(
    arrays(
        np.int32,
        st.tuples(st.integers(0, 12), st.integers(0, 12)),
        elements=st.integers(-LARGEST, LARGEST),
    )
)
def test_any_integers(codes):
    round_trip(codes)


@given(st.integers(0, 10**6), st.floats(0.001, 3000), st.integers(1, 40))
def test_random_streams(seed, spread, columns):
    rng = np.random.default_rng(seed)
    round_trip(np.round(rng.laplace(scale=spread, size=(50, columns))).astype(np.int64))


ADVERSARIAL = {
    "empty": np.zeros((0, 5)),
    "one zero": np.zeros((1, 1)),
    "zeros, then the largest": np.r_[np.zeros(5000), np.full(500, LARGEST)][None],
    "largest, alternating signs": np.tile([LARGEST, -LARGEST], 2000)[None],
    "always the unlikely": np.tile(np.r_[np.zeros(60), LARGEST], 200)[None],
    "powers of two and their neighbours": np.concatenate(
        [[2**k - 1, 2**k, -(2**k)] for k in range(31)]
    )[:, None],
    "unary border": np.tile(np.arange(-16, 17), 40)[:, None],
    "one row": np.arange(3000)[None] % 7,
    "one column": np.arange(3000)[:, None] % 7,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_streams(name):
    round_trip(ADVERSARIAL[name].astype(np.int64))


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_carries_run_through_long_chains_of_bytes(byte):
    """Streams found by search: encode what the decoder reads from constant bytes, which keeps
    carries pending."""
    codes = np.empty((30, 30), np.int32)
    coding._decode(np.full(400, byte, np.uint8), codes)
    assert np.array_equal(coding.decode(coding.encode(codes), codes.shape), codes)


@pytest.mark.parametrize("shape, most", [((1500, 200), 1.04), ((48, 32), 1.06)])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_model_is_close_to_the_entropy_of_independent_symbols(spread, shape, most):
    """Also where there is little to learn it from."""
    codes = np.round(np.random.default_rng(0).laplace(scale=spread, size=shape)).astype(np.int64)
    _, counts = np.unique(codes, return_counts=True)
    share = counts / codes.size
    assert len(coding.encode(codes)) * 8 / codes.size <= -(share * np.log2(share)).sum() * most


def test_first_chances_are_those_of_the_geometric_distribution_with_the_mean_of_the_class():
    zero, more = (coding.FIRST_CHANCES[n].diagonal() / (1 << coding.FINE) for n in (0, 1))
    mean = (
        1 - zero
    ) / more  # P(|q| > 0) times the mean of 1, 2, ... that end with probability `more`
    below, above = coding.EDGES[:-1] / coding.ONE, coding.EDGES[1:] / coding.ONE
    assert np.all((below < mean[1:-1]) & (mean[1:-1] < above))


def test_rows_and_columns_of_different_spread_are_told_apart():
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.uniform(-3, 3, 400))[:, None] * np.exp2(rng.uniform(-1, 1, 64))
    codes = np.round(rng.laplace(size=(400, 64)) * scale).astype(np.int64)
    mixed = rng.permutation(codes.reshape(-1)).reshape(codes.shape)
    assert len(round_trip(codes)) < 0.95 * len(round_trip(mixed))


def test_other_bytes_than_the_encoder_s_are_refused():
    """Whatever is changed, cut off or added; zeros at the end are what it leaves away."""
    rng = np.random.default_rng(0)
    codes = np.round(rng.laplace(size=(40, 30)) * 3).astype(np.int64)
    data = coding.encode(codes)
    for place in [0, *rng.integers(1, len(data), 200)]:
        wrong = bytearray(data)
        wrong[place] ^= 1 << rng.integers(8)
        for stream in (wrong, data[:place] or b"1", data[:place] + data[place + 1 :]):
            with pytest.raises(ValueError, match="no range-coded stream of 1200 integers"):
                coding.decode(bytes(stream), codes.shape)
    more = np.pad(codes, ((0, 1), (0, 0)))  # zeros at the end take no bytes
    assert coding.encode(more) == data and np.array_equal(coding.decode(data, more.shape), more)
    for shape in ((39, 30), (30, 40)):
        with pytest.raises(ValueError, match="no range-coded stream"):
            coding.decode(data, shape)
    with pytest.raises(ValueError, match="no range-coded stream"):
        coding.decode(data + b"\1", codes.shape)
    for noise in (bytes([255]) * 4000, rng.bytes(4000)):
        with pytest.raises(ValueError, match="no range-coded stream"):
            coding.decode(noise, (100, 100))


@pytest.mark.parametrize("first", [2**31 - 1, -(2**31 - 1), 10**6, 170])
def test_a_stream_that_begins_beyond_the_range_is_refused(first):
    data = bytearray(coding.encode(np.array([[first, 3, 3, 3]])))
    assert data[:6] == bytes.fromhex("00fffffffeff")
    data[4] = 255  # the one start that no code has; after four bytes it falls on the true one
    with pytest.raises(ValueError, match="no range-coded stream"):
        coding.decode(data, (1, 4))


def test_zeros_take_almost_nothing():
    assert len(round_trip(np.zeros((1000, 1000), np.int64))) < 2000


@pytest.mark.parametrize("codes", [np.zeros(3), np.full((1, 1), 2**31), np.full((1, 1), -(2**31))])
def test_what_cannot_be_coded_is_an_error(codes):
    with pytest.raises(ValueError, match="a matrix of integers below 2\\*\\*31"):
        coding.encode(codes.astype(np.int64))


def test_logistic_tables_are_those_of_float64():
    logits = (np.arange(len(coding.SQUASH)) - coding.SPAN * coding.LOGIT) / coding.LOGIT
    assert np.abs(coding.SQUASH - coding.ONE / (1 + np.exp(-logits))).max() <= 1
    chance = (np.arange(len(coding.STRETCH)) + 0.5) / len(coding.STRETCH)
    inner = (
        np.abs(np.log(chance / (1 - chance))) < 5
    )  # further out, neighbouring probabilities are far apart
    assert np.abs(coding.STRETCH / coding.LOGIT - np.log(chance / (1 - chance)))[inner].max() < 0.05


def test_signs_that_lean_in_a_column_take_less_than_a_bit():
    rng = np.random.default_rng(0)
    lean = np.where(rng.random((2000, 16)) < 0.05, -1, 1) * rng.choice([-1, 1], 16)
    entropy = -(0.05 * np.log2(0.05) + 0.95 * np.log2(0.95))
    assert len(round_trip(lean)) * 8 / lean.size < 1.1 * entropy


def test_a_stream_written_elsewhere_is_read_alike():
    codes = (np.arange(60).reshape(6, 10) ** 2 * 7919 % 41 - 20) // 4
    assert coding.encode(codes).hex() == STREAM
    assert np.array_equal(coding.decode(bytes.fromhex(STREAM), codes.shape), codes)
