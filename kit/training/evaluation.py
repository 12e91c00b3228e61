"""Evaluation: token-weighted loss, perplexity, bits per byte and accuracy, with bootstrap intervals over
windows."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.training.losses import linear_token_losses

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
    classifier: bool = False  # one label a window: the interval is of accuracy then, else of perplexity

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
        """Percentile bootstrap over windows (Efron 1979) of the perplexity, or of a classifier's accuracy."""
        totals = self.window_correct if self.classifier else self.window_nll
        sums = _resampled_sums(np.stack([totals, self.window_tokens]), seed)
        values = sums[0] / sums[1]
        low, high = np.quantile(
            values if self.classifier else np.exp(values), [(1 - level) / 2, (1 + level) / 2]
        )
        return float(low), float(high)


def paired_interval(a: Evaluation, b: Evaluation, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of log(perplexity of b) - log(perplexity of a) on the same windows; above 0: b is
    worse.

    Pairing removes what makes windows hard for both, so it is far narrower than the two intervals side by
    side. Raises ValueError when the two were not evaluated on the same windows.
    """
    if not np.array_equal(a.window_tokens, b.window_tokens):
        raise ValueError(
            f"The evaluations cover different windows ({len(a.window_tokens)} and "
            f"{len(b.window_tokens)}, {a.tokens} and {b.tokens} tokens): use the same loader for both."
        )
    difference, tokens = _resampled_sums(np.stack([b.window_nll - a.window_nll, a.window_tokens]), seed)
    low, high = np.quantile(difference / tokens, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_sums(totals: np.ndarray, seed: int) -> np.ndarray:
    """totals (k, windows) -> (k, RESAMPLES): sums over windows drawn with replacement."""
    windows, rng = totals.shape[1], np.random.default_rng(seed)
    draws = (rng.integers(windows, size=(RESAMPLES // 20, windows)) for _ in range(20))
    return np.concatenate([totals[:, draw].sum(2) for draw in draws], axis=1)


@torch.no_grad()
def evaluate(model: nn.Module, loader) -> Evaluation:
    """Evaluates over (inputs, targets) batches, on the model's device, in evaluation mode (its mode is
    restored).

    A model with `.output` is a language model: hidden (B, T, D), targets (B, T) int64, -100 ignored. Any
    other gives logits (B, classes) for labels (B,), or (B, T, V) for targets (B, T). Raises ValueError for a
    loader without tokens and for a loss that is not finite.
    """
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        rows = []
        for inputs, targets in loader:
            rows.append(_batch_sums(model, inputs.to(device), targets.to(device)))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _summary(rows, classifier=bool(rows) and targets.dim() == 1)


def _batch_sums(model: nn.Module, inputs: Tensor, targets: Tensor) -> np.ndarray:
    """(3, B): nats, tokens and hits of each row."""
    if hasattr(model, "output"):
        losses, hits = linear_token_losses(model.hidden(inputs), *model.output(), targets)
    else:
        logits = model(inputs)
        losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view_as(
            targets
        )
        hits = logits.argmax(-1) == targets
    sums = [losses.double(), targets != -100, hits]
    return np.stack([s.reshape(len(targets), -1).sum(1).double().cpu().numpy() for s in sums])


def _summary(rows: list[np.ndarray], classifier: bool) -> Evaluation:
    nll, tokens, correct = np.concatenate(rows, axis=1) if rows else np.zeros((3, 0))
    if not tokens.sum():
        raise ValueError("The loader holds no tokens to evaluate: give a longer text or a shorter seq_len.")
    if not np.isfinite(nll).all():
        raise ValueError(
            f"The loss of {(~np.isfinite(nll)).sum()} of {len(nll)} windows is not finite: the weights "
            "hold NaN or have diverged; train with a lower lr or reload a good checkpoint."
        )
    tokens, correct = tokens.astype(np.int64), correct.astype(np.int64)
    return Evaluation(
        float(nll.sum()), int(tokens.sum()), nll, tokens, int(correct.sum()), correct, classifier
    )
