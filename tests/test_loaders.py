import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kit.data import load_digits, token_loaders

SPLITS = ("train", "validation", "test")


class Tokens:
    name = "tokens"
    train, validation, test = (np.arange(length, dtype=np.int32) for length in (1000, 103, 9))


@given(length=st.integers(2, 60), seq_len=st.integers(1, 20), batch_size=st.integers(1, 5))
def test_each_target_once_and_behind_its_input(length, seq_len, batch_size):
    class Given(Tokens):
        test = np.arange(100, 100 + length, dtype=np.int32)

    targets = []
    for x, y in token_loaders(Given, batch_size, seq_len).test:
        assert x.shape == y.shape and x.shape[1] == seq_len and x.dtype == y.dtype == torch.int64
        assert (y[y != -100] == x[y != -100] + 1).all()
        targets += y[y != -100].tolist()
    assert targets == list(range(101, 100 + length))


def test_training_windows_are_whole_and_shuffled_by_the_global_generator():
    loader = token_loaders(Tokens, 4, 10).train

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat([x for x, _ in loader])

    first = epoch(0)
    assert first.shape == (96, 10) and (first[:, 1:] == first[:, :-1] + 1).all()
    assert len(first[:, 0].unique()) == 96 and (first[:, 0] % 10 == 0).all()
    assert torch.equal(first, epoch(0)) and not torch.equal(first, epoch(1))


def test_evaluating_leaves_the_global_generator_alone():
    loaders = token_loaders(Tokens, 4, 10)
    state = torch.get_rng_state()
    assert len(list(loaders.validation)) == 3 and len(list(loaders.test)) == 1
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "batch_size, seq_len, message",
    [
        (1, 1000, "seq_len=1000 is longer than the training text of 'tokens', 1000 tokens"),
        (32, 100, "batch_size=32 is more than the 9 windows of seq_len=100"),
        (0, 10, "batch_size is 0; it must be a whole number from 1"),
    ],
)
def test_too_long_a_sequence_is_told(batch_size, seq_len, message):
    with pytest.raises(ValueError, match=message):
        token_loaders(Tokens, batch_size, seq_len)


def test_digits():
    loaders = load_digits(batch_size=64)
    splits = {
        split: [torch.cat(part) for part in zip(*getattr(loaders, split))] for split in SPLITS
    }
    for images, labels in splits.values():
        assert (
            images.shape[1:] == (1, 8, 8)
            and images.dtype == torch.float32
            and labels.dtype == torch.int64
        )
        assert images.min() == 0 and images.max() == 1 and len(labels.unique()) == 10
    assert [len(splits[split][1]) for split in SPLITS] == [22 * 64, 180, 180]
    assert (
        max(labels.bincount().max() - labels.bincount().min() for _, labels in splits.values())
        <= 10
    )
    with pytest.raises(ValueError, match="batch_size=5000 must be between 1 and 1437"):
        load_digits(5000)
