"""Evaluation: token-weighted loss, perplexity, bits per byte, accuracy; bootstrap intervals."""

import math
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import nn

from kit.core.protocols import Call, LanguageModel, adapt, device_of, evaluating
from kit.training.losses import IGNORED, flat_targets, labelled, linear_token_losses, logits_of

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Sums over a data set. A window is one row of a batch: a text window, or one image."""

    nll: float  # nats, over all tokens
    tokens: int
    window_nll: np.ndarray  # (windows,) float64, nats
    window_tokens: np.ndarray  # (windows,) int64
    correct: int  # tokens whose most likely prediction is right
    window_correct: np.ndarray  # (windows,) int64
    classifier: bool = False  # one label a window: the interval is of accuracy, else of perplexity

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits per byte of the text behind the tokens; comparable across vocabularies."""
        return self.nll / math.log(2) / n_bytes

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap over windows (Efron 1979): perplexity, a classifier's accuracy."""
        if self.classifier:
            return _interval(_resampled(self.window_correct, self.window_tokens, seed), level)
        return _interval(np.exp(_resampled(self.window_nll, self.window_tokens, seed)), level)


def paired_interval(a: Evaluation, b: Evaluation, level=0.95, seed=0) -> tuple[float, float]:
    """Bootstrap interval of log(perplexity of b) - log(perplexity of a) on the same windows; above
    0: b is worse. Pairing removes what makes windows hard for both, so that it is far narrower.
    Raises ValueError when the two were not evaluated on the same windows."""
    if not np.array_equal(a.window_tokens, b.window_tokens):
        sizes = " and ".join(f"{len(x.window_tokens)} ({x.tokens} tokens)" for x in (a, b))
        raise ValueError(f"The evaluations cover different windows, {sizes}: use one loader.")
    change = _resampled(b.window_nll - a.window_nll, a.window_tokens, seed)
    return _interval(change, level)


def _resampled(totals: np.ndarray, tokens: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES,): sum(totals) / sum(tokens) over windows drawn with replacement."""
    both, rng = np.stack([totals, tokens])[:, tokens > 0], np.random.default_rng(seed)
    windows = both.shape[1]
    draws = (rng.integers(windows, size=(RESAMPLES // 20, windows)) for _ in range(20))
    sums = np.concatenate([both[:, draw].sum(2) for draw in draws], axis=1)
    return sums[0] / sums[1]


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def evaluate(model: nn.Module, loader) -> Evaluation:
    """Evaluates over batches that `call_of` understands, in evaluation mode, on the model's device.

    The hidden states of a `LanguageModel` (B, T, D) meet targets (B, T) int64, -100 ignored. Any
    other model gives logits (`logits_of`): (B, C) for labels (B,), (B, T, C) for (B, T).
    Raises ValueError for a loader without tokens and for a loss that is not finite.
    """
    model, rows, classifier = adapt(model), [], False
    with evaluating(model):
        for batch in loader:
            call = labelled(batch, model).to(device_of(model))
            sums, classifier = _batch_sums(model, call)
            rows.append(sums)
    nll, tokens, correct = np.concatenate(rows, axis=1) if rows else np.zeros((3, 0))
    if not tokens.sum():
        advice = "give a longer text or a shorter seq_len."
        raise ValueError(f"The loader holds no tokens to evaluate: {advice}")
    if bad := int((~np.isfinite(nll)).sum()):
        advice = "the weights hold NaN or have diverged; train with a lower lr."
        raise ValueError(f"The loss of {bad} of {len(nll)} windows is not finite: {advice}")
    tokens, correct = tokens.astype(np.int64), correct.astype(np.int64)
    sums = float(nll.sum()), int(tokens.sum()), nll, tokens, int(correct.sum()), correct
    return Evaluation(*sums, classifier)


def _batch_sums(model: nn.Module, call: Call) -> tuple[np.ndarray, bool]:
    """(3, B): nats, tokens and hits of each row; and whether a row is one label."""
    targets = call.targets
    if isinstance(model, LanguageModel):
        losses, hits = linear_token_losses(call(model.hidden), *model.output(), targets)
    else:
        logits = logits_of(call(model), targets)
        flat = logits.reshape(-1, logits.shape[-1]).float(), flat_targets(targets, logits.shape)
        targets = targets if targets.shape == logits.shape[:-1] else targets.argmax(-1)
        losses = F.cross_entropy(*flat, reduction="none").view_as(targets)
        hits = logits.argmax(-1) == targets
    sums = losses.double(), targets != IGNORED, hits
    sums = [s.reshape(len(targets), -1).sum(1).double().cpu().numpy() for s in sums]
    return np.stack(sums), targets.dim() == 1
