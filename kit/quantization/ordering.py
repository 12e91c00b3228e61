"""Rows of token tables by falling frequency, whatever the tokenizer's numbers say.

What an error in a row costs goes with the token's frequency, so rows of like frequency share a step and are coded one after
another. Byte-pair encoding numbers tokens by the merges that made them: "compress" has a low number and is hardly ever
met, now that "compression" has its own. So rows are kept by class, the logarithm of the token's frequency in whole factors of
four, and within a class in the tokenizer's order.

The classes are in the file, two bits a token, or under half a bit where the merges are known. For a token occurs as often as it
was merged, less the merges that took it into longer ones,

    n_i = m_i - sum over j made of i of m_j,

and merges come in falling order of m, a smooth curve of which a few points suffice. What is stored is the difference between
a token's class and the one so expected. All of it in integers: a file is read alike on every machine.
"""

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from kit.core import range_coder as coding
from kit.models.moe import _Permute
from kit.core.weights import named_weights, original_of, set_steps, steps_of
from kit.quantization.composition import Composition

MOST = 2**31 - 1  # that the coder takes


def frequency_classes(counts: np.ndarray, top: int) -> np.ndarray:
    """round(log4((top + 1) / (count + 1))) for each count (V,): int64, 0 for the most frequent, halves upwards."""
    return sum((top + 1) >> (2 * j + 1) >= counts + 1 for j in range(16)).astype(np.int64)


def _points(size: int) -> np.ndarray:
    """Tokens whose merges the file tells: eight in each doubling, and the last."""
    return np.unique([min(size - 1, 2**octave + 2**octave * i // 8) for octave in range(size.bit_length() + 1) for i in range(8)])


def merge_curve(counts: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Largest count, and how often the tokens of `_points` were merged, from counts (V,) and parts (V, 2); 0 for single bytes."""
    merged = np.array(counts, np.int64)
    for token in range(len(parts) - 1, -1, -1):
        for part in parts[token]:
            if part >= 0:
                merged[part] += merged[token]
    points = _points(len(parts))
    return np.minimum([max(counts), *np.where(parts[points, 0] >= 0, merged[points], 0)], MOST)


def expected_classes(curve: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Class of each token as far as `merge_curve` and parts tell; m times the token's number is linear between points."""
    (top, *merged), ids, points = curve, np.arange(len(parts)), _points(len(parts))
    right = np.searchsorted(points, np.maximum(ids, 1)).clip(1)
    (a, b), (m_a, m_b) = ((x[right - 1], x[right]) for x in (points, np.array(merged)))
    m = (m_a * a * (b - ids) + m_b * b * (ids - a)) // ((b - a) * np.maximum(ids, 1))
    m[parts[:, 0] < 0] = 0
    left = m.copy()
    for column in parts.T:
        np.subtract.at(left, column[column >= 0], m[column >= 0])
    return frequency_classes(left.clip(0), top)


class RowOrder(nn.Module):
    """Parametrization: rows by class, (V, ...) -> rows by token, the same shape and dtype.

    classes: int64 (V,), of each token; parts: int (V, 2), what it was merged from, and curve, from `merge_curve`, or None.
    """

    def __init__(self, classes: np.ndarray, parts: np.ndarray | None = None, curve: np.ndarray | None = None):
        super().__init__()
        self.classes, self.parts, self.curve = classes, parts, curve
        tokens = torch.from_numpy(classes.argsort(kind="stable"))
        self.register_buffer("tokens", tokens)  # of each row
        self.register_buffer("rows", tokens.argsort())  # of each token

    def forward(self, rows: Tensor) -> Tensor:
        return _Permute.apply(rows, self.rows, self.tokens)

    def encode(self) -> bytes:
        if self.parts is None:
            return coding.encode(self.classes[:, None])
        surprise = self.classes - expected_classes(self.curve, self.parts)
        return coding.encode(np.concatenate([self.curve, surprise])[:, None])

    @classmethod
    def decode(cls, data: bytes, count: int, parts: np.ndarray | None) -> "RowOrder":
        size = 0 if parts is None else 1 + len(_points(count))
        values = coding.decode(data, (size + count, 1))[:, 0].astype(np.int64)
        if parts is None:
            return cls(values)
        return cls(values[size:] + expected_classes(values[:size], parts), parts, values[:size])


def order_rows(model: nn.Module, counts: np.ndarray) -> nn.Module:
    """Puts one `RowOrder` on every tensor with an entry for each token (embedding, output layer and its bias), in place, and
    returns the model. What it computes stays the same; masks and formats of these tensors are dropped.

    counts: (V,), how often each token occurs in the training data.
    Raises ValueError when no tensor has as many rows.
    """
    counts = np.asarray(counts, np.int64)
    tables = [(m, a) for _, m, a in named_weights(model) if original_of(m, a).shape[:1] == counts.shape]
    if not tables:
        raise ValueError(f"no tensor of {type(model).__name__} has the {len(counts):,} rows of a token table: pass the counts "
                         "of the vocabulary it was trained with")
    composed = {table: [step for step in steps_of(*table) if isinstance(step, Composition)] for table in tables}
    parts = next((step.parts for steps in composed.values() for step in steps), None)
    curve = None if parts is None else merge_curve(counts, parts)
    order = RowOrder(frequency_classes(counts, counts.max()), parts, curve)
    for (module, attribute), steps in composed.items():
        rows = (original_of(module, attribute) if steps else getattr(module, attribute)).detach()
        set_steps(model, module, attribute, [])
        original_of(module, attribute).data.copy_(rows[order.tokens.to(rows.device)])
        set_steps(model, module, attribute, [order.to(rows.device), *steps])
    return model
