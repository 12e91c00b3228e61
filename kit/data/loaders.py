"""Batches: windows of token arrays, and scikit-learn's handwritten digits."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

IGNORED = -100  # target of padding, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Loaders:
    """One DataLoader of (inputs, targets) for each split."""

    train: DataLoader
    validation: DataLoader
    test: DataLoader


class Windows(Dataset):
    """Windows of ``seq_len`` tokens one after another, each with its targets one token later.

    Every token but the first is the target of exactly one window. A short last window is padded (input 0,
    target -100) or, with ``full_only``, dropped. Batches are gathered at once: int64 (B, seq_len), twice.
    """

    def __init__(self, tokens, seq_len, full_only=False):
        self.tokens, self.seq_len = torch.from_numpy(np.asarray(tokens)), seq_len
        targets = len(tokens) - 1
        self.length = targets // seq_len if full_only else -(-targets // seq_len)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices):
        """All of a batch at once; DataLoader prefers this method."""
        starts = torch.as_tensor(indices) * self.seq_len
        at = starts[:, None] + torch.arange(self.seq_len + 1)
        inside = at < len(self.tokens)
        window = self.tokens[at.clamp(max=len(self.tokens) - 1)].long()
        inputs = window.masked_fill(~inside, 0)[:, :-1]
        return inputs, window.masked_fill(~inside, IGNORED)[:, 1:]


def _as_is(batch):
    """Collation of what `Windows.__getitems__` gathered already."""
    return batch


def token_loaders(corpus, batch_size, seq_len):
    """Loaders of (inputs, targets), int64 (B, seq_len), targets one token ahead.

    Training windows are shuffled, in an order drawn from torch's global generator; incomplete windows and
    batches are dropped. Validation and test give each target exactly once, in order; a short last window is
    padded with target -100.

    Raises ValueError when the training text is shorter than a window, or than a batch of them.
    """
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size={batch_size} and seq_len={seq_len} must both be 1 or more.")
    if len(corpus.train) <= seq_len:
        raise ValueError(f"seq_len={seq_len} is longer than the training text of {corpus.name!r}, "
                         f"{len(corpus.train)} tokens: choose a shorter seq_len or give more text.")
    for split in ("validation", "test"):
        if len(getattr(corpus, split)) < 2:
            raise ValueError(f"The {split} text of {corpus.name!r} has under 2 tokens: give more text.")
    train = Windows(corpus.train, seq_len, full_only=True)
    if len(train) < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {len(train)} windows of seq_len={seq_len}"
                         f" in the training text of {corpus.name!r}: choose smaller ones or give more text.")
    ordered = (_ordered(Windows(tokens, seq_len), batch_size, collate_fn=_as_is)
               for tokens in (corpus.validation, corpus.test))
    return Loaders(DataLoader(train, batch_size, shuffle=True, drop_last=True, collate_fn=_as_is), *ordered)


def _ordered(dataset, batch_size, **options):
    """A loader in order that leaves torch's global generator alone: evaluating does not change training."""
    return DataLoader(dataset, batch_size, generator=torch.Generator(), **options)


def load_digits(batch_size=64):
    """Loaders of scikit-learn's handwritten digits: images float32 (B, 1, 8, 8) in 0..1, labels int64 (B,).

    1,437 / 180 / 180 images, stratified by digit; training is shuffled by torch's global generator.
    Raises ValueError when batch_size is under 1 or over the number of training images.
    """
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(images.astype(np.float32) / 16).view(-1, 1, 8, 8)
    labels = torch.from_numpy(labels.astype(np.int64))
    part = torch.arange(len(labels)) % 10  # along the labels in order: every tenth of each digit
    by_digit = labels.argsort(stable=True)
    train, validation, test = (by_digit[chosen] for chosen in (part > 1, part == 1, part == 0))
    if not 1 <= batch_size <= len(train):
        raise ValueError(f"batch_size={batch_size} must be between 1 and the {len(train)} training images.")
    sets = [TensorDataset(images[rows], labels[rows]) for rows in (train, validation, test)]
    return Loaders(DataLoader(sets[0], batch_size, shuffle=True, drop_last=True),
                   _ordered(sets[1], batch_size), _ordered(sets[2], batch_size))
