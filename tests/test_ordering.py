"""kit.quantization.ordering: what a model computes does not change, and rows that cost alike share a step."""

import numpy as np
import pytest
import torch
from torch import nn

from kit import artifact, coding
from kit.losses import next_token_loss
from kit.models import build_model
from kit.parametrization import gradients, original_of
from kit.quantization.composition import compose_tables
from kit.quantization.ordering import RowOrder, _Permute, frequency_classes, order_rows
from kit.quantization.rate import RateLoss, row_sensitivity, set_rate_formats

PARTS = np.full((300, 2), -1, np.int32)
PARTS[200:] = np.random.default_rng(1).integers(0, 200, (100, 2))
COUNTS = torch.tensor(np.random.default_rng(0).permutation(np.arange(300) ** 2))


def model_of(tied):
    torch.manual_seed(0)
    return build_model("ResNetBK", {"vocab_size": 300, "d_model": 16, "layers": 1, "channels": 8, "tied": tied}).eval()


def batch():
    tokens = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]



def test_a_class_is_a_factor_of_four():
    assert frequency_classes(torch.tensor([1023, 255, 63, 0])).tolist() == [0, 1, 2, 5]


def test_gradient():
    order = RowOrder(torch.tensor([2, 0, 1, 0], dtype=torch.uint8))
    assert order.tokens.tolist() == [1, 3, 2, 0]
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Permute.apply(x, order.rows, order.tokens), rows)


@pytest.mark.parametrize("tied, composed", [(True, False), (False, True)])
def test_model_computes_the_same_and_rows_go_by_class(tied, composed):
    model, (inputs, targets) = model_of(tied), batch()
    if composed:
        compose_tables(model, PARTS, [(inputs, targets)], next_token_loss)
    before, table = model(inputs), original_of(model.embedding, "weight").detach().clone()
    expected = next(gradients(model, [(inputs, targets)], next_token_loss))
    order_rows(model, COUNTS)
    assert torch.equal(model(inputs), before)
    by_class = np.lexsort((np.arange(300), frequency_classes(COUNTS).numpy()))
    assert torch.equal(original_of(model.embedding, "weight"), table[by_class])
    found = next(gradients(model, [(inputs, targets)], next_token_loss))
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad[by_class] if len(grad) == 300 else grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied, composed", [(True, True), (False, False)])
def test_file_gives_the_model_back_and_holds_the_order_once(tied, composed, tmp_path):
    model, examples, given = model_of(tied), [batch()], PARTS if composed else None
    if composed:
        compose_tables(model, PARTS, examples, next_token_loss)
    order_rows(model, COUNTS)
    set_rate_formats(model, row_sensitivity(model, examples, next_token_loss), 4000)
    RateLoss(next_token_loss, model, 9000, examples).finish()
    artifact.save(model, tmp_path / "a.kit")
    assert torch.equal(artifact.load(tmp_path / "a.kit", parts=given)(examples[0][0]), model(examples[0][0]))
    artifact.save(artifact.load(tmp_path / "a.kit", trainable=True, parts=given), tmp_path / "b.kit")
    assert (tmp_path / "a.kit").read_bytes() == (tmp_path / "b.kit").read_bytes()
    table = artifact.describe(tmp_path / "a.kit").set_index("tensor")
    assert table.loc["(order of tokens)", "bytes"] == len(coding.encode(frequency_classes(COUNTS)[:, None].numpy()))
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

    def loss(model, signs):  # its squared gradient in a row is that of the row's share of all tokens
        return ((counts / counts.sum()).sqrt()[:, None] * signs * model.rows).sum()

    def error(model):
        set_rate_formats(model, row_sensitivity(model, [torch.ones(4096, 16)], loss), size, exponent=0.5)
        return (counts[:, None] * (model.rows - rows).square()).sum().item()

    size = 8000
    mixed = error(Table(rows))
    assert error(order_rows(Table(rows), counts)) < 0.6 * mixed
