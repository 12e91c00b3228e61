import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from kit.core.calibration import input_grams
from kit.core.weights import copy_model
from kit.models.moe import MoE
from kit.pruning import prune_sparsegpt
from kit.pruning import sparsegpt as of_stacks
from kit.pruning.magnitude import MagnitudePruner
from kit.pruning.mask import set_mask


def sparsegpt(weight, gram, sparsity=0.0, allowed=None, **settings):
    """Of one matrix."""
    allowed = None if allowed is None else allowed[None]
    values, mask = of_stacks(weight[None], gram[None], sparsity, allowed=allowed, **settings)
    return values[0], mask[0]


def problem(rows=7, columns=10, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


def least_squares(weight, x, mask):
    solved = np.zeros(weight.shape)
    for row in range(len(weight)):
        kept = mask[row].numpy()
        target = (x @ weight[row]).numpy()
        solved[row, kept] = np.linalg.lstsq(x.numpy()[:, kept], target, rcond=None)[0]
    return torch.from_numpy(solved)


def error(weight, pruned, x):
    return float(((pruned - weight) @ x.T).square().sum())


def test_prefix_masks_are_solved_to_the_least_squares_optimum():
    weight, x = problem()
    for pruned_columns in (1, 4):
        mask = torch.ones_like(weight, dtype=torch.bool)
        mask[:, :pruned_columns] = False
        solved, same = sparsegpt(weight, x.T @ x, allowed=mask, damping=0.0)
        assert torch.equal(mask, same)
        assert torch.allclose(solved, least_squares(weight, x, mask), atol=1e-9)


@pytest.mark.parametrize("setting", [{"sparsity": 0.5}, {"pattern": (2, 5)}])
def test_error_lies_between_the_optimum_and_plain_masking(setting):
    weight, x = problem()
    solved, mask = sparsegpt(weight, x.T @ x, **setting)
    best = error(weight, least_squares(weight, x, mask), x)
    assert best <= error(weight, solved, x) < 0.75 * error(weight, weight * mask, x)
    assert torch.equal(solved == 0, ~mask)
    assert (~mask).sum() == (35 if "sparsity" in setting else 42)
    if "pattern" in setting:
        assert (mask.unflatten(1, (-1, 5)).sum(-1) == 2).all()


def test_update_of_a_single_column_is_the_surgeon_step():
    weight, x = problem()
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, 6] = False
    inverse = torch.linalg.inv((x.T @ x)[6:, 6:])
    expected = weight.clone()
    expected[:, 6:] -= weight[:, 6:7] / inverse[0, 0] * inverse[0]
    solved, _ = sparsegpt(weight, x.T @ x, allowed=mask, damping=0.0)
    assert torch.allclose(solved, expected, atol=1e-9)


def test_blocks_of_columns_agree_with_one_pass_over_all():
    weight, x = problem(rows=3, columns=160, tokens=400)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    solved, _ = sparsegpt(weight, x.T @ x, allowed=mask, damping=0.01)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(160)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    brute = weight.clone()
    for j in range(160):
        wrong = brute[:, j] * ~mask[:, j] / upper[j, j]
        brute[:, j:] -= wrong[:, None] * upper[j, j:]
    assert torch.allclose(solved, brute * mask, atol=1e-8)
    assert (~sparsegpt(weight, gram, 0.37)[1]).sum() == round(0.37 * 480)


