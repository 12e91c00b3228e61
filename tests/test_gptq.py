"""GPTQ against direct minimization of its own objective, ."""

import copy
import itertools

import pytest
import torch
from torch import nn

from kit.core import obs
from kit.core.weights import weight_of
from kit.models import build_model
from kit.pruning.mask import set_mask
from kit.quantization import FakeQuantize, Format, formats, quantize_weights, quantizers
from kit.quantization.gptq import gptq, gptq_round, repairable


def correlated(rows, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) @ torch.randn(columns, columns, generator=g)


def objective(weight, rounded, gram):
    difference = (weight - rounded).double()
    return ((difference @ gram) * difference).sum(-1)


def all_codes(columns, format):
    return torch.tensor(
        list(itertools.product(range(format.qmin, format.qmax + 1), repeat=columns))
    ).float()


def test_close_to_the_best_of_all_roundings_and_better_than_the_nearest():
    torch.manual_seed(0)
    format, weight, x = Format(2), torch.randn(12, 6), correlated(200, 6)
    gram, scale = (x.T @ x).double(), formats.choose_qparams(weight, format)[0]
    rounded = gptq_round(
        weight[None], gram[None], scale.expand_as(weight)[None], None, format, damping=1e-6
    )[0]
    found = objective(weight, rounded, gram)
    best = torch.stack(
        [objective(w, all_codes(6, format) * s, gram).min() for w, s in zip(weight, scale)]
    )
    nearest = objective(
        weight, formats.dequantize(formats.quantize(weight, scale, None, format), scale, None), gram
    )
    assert (found >= best * (1 - 1e-9)).all()
    assert found.sum() < 0.7 * nearest.sum()
    assert found.sum() < 1.5 * best.sum()


def test_two_columns_are_solved_exactly_given_the_first():
    """With two columns, the second is the best answer to the first's rounding: brute force over its
    codes agrees."""
    torch.manual_seed(1)
    format, weight, x = Format(3), torch.randn(20, 2), correlated(50, 2)
    gram, scale = (x.T @ x).double(), torch.full((20, 2), 0.4)
    rounded = gptq_round(weight[None], gram[None], scale[None], None, format, damping=0.0)[0]
    first = int(gram.diagonal().argmax())
    nearest = formats.dequantize(formats.quantize(weight, scale, None, format), scale, None)
    assert torch.equal(rounded[:, first], nearest[:, first])
    trials = torch.stack(
        [
            rounded.index_copy(1, torch.tensor([1 - first]), torch.full((20, 1), 0.4 * code))
            for code in range(format.qmin, format.qmax + 1)
        ]
    )
    errors = torch.stack([objective(weight, trial, gram) for trial in trials])
    assert torch.allclose(objective(weight, rounded, gram), errors.min(0).values)


def test_blocks_of_columns_give_the_same_codes_as_one(monkeypatch):
    torch.manual_seed(2)
    weight, x = torch.randn(3, 8, 40), correlated(300, 40)
    gram, scale = (x.T @ x).double()[None].expand(3, 40, 40), torch.full((3, 8, 40), 0.3)
    whole = gptq_round(weight, gram, scale, None, Format(3))
    monkeypatch.setattr(obs.column_sweep, "__defaults__", (7,))
    assert torch.equal(gptq_round(weight, gram, scale, None, Format(3)), whole)


def test_independent_inputs_leave_nothing_to_repair():
    weight, scale = torch.randn(4, 9), torch.full((4, 9), 0.2)
    rounded = gptq_round(
        weight[None], torch.eye(9, dtype=torch.float64)[None], scale[None], None, Format(4)
    )[0]
    assert torch.equal(
        rounded, formats.dequantize(formats.quantize(weight, scale, None, Format(4)), scale, None)
    )


@pytest.mark.parametrize(
    "format",
    [
        Format(4, granularity="group", group_size=16),
        Format(3, False),
        Format(2, range="mse"),
        Format("ternary", granularity="tensor", range="mse"),
    ],
    ids=str,
)
def test_layer_outputs_err_less_than_with_the_nearest_codes(format):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 24)), correlated(256, 40)
    wanted = model(x)
    nearest = quantize_weights(copy.deepcopy(model), format)
    repaired = gptq(copy.deepcopy(model), format, [x])
    assert (repaired(x) - wanted).square().sum() < 0.9 * (nearest(x) - wanted).square().sum()
    step = weight_of(repaired[0]).find(FakeQuantize)
    assert torch.equal(
        repaired[0].weight, weight_of(repaired[0]).original
    )  # its values are on the grid
    assert step.qparams(weight_of(repaired[0]).original)[0] is step.scale


