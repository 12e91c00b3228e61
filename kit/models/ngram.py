"""Interpolated Kneser-Ney n-gram models: the lines that a trained language model has to beat."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """Tables of one order: p(w | h) = direct[h w] + backoff[h] p(w | h without its first word)."""

    keys: np.ndarray  # (grams,) int64, increasing: index of h in the order below * vocab_size + w
    direct: np.ndarray  # (grams + 1,) discounted count over the context's total; last: 0, of unseen grams
    backoff: np.ndarray  # (contexts + 1,) share left to the order below; last: 1, of unseen contexts


@dataclass(frozen=True)
class KneserNey:
    """Interpolated Kneser-Ney language model (Kneser & Ney 1995; interpolated as in Chen & Goodman 1999, eq. 4.33).

    The highest order counts occurrences, each lower one the distinct words seen before its grams. One discount an
    order, D = n1 / (n1 + 2 n2); the unigram is interpolated with the uniform distribution, so every token has a
    probability and each context's sum to one. ``order=1`` is a unigram model of plain counts.
    """

    order: int
    vocab_size: int
    tables: tuple

    @classmethod
    def fit(cls, tokens, order, vocab_size):
        """Count a text. tokens: integers (n,) in 0..vocab_size - 1.

        Raises ValueError when order is under 1, the text shorter than order + 1 tokens, or a token out of range.
        """
        tokens = _checked(tokens, vocab_size)
        if order < 1 or tokens.size <= order:
            raise ValueError(f"order={order} must be 1 or more, and less than the {tokens.size} tokens of the text.")
        # grams[k][j]: index of the (k + 1)-gram that begins at j; firsts[k]: where each distinct one first begins
        keys, grams = [np.arange(vocab_size)], [tokens]
        counts, firsts = np.bincount(tokens, minlength=vocab_size), [None]
        for k in range(1, order):
            key = grams[-1][:-1] * vocab_size + tokens[k:]
            unique, first, inverse, counts = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
            keys, grams, firsts = [*keys, unique], [*grams, inverse], [*firsts, first]
        tables = []
        for k in range(order):
            if k < order - 1:  # words seen before a gram: distinct longer grams that end in it
                counts_k = np.bincount(grams[k][firsts[k + 1] + 1], minlength=len(keys[k]))
            else:
                counts_k = counts
            tables.append(_table(keys[k], counts_k, vocab_size, contexts=len(keys[k - 1]) if k else 1))
        return cls(order, vocab_size, tuple(tables))

    def probabilities(self, context):
        """Distribution of the token after ``context`` (a sequence of tokens, may be empty): float64 (vocab_size,)."""
        context = _checked(context, self.vocab_size)
        context = context[max(0, context.size - self.order + 1):]
        rows = np.tile(context, (self.vocab_size, 1))
        return self._likelihood(np.column_stack([rows, np.arange(self.vocab_size)]))[:, -1]

    def nll(self, tokens):
        """Negative log-likelihood in nats of each token but the first, given all before: float64 (n - 1,)."""
        tokens = _checked(tokens, self.vocab_size)
        if tokens.size < 2:
            raise ValueError(f"A text of {tokens.size} tokens has nothing to predict: give 2 or more.")
        return -np.log(self._likelihood(tokens)[1:])

    def perplexity(self, tokens):
        """exp of the mean `nll`."""
        return float(np.exp(self.nll(tokens).mean()))

    def _likelihood(self, tokens):
        """Probability of each token given those before it on the last axis: float64, the shape of ``tokens``."""
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
    seen = total > 0
    backoff = np.divide(discount * types, total, out=np.ones(contexts), where=seen)
    direct = np.divide(np.maximum(counts - discount, 0), total[context], out=np.zeros(len(keys)), where=seen[context])
    return _Order(keys, np.append(direct, 0.0), np.append(backoff, 1.0))


def _checked(tokens, vocab_size):
    tokens = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"Tokens must lie in 0..{vocab_size - 1} (vocab_size={vocab_size}), "
                         f"but they span {tokens.min()}..{tokens.max()}.")
    return tokens