def test_features_that_never_fire_are_ranked_by_magnitude():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    solved, mask = sparsegpt(weight, torch.zeros(4, 4), 0.5)
    assert torch.equal(solved, torch.tensor([[3.0, 0.0, 2.0, 0.0]])) and torch.equal(
        mask, solved != 0
    )


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9, 9)),
        (nn.Conv2d(2, 4, (1, 3), dilation=(1, 2), padding="same"), (2, 5, 7)),
        (nn.Conv1d(4, 4, 4, groups=4), (4, 9)),
    ],
)
def test_grams_of_convolutions_multiply_out_to_the_output_energy(layer, shape):
    x = torch.randn(3, *shape)
    (gram,) = input_grams(nn.Sequential(layer), [x]).values()
    stack = (
        layer.weight.detach().double().reshape(layer.groups, layer.out_channels // layer.groups, -1)
    )
    energy = torch.einsum("grc,gcd,grd->gr", stack, gram, stack).flatten()
    output = layer(x) - layer.bias.view(-1, *[1] * (x.dim() - 2))
    assert torch.allclose(
        energy, output.double().square().transpose(0, 1).flatten(1).sum(1), rtol=1e-5
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_grams_of_experts_hold_only_their_tokens(top_k):
    moe, x = MoE(6, 5, 3, top_k), torch.randn(2, 20, 6)
    grams = input_grams(nn.Sequential(moe), [x[:1], (x[1:], None)], ["*w_in", "*w_out"])
    rows = x.reshape(-1, 6)
    chosen = moe.router(rows).topk(top_k).indices
    for expert in range(3):
        mine = rows[(chosen == expert).any(-1)].double()
        assert torch.allclose(grams["0.w_in"][expert], mine.T @ mine)
        hidden = F.gelu(mine @ moe.w_in[expert].double().T + moe.b_in[expert].double())
        assert torch.allclose(grams["0.w_out"][expert], hidden.T @ hidden, atol=1e-5)


def test_whole_model_beats_magnitude_pruning_on_its_calibration_outputs():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), MoE(24, 20, 3), nn.Linear(24, 8))
    x = torch.randn(300, 16) @ torch.randn(16, 16)
    weights = ["0.weight", "2.w_*", "3.weight"]
    surgeon = prune_sparsegpt(copy_model(dense), [x[:150], x[150:]], 0.6, weights)
    plain = MagnitudePruner(copy_model(dense), weights).prune(0.6)
    assert (surgeon[0].weight == 0).sum() == (plain[0].weight == 0).sum()
    target = dense(x)
    assert (surgeon(x) - target).square().mean() < 0.9 * (plain(x) - target).square().mean()
    again = prune_sparsegpt(copy_model(dense), [x[:150], x[150:]], 0.6, weights)
    assert all(
        torch.equal(a, b)
        for a, b in zip(surgeon.state_dict().values(), again.state_dict().values())
    )


def test_batches_may_come_from_a_generator_and_layers_be_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(input=self.a(input=x).relu())

    torch.manual_seed(0)
    x, model = torch.randn(60, 10), Net()
    other = prune_sparsegpt(copy_model(model), [x], 0.5)
    prune_sparsegpt(model, ({"x": part} for part in [x]), 0.5)
    assert torch.equal(model.b.weight, other.b.weight) and (model.b.weight == 0).sum() == 16


@pytest.mark.parametrize(
    "batch, message",
    [
        (torch.full((3, 4), torch.nan), "inputs of 'a.weight' hold NaN"),
        (torch.arange(80.0).view(20, 4) % 7, "damping=0.0 leaves inputs linearly dependent"),
    ],
)
def test_inputs_that_allow_no_repair_are_refused_before_anything_changes(batch, message):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("a", nn.Linear(4, 10))
    model.add_module("b", nn.Linear(10, 2))  # its ten inputs are made of four
    before = model.a.weight.clone()
    with pytest.raises(ValueError, match=message):
        prune_sparsegpt(model, [batch], 0.5, damping=0)
    assert not parametrize.is_parametrized(model.a) and torch.equal(model.a.weight, before)


def test_pruned_weights_stay_pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 4))
    before = torch.rand(4, 10) > 0.3
    set_mask(model[0], "weight", before)
    prune_sparsegpt(model, [torch.randn(30, 10)], 0.5)
    assert not ((model[0].weight != 0) & ~before).any() and (model[0].weight == 0).sum() == 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": 1.5}, r"sparsity is 1.5; it must be"),
        ({"sparsity": 0.5, "batches": []}, "at least one batch"),
        (
            {"sparsity": 0.5, "tensors": "embedding.*"},
            "'embedding.weight' cannot be collected, as this Embedding looks its rows up",
        ),
        ({"pattern": (2, 4)}, "needs rows that 4 divides, not the 10 of linear.weight"),
    ],
)
def test_bad_input(arguments, message):
    model = nn.Sequential()
    model.add_module("embedding", nn.Embedding(5, 10))
    model.add_module("linear", nn.Linear(10, 4))
    arguments = {"batches": [torch.tensor([1, 2])], "tensors": "linear.*", **arguments}
    with pytest.raises(ValueError, match=message):
        prune_sparsegpt(model, **arguments)
    assert not parametrize.is_parametrized(model.linear)


def test_weights_without_inputs_stay_and_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.LSTM(8, 6), nn.Linear(6, 4))
    model[1].forward = lambda x: nn.LSTM.forward(model[1], x)[0]
    x = torch.randint(0, 5, (9, 7))
    kept = {name: p.clone() for name, p in model.named_parameters()}
    prune_sparsegpt(model, [x], 0.5)
    assert (model[2].weight == 0).float().mean() == 0.5
    assert set(model.unrepaired) == {"0.weight", "1.weight_ih_l0", "1.weight_hh_l0"}
    assert "this LSTM shows no inputs" in model.unrepaired["1.weight_ih_l0"]
    for name in model.unrepaired:
        assert torch.equal(model.get_parameter(name), kept[name])
    with pytest.raises(ValueError, match="inputs of none of its weights: prune it by magnitude"):
        prune_sparsegpt(model[:1], [x], 0.5)