def test_every_kind_of_weight_of_a_language_model():
    torch.manual_seed(0)
    model = build_model(
        "ResNetBK", {"vocab_size": 80, "d_model": 24, "layers": 2, "d_ff": 32, "channels": 12}
    ).eval()
    tokens = [torch.randint(0, 80, (8, 48)) for _ in range(2)]
    wanted, format = model.hidden(tokens[0]), Format(3, granularity="group", group_size=8)
    nearest = quantize_weights(copy.deepcopy(model), format)
    repaired = gptq(copy.deepcopy(model), format, tokens)
    assert quantizers(repaired).keys() == quantizers(nearest).keys()
    assert (repaired.hidden(tokens[0]) - wanted).square().mean() < 0.9 * (
        nearest.hidden(tokens[0]) - wanted
    ).square().mean()
    hidden = repaired.hidden(tokens[0]).detach()  # the output layer, on the inputs it has
    errors = [
        (hidden @ (m.head.weight - model.head.weight).T).square().mean()
        for m in (repaired, nearest)
    ]
    assert errors[0] < 0.9 * errors[1]
    assert torch.equal(repaired.embedding.weight, nearest.embedding.weight)


def test_masked_weights_stay_zero_and_what_they_would_have_taken_goes_to_the_others():
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(24, 20)), torch.randn(128, 24) @ torch.randn(24, 24)
    mask = torch.rand(20, 24) > 0.5
    set_mask(model[0], "weight", mask)
    wanted, nearest = model(x), quantize_weights(copy.deepcopy(model), Format(4))
    gptq(model, Format(4), [x])
    assert (model[0].weight[~mask] == 0).all() and model[0].weight[mask].abs().sum() > 0
    errors = [(m(x) - wanted).square().sum() for m in (model, nearest)]
    assert errors[0] < 0.9 * errors[1]


def test_inputs_that_never_fire_and_dependent_ones_are_repaired_or_refused():
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(30, 12)), correlated(90, 30)
    x[:, 4:11] = 0
    x[:, 20] = x[:, 21]
    errors = [
        (m(x) - dense(x)).square().sum()
        for m in (
            gptq(copy.deepcopy(dense), Format(3), (part for part in x.split(30))),
            quantize_weights(copy.deepcopy(dense), Format(3)),
        )
    ]
    assert errors[0] < 0.7 * errors[1]
    alone = quantize_weights(copy.deepcopy(dense), Format(3))
    assert torch.equal(gptq(copy.deepcopy(dense), Format(3), [0 * x])[0].weight, alone[0].weight)
    before = copy.deepcopy(dense.state_dict())
    for bad, damping, message in (
        (x, 0.0, "damping=0.0 leaves"),
        (x / 0, 0.01, "inputs of '0.weight' hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            gptq(dense, Format(3), [bad], damping)
        assert dense.state_dict().keys() == before.keys() and torch.equal(
            dense[0].weight, before["0.weight"]
        )


def test_recurrent_weights_keep_the_nearest_codes():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Last(), torch.randn(32, 5, 6)
    nearest, repaired = (
        quantize_weights(copy.deepcopy(model), Format(4)),
        gptq(copy.deepcopy(model), Format(4), [x]),
    )
    assert torch.equal(repaired.lstm.weight_ih_l0, nearest.lstm.weight_ih_l0)
    assert not torch.equal(repaired.head.weight, nearest.head.weight)


def test_bad_inputs_are_refused_and_what_is_repaired_is_named():
    model, x = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)), torch.tensor([1, 2, 3])
    gptq(model, Format(4), [x])
    assert repairable(model, [x]) == ["1.weight"]
    assert model.unrepaired == {"0.weight": "this Embedding looks its rows up"}
    gptq(model, {"1.weight": Format(4)}, [x])
    assert model.unrepaired == {}  # the embedding is not in the plan
    with pytest.raises(ValueError, match="got no batch"):
        gptq(nn.Sequential(nn.Linear(2, 2)), Format(4), [])
    with pytest.raises(ValueError, match="hold NaN or infinite"):
        gptq(nn.Sequential(nn.Linear(2, 2)), Format(4), [torch.full((3, 2), torch.nan)])
    with pytest.raises(ValueError, match="damping=0.0"):
        gptq(nn.Sequential(nn.Linear(3, 2)), Format(4), [torch.ones(5, 3)], damping=0.0)
