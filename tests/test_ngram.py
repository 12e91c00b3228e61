from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.data import load_corpus
from notebooks.reference.ngram import KneserNey

NOVELS = Path(__file__).parents[2] / "shared" / "data" / "novels"
VOCAB = 4
texts = st.lists(st.integers(0, VOCAB - 1), min_size=6, max_size=60)


def brute_force(text, order, context, word):
    """Interpolated Kneser-Ney by its definition: sets, sums, recursion over the order."""

    def counts(k):
        grams = [tuple(text[i : i + k]) for i in range(len(text) - k + 1)]
        if k == order:
            return {gram: grams.count(gram) for gram in grams}
        longer = {tuple(text[i : i + k + 1]) for i in range(len(text) - k)}
        return {gram: sum(g[1:] == gram for g in longer) for gram in grams}

    def probability(context, word):
        k = len(context) + 1
        lower = probability(context[1:], word) if context else 1 / VOCAB
        count = counts(k)
        ones, twos = (sum(c == times for c in count.values()) for times in (1, 2))
        discount = ones / (ones + 2 * twos) if ones else 0.5
        after = {gram[-1]: c for gram, c in count.items() if gram[:-1] == context and c > 0}
        if not after:
            return lower
        total = sum(after.values())
        return (max(after.get(word, 0) - discount, 0) + discount * len(after) * lower) / total

    return probability(tuple(context[len(context) - min(len(context), order - 1) :]), word)


@given(texts, st.integers(1, 4))
def test_probabilities_sum_to_one_in_every_context(text, order):
    model = KneserNey.fit(text, order, VOCAB)
    for length in range(order + 1):
        for context in product(range(VOCAB), repeat=min(length, 3)):
            p = model.probabilities(context)
            assert p.shape == (VOCAB,) and p.sum() == pytest.approx(1, abs=1e-12) and p.min() > 0


@given(texts, st.integers(1, 4), st.data())
def test_probabilities_follow_the_definition(text, order, data):
    model = KneserNey.fit(text, order, VOCAB)
    context = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=5))
    expected = [brute_force(text, order, context, word) for word in range(VOCAB)]
    np.testing.assert_allclose(model.probabilities(context), expected, rtol=1e-12)


@given(texts, texts, st.integers(1, 4))
def test_nll_is_that_of_the_tokens_one_by_one(text, other, order):
    model = KneserNey.fit(text, order, VOCAB)
    expected = [-np.log(model.probabilities(other[:i])[other[i]]) for i in range(1, len(other))]
    np.testing.assert_allclose(model.nll(other), expected, rtol=1e-10)
    assert model.perplexity(other) == pytest.approx(np.exp(np.mean(expected)))


def test_unigram_discounts_counts_towards_the_uniform():
    p = KneserNey.fit([0, 0, 0, 1, 1, 2], 1, 4).probabilities(
        []
    )  # n1 = 1, n2 = 1: D = 1/3, freed mass 3 D
    np.testing.assert_allclose(p, np.array([3 - 1 / 3, 2 - 1 / 3, 1 - 1 / 3, 0]) / 6 + 3 / 18 / 4)


def test_a_higher_order_learns_what_a_lower_one_cannot():
    rng = np.random.default_rng(0)
    text = np.empty(3000, np.int64)
    text[:2] = 0
    for i in range(2, len(text)):  # the next token depends on the two before, not on one
        text[i] = (text[i - 1] + text[i - 2] + (rng.random() < 0.1)) % 2
    perplexity = [
        KneserNey.fit(text[:2500], order, 2).perplexity(text[2500:]) for order in (1, 2, 3)
    ]
    assert perplexity[2] < 1.5 < perplexity[1]
    assert perplexity[2] == pytest.approx(np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1)), rel=0.05)


@pytest.mark.parametrize(
    "tokens, order, message",
    [
        ([0, 1, 2], 3, "order=3 must be 1 or more and under the text's 3 tokens"),
        ([0, 1, 2], 0, "order=0"),
        ([0, 1, 7], 1, r"Tokens must lie in 0..3 .*span 0..7"),
    ],
)
def test_bad_input(tokens, order, message):
    with pytest.raises(ValueError, match=message):
        KneserNey.fit(tokens, order, VOCAB)
    with pytest.raises(ValueError, match="1 tokens has nothing to predict"):
        KneserNey.fit([0, 1, 2], 1, VOCAB).nll([1])


@pytest.mark.skipif(not NOVELS.exists(), reason="the novels are not beside this checkout")
def test_novels_give_the_known_perplexities():
    novels = load_corpus(f"text:{NOVELS}", 8192)  # in the cache of the session
    for order, known in ((2, 143), (3, 106), (4, 102)):
        model = KneserNey.fit(novels.train, order, 8192)
        assert model.perplexity(novels.test) == pytest.approx(known, rel=0.02)
