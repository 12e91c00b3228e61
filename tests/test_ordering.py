"""kit.quantization.ordering: what a model computes does not change, and rows that cost alike share
a step."""

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kit import artifact
from kit.artifact.layouts import Reader, Writer
from kit.budget.rate import RateLoss, RateSettings, row_sensitivity, set_rate_formats
from kit.core.calibration import gradients
from kit.core.weights import weight_of
from kit.data.tokenization import BPETokenizer
from kit.models import build_model
from kit.models.moe import Permute
from kit.quantization.token_tables import (
    RowOrder,
    compose_tables,
    expected_classes,
    frequency_classes,
    merge_curve,
    order_rows,
)
from kit.training.losses import next_token_loss

PARTS = np.full((300, 2), -1, np.int32)
PARTS[200:] = np.random.default_rng(1).integers(0, 200, (100, 2))
COUNTS = np.random.default_rng(0).permutation(np.arange(300) ** 2)
CLASSES = frequency_classes(COUNTS, COUNTS.max())


def model_of(tied):
    torch.manual_seed(0)
    return build_model(
        "ResNetBK", {"vocab_size": 300, "d_model": 16, "layers": 1, "channels": 8, "tied": tied}
    ).eval()


def batch():
    tokens = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def written(order):
    write = Writer()
    return order.encode(None, None, write), write


def coded(order):
    return written(order)[1].blobs[0]


def classes_of(order, parts=None):
    entry, write = written(order)
    entry, stored = msgspec.convert(entry, RowOrder.settings), torch.zeros(len(order.classes))
    return RowOrder.decode(entry, Reader(write.letters, write.blobs), None, stored, parts)[
        0
    ].classes


def test_a_class_is_a_factor_of_four():
    assert frequency_classes(np.array([1023, 255, 63, 0]), 1023).tolist() == [0, 1, 2, 5]


@given(st.integers(0, 2**31 - 2), st.integers(0, 2**31 - 2))
def test_classes_are_rounded_logarithms(count, top):
    exact = math.log((top + 1) / (count + 1), 4)
    if abs(exact - math.floor(exact) - 0.5) > 1e-6:
        assert frequency_classes(np.array([count]), top)[0] == max(0, round(exact))


def test_merges_tell_the_classes_and_classes_survive_merges_that_do_not():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 9))) for _ in range(400)]
    text = " ".join(rng.choice(words, 40_000, p=(p := 1 / np.arange(1, 401)) / p.sum()))
    tokenizer = BPETokenizer.train(text, 1000)
    counts = np.bincount(tokenizer.encode(text), minlength=1000)
    classes, curve = frequency_classes(counts, counts.max()), merge_curve(counts, tokenizer.parts)
    made = tokenizer.parts[:, 0] >= 0
    assert (expected_classes(curve, tokenizer.parts) == classes)[made].mean() > 0.8
    informed, plain = RowOrder(classes, tokenizer.parts, curve), RowOrder(classes)
    assert len(coded(informed)) < 0.8 * len(coded(plain))
    for order, parts in ((informed, tokenizer.parts), (plain, None)):
        assert np.array_equal(classes_of(order, parts), classes)
    other = rng.permutation(classes)
    assert np.array_equal(
        classes_of(RowOrder(other, tokenizer.parts, curve), tokenizer.parts), other
    )


def test_gradient():
    order = RowOrder(np.array([2, 0, 1, 0]))
    assert order.tokens.tolist() == [1, 3, 2, 0]
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Permute.apply(x, order.rows, order.tokens), rows)


@pytest.mark.parametrize("tied, composed", [(True, False), (False, True)])
def test_model_computes_the_same_and_rows_go_by_class(tied, composed):
    model, (inputs, targets) = model_of(tied), batch()
    if composed:
        compose_tables(model, PARTS, [(inputs, targets)], next_token_loss)
    before, table = model(inputs), weight_of(model.embedding).original.detach().clone()
    expected = next(gradients(model, [(inputs, targets)], next_token_loss))
    order_rows(model, COUNTS)
    assert torch.equal(model(inputs), before)
    by_class = np.lexsort((np.arange(300), CLASSES))
    assert torch.equal(weight_of(model.embedding).original, table[by_class])
    found = next(gradients(model, [(inputs, targets)], next_token_loss))
    for name, grad in expected.items():
        assert torch.allclose(
            found[name], grad[by_class] if len(grad) == 300 else grad, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("tied, composed", [(True, True), (False, False)])
def test_file_gives_the_model_back_and_holds_the_order_once(tied, composed, tmp_path):
    model, examples, parts = model_of(tied), [batch()], PARTS if composed else None
    if composed:
        compose_tables(model, PARTS, examples, next_token_loss)
    order_rows(model, COUNTS)
    set_rate_formats(model, row_sensitivity(model, examples, next_token_loss), 4000)
    RateLoss(next_token_loss, model, 9000, examples).finish()
    artifact.save(model, tmp_path / "a.kit")
    assert torch.equal(
        artifact.load(tmp_path / "a.kit", parts=parts)(examples[0][0]), model(examples[0][0])
    )
    artifact.save(
        artifact.load(tmp_path / "a.kit", trainable=True, parts=parts), tmp_path / "b.kit"
    )
    assert (tmp_path / "a.kit").read_bytes() == (tmp_path / "b.kit").read_bytes()
    table = artifact.describe(tmp_path / "a.kit").set_index("tensor")
    curve = None if parts is None else merge_curve(COUNTS, parts)
    assert table.loc["(order of tokens)", "bytes"] == len(coded(RowOrder(CLASSES, parts, curve)))
    assert table["bytes"].sum() == (tmp_path / "a.kit").stat().st_size


def test_without_formats_nothing_of_it_is_in_the_file(tmp_path):
    model = model_of(True)
    artifact.save(model, tmp_path / "a.kit")
    artifact.save(order_rows(model, COUNTS), tmp_path / "b.kit")
    assert (tmp_path / "a.kit").read_bytes() == (tmp_path / "b.kit").read_bytes()


class Table(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows.clone())


def test_frequent_rows_are_nearer_at_the_same_bytes():
    """Rows by their numbers mix frequencies; the error that counts falls once they do not."""
    generator = torch.Generator().manual_seed(0)
    counts = 1e5 / (1 + torch.randperm(4096, generator=generator))
    rows = torch.randn(4096, 16, generator=generator)

    def loss(
        model, signs
    ):  # its squared gradient in a row is that of the row's share of all tokens
        return ((counts / counts.sum()).sqrt()[:, None] * signs * model.rows).sum()

    def error(model):
        set_rate_formats(
            model,
            row_sensitivity(model, [torch.ones(4096, 16)], loss),
            size,
            RateSettings(exponent=0.5),
        )
        return (counts[:, None] * (model.rows - rows).square()).sum().item()

    size = 8000
    mixed = error(Table(rows))
    assert error(order_rows(Table(rows), counts.long())) < 0.6 * mixed


def test_counts_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="no weight of ResNetBK has the 299 rows"):
        order_rows(model_of(True), COUNTS[:299])
