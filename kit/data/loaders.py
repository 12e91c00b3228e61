"""Batches: windows of token arrays, and scikit-learn's handwritten digits."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kit.core.settings import Count, checks
from kit.data.corpus import Corpus

IGNORED = -100  # target of padding, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Loaders:
    """One DataLoader of (inputs, targets) for each split."""

    train: DataLoader
    validation: DataLoader
    test: DataLoader


class Windows(Dataset):
    """Windows of `seq_len` tokens one after another, each with its targets one token later.

    Every token but the first is the target of exactly one window. A short last window is padded
    (input 0, target -100) or, with `full_only`, dropped. Batches: int64 (B, seq_len), twice.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, full_only: bool = False):
        self.tokens, self.seq_len = torch.from_numpy(np.asarray(tokens)), seq_len
        targets = len(tokens) - 1
        self.length = targets // seq_len if full_only else -(-targets // seq_len)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """All of a batch at once; DataLoader prefers this method."""
        starts = torch.as_tensor(indices) * self.seq_len
        at = starts[:, None] + torch.arange(self.seq_len + 1)
        outside = at >= len(self.tokens)
        window = self.tokens[at.clamp(max=len(self.tokens) - 1)].long()
        inputs = window.masked_fill(outside, 0)[:, :-1]
        return inputs, window.masked_fill(outside, IGNORED)[:, 1:]


@checks
def token_loaders(corpus: Corpus, batch_size: Count, seq_len: Count) -> Loaders:
    """Loaders of (inputs, targets), int64 (B, seq_len), targets one token ahead.

    Training windows are shuffled, in an order drawn from torch's global generator; incomplete
    windows and batches are dropped. Validation and test give each target exactly once, in order.

    Raises ValueError when the training text is shorter than a window, or than a batch of them.
    """
    name, tokens = corpus.name, len(corpus.train)
    if tokens <= seq_len:
        text = f"the training text of {name!r}, {tokens} tokens"
        raise ValueError(f"seq_len={seq_len} is longer than {text}: choose less or give more text.")
    for split in ("validation", "test"):
        if len(getattr(corpus, split)) < 2:
            raise ValueError(f"The {split} text of {name!r} has under 2 tokens: give more text.")
    train = Windows(corpus.train, seq_len, full_only=True)
    if len(train) < batch_size:
        there = f"{len(train)} windows of seq_len={seq_len} in the training text of {name!r}"
        raise ValueError(f"batch_size={batch_size} is more than the {there}: choose less.")
    splits = [train, Windows(corpus.validation, seq_len), Windows(corpus.test, seq_len)]
    return _loaders(splits, batch_size, collate_fn=lambda batch: batch)  # gathered already


@checks
def load_digits(batch_size: Count = 64) -> Loaders:
    """scikit-learn's handwritten digits: images float32 (B, 1, 8, 8) in 0..1, labels int64 (B,).

    1,437 / 180 / 180 images, stratified by digit; training is shuffled by torch's global generator.
    Raises ValueError when batch_size is under 1 or over the number of training images.
    """
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(images.astype(np.float32) / 16).view(-1, 1, 8, 8)
    labels = torch.from_numpy(labels.astype(np.int64))
    part = torch.arange(len(labels)) % 10  # along the labels in order: every tenth of each digit
    by_digit = labels.argsort(stable=True)
    rows = [by_digit[chosen] for chosen in (part > 1, part == 1, part == 0)]
    if batch_size > (most := len(rows[0])):
        raise ValueError(f"batch_size={batch_size} must be between 1 and {most}, the training set.")
    return _loaders([TensorDataset(images[r], labels[r]) for r in rows], batch_size)


def _loaders(splits: list[Dataset], batch_size: int, **more) -> Loaders:
    """Training shuffled in whole batches; the others in order, without drawing from torch's global
    generator: evaluating does not change training."""
    train = DataLoader(splits[0], batch_size, shuffle=True, drop_last=True, **more)
    more["generator"] = torch.Generator()
    return Loaders(train, *(DataLoader(split, batch_size, **more) for split in splits[1:]))
