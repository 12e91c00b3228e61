"""Interpolated Kneser-Ney n-gram models: the lines that a trained language model has to beat."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """Tables of one order: p(w | h) = direct[h w] + backoff[h] p(w | h without its first word)."""

    keys: np.ndarray  # (grams,) int64, increasing: index of h in the order below * vocab_size + w
    direct: (
        np.ndarray
    )  # (grams + 1,) discounted count over the context's total; last: 0, of unseen grams
    backoff: (
        np.ndarray
    )  # (contexts + 1,) share left to the order below; last: 1, of unseen contexts


@dataclass(frozen=True)
class KneserNey:
    """Interpolated Kneser-Ney language model (Kneser & Ney 1995, interpolated as by Chen & Goodman
    1999):

        p(w | h) = max(c(h w) - D, 0) / c(h .) + D N(h .) / c(h .) p(w | h without its first word)

    with N(h .) the number of distinct words seen after h. At the highest order c counts
    occurrences, at each lower one the distinct words seen before the gram. One discount an order, D
    = n1 / (n1 + 2 n2), from the numbers of grams counted once and twice; below the unigram stands
    the uniform distribution, so that every token has a probability and those of a context sum to
    one. ``order=1`` is a unigram model of plain counts.
    """

    order: int
    vocab_size: int
    tables: tuple

    @classmethod
    def fit(cls, tokens, order, vocab_size):
        """Count a text. tokens: integers (n,) in 0..vocab_size - 1.

        Raises ValueError when order is under 1 or not less than n, or a token is out of range.
        """
        tokens = _checked(tokens, vocab_size)
        if order < 1 or tokens.size <= order:
            raise ValueError(
                f"order={order} must be 1 or more and under the text's {tokens.size} tokens."
            )
        # grams[k][j]: index of the (k + 1)-gram beginning at j; firsts[k]: where each distinct one
        # first does
        keys, grams = [np.arange(vocab_size)], [tokens]
        counts, firsts = np.bincount(tokens, minlength=vocab_size), [None]
        for k in range(1, order):
            key = grams[-1][:-1] * vocab_size + tokens[k:]
            unique, first, inverse, counts = np.unique(key, True, True, True)
            keys, grams, firsts = [*keys, unique], [*grams, inverse], [*firsts, first]
        tables = []
        for k in range(order):
            if k < order - 1:  # words seen before a gram: distinct longer grams that end in it
                counts_k = np.bincount(grams[k][firsts[k + 1] + 1], minlength=len(keys[k]))
            else:
                counts_k = counts
            tables.append(
                _table(keys[k], counts_k, vocab_size, contexts=len(keys[k - 1]) if k else 1)
            )
        return cls(order, vocab_size, tuple(tables))

    def probabilities(self, context):
        """Distribution of the token after ``context`` (tokens (n,), n may be 0): float64
        (vocab_size,)."""
        context = _checked(context, self.vocab_size)
        context = context[max(0, context.size - self.order + 1) :]
        rows = np.tile(context, (self.vocab_size, 1))
        return self._likelihood(np.column_stack([rows, np.arange(self.vocab_size)]))[:, -1]

    def nll(self, tokens):
        """Negative log-likelihood in nats of each token but the first, given all before: float64 (n
        - 1,)."""
        tokens = _checked(tokens, self.vocab_size)
        if tokens.size < 2:
            raise ValueError(
                f"A text of {tokens.size} tokens has nothing to predict: give 2 or more."
            )
        return -np.log(self._likelihood(tokens)[1:])

    def perplexity(self, tokens):
        """exp of the mean `nll`."""
        return float(np.exp(self.nll(tokens).mean()))

    def _likelihood(self, tokens):
        """Probability of each token given those before it on the last axis: float64, of the tokens'
        shape."""
        unigram = self.tables[0]
        p = unigram.direct[tokens] + unigram.backoff[0] / self.vocab_size
        grams = tokens
        for k, table in enumerate(self.tables[1:], 1):
            if tokens.shape[-1] <= k:
                break
            contexts = grams[..., :-1]
            key = contexts * self.vocab_size + tokens[..., k:]
            at = np.searchsorted(table.keys, key).clip(max=len(table.keys) - 1)
            grams = np.where(table.keys[at] == key, at, -1)
            p[..., k:] = table.direct[grams] + table.backoff[contexts] * p[..., k:]
        return p


def _table(keys, counts, vocab_size, contexts):
    context = keys // vocab_size
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    total = np.bincount(context, counts, contexts)
    types = np.bincount(context, counts > 0, contexts)
    backoff = np.divide(discount * types, total, out=np.ones(contexts), where=total > 0)
    direct = np.maximum(counts - discount, 0) / np.maximum(total, 1)[context]
    return _Order(keys, np.append(direct, 0.0), np.append(backoff, 1.0))


def _checked(tokens, vocab_size):
    tokens = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"Tokens must lie in 0..{vocab_size - 1} (vocab_size={vocab_size}), "
            f"but they span {tokens.min()}..{tokens.max()}."
        )
    return tokens
