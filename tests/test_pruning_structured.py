import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from kit import artifact
from kit.core.measurement import macs
from kit.core.protocols import call_with
from kit.core.weights import weight_of, weights
from kit.models import (
    DigitsCNN,
    DigitsMLP,
    MoE,
    ResNetBK,
    ResNetBKConfig,
    TransformerLM,
    parameter_count,
)
from kit.models.peers import TransformerLMConfig
from kit.pruning import (
    MagnitudePruner,
    Mask,
    get_mask,
    prune_bk_channels,
    prune_channels,
    prune_hidden_units,
    set_mask,
)
from kit.pruning.least_squares import layer_examples
from kit.pruning.structured import (
    bk_channel_scores,
    group_scores,
    hidden_unit_scores,
    shrink_hidden,
    sort_hidden_units,
)
from kit.pruning.units import families
from kit.quantization import (
    ActivationQuantizer,
    FakeQuantize,
    Format,
    calibrate,
    quantize_bk_core,
    quantize_weights,
)
from kit.quantization.token_tables import compose_tables, order_rows
from kit.training.losses import classification_loss, next_token_loss

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(0))


def cnn():
    torch.manual_seed(0)
    model = DigitsCNN()
    model(torch.randn(64, 1, 8, 8))  # so that the batch norms have statistics of their own
    return model.eval()


def bk(**changes):
    torch.manual_seed(0)
    shapes = dict(vocab_size=30, d_model=16, layers=2, experts=3, d_ff=12, channels=6) | changes
    return ResNetBK(ResNetBKConfig(**shapes)).eval()


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gradients(model, batch, loss):
    for p in model.parameters():
        p.grad = None
    loss(model, batch).backward()
    return model


def part(weight, importance):
    if importance == "taylor":
        return (weight * weight.grad).abs()
    return weight.abs() ** (1 if importance == "l1" else 2)


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
def test_cnn_loses_exactly_the_channels_that_brute_force_ranks_lowest(importance):
    model, labels = cnn(), torch.tensor([1, 2, 3, 4])
    extra = {"batches": [(IMAGES, labels)]} if importance == "taylor" else {}
    small = prune_channels(model, IMAGES, 0.5, importance=importance, **extra)
    gradients(model, (IMAGES, labels), classification_loss)
    first, norm, second = model[0].weight, model[1].weight, model[3].weight
    scores = part(first, importance).flatten(1).sum(1) + part(second, importance).sum((0, 2, 3))
    scores = scores + part(norm, importance)
    keep = scores.argsort(descending=True)[:8].sort().values
    assert torch.equal(small[0].weight, first[keep])
    assert torch.equal(small[1].running_mean, model[1].running_mean[keep])
    assert all(p.grad is None for p in small.parameters())


@pytest.mark.parametrize("p, importance", [(1, "l1"), (2, "l2")])
def test_scores_and_groups_are_torch_prunings_own(p, importance):
    model = cnn()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=IMAGES)
    group = graph.get_pruning_group(model[3], tp.prune_conv_out_channels, list(range(32)))
    theirs = tp.importance.GroupMagnitudeImportance(p=p, normalizer=None)(group)
    (family,) = [f for f in families(model, call_with(IMAGES), ["3"])]
    order = [member["3", 0][0] for member in family.members]
    score = group_scores(model, family, importance)
    assert torch.allclose(score / score.sum(), (theirs / theirs.sum())[order].double(), rtol=1e-5)


def test_pruned_cnn_computes_what_the_dense_one_does_without_those_channels():
    model = cnn()
    small = prune_channels(model, IMAGES, 0.25)
    keep = (model[0].weight.flatten(1)[:, None] == small[0].weight.flatten(1)[None]).all(-1).any(1)
    assert keep.sum() == 12
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed[3].weight[:, ~keep] = 0
        second = torch.tensor(
            [
                any(torch.equal(row[keep], other) for other in small[3].weight)
                for row in zeroed[3].weight
            ]
        )
        zeroed[8].weight.view(10, 32, 16)[:, ~second] = 0
    assert second.sum() == 24
    assert torch.allclose(small(IMAGES), zeroed(IMAGES), atol=1e-5)


def test_half_the_channels_are_about_a_third_of_bytes_and_macs(tmp_path):
    model, before = cnn(), state_of(cnn())
    small = prune_channels(model, IMAGES, 0.5)
    assert small.config.channels == (8, 16)
    sizes = [artifact.save(m, tmp_path / "model.kit") for m in (model, small)]
    assert sizes[1] <= 0.55 * sizes[0] and macs(small, IMAGES) <= 0.55 * macs(model, IMAGES)
    assert torch.equal(artifact.load(tmp_path / "model.kit")(IMAGES), small(IMAGES))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert prune_channels(DigitsMLP(), IMAGES, 0.5).config.hidden == (32, 32)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).relu()
        return self.head((x + self.norm(self.b(x)).relu()).mean((2, 3)))


def test_both_sides_of_a_residual_sum_lose_the_same_channels():
    small = prune_channels(Residual().eval(), IMAGES, 0.5)
    assert (
        small.a.out_channels
        == small.b.in_channels
        == small.b.out_channels
        == small.head.in_features
        == 4
    )
    assert small(IMAGES).shape == (4, 3)


def test_named_layers_of_a_transformer(tmp_path):
    torch.manual_seed(0)
    model = TransformerLM(
        TransformerLMConfig(vocab_size=30, d_model=16, layers=2, heads=2, d_ff=20)
    ).eval()
    small = prune_channels(model, TOKENS, 0.5, layers="*.ff_in")
    assert small.config.d_ff == 10 and small.layers[0].qkv.out_features == 48
    artifact.save(small, tmp_path / "model.kit")
    assert torch.equal(artifact.load(tmp_path / "model.kit")(TOKENS), small(TOKENS))


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
def test_group_scores_sum_over_everything_that_goes_together(importance):
    model = gradients(bk(), (TOKENS, TOKENS), next_token_loss)
    mixer, moe = model.layers[0].mixer, model.layers[0].moe
    scores = bk_channel_scores(mixer, importance)
    makes = [part(layer.weight, importance) for layer in (mixer.input, mixer.gate)]
    reads = part(mixer.output.weight, importance)
    for c in range(6):
        brute = sum(rows[c].sum() + rows[6 + c].sum() for rows in makes)
        assert torch.allclose(scores[c], brute + reads[:, c].sum() + reads[:, 6 + c].sum())
    scores = hidden_unit_scores(moe, importance)
    brute = part(moe.w_in, importance).sum(2) + part(moe.w_out, importance).transpose(1, 2).sum(2)
    assert torch.allclose(scores, brute)


def test_hidden_units_of_an_expert_rank_as_neurons_of_the_same_mlp_in_torch_pruning():
    torch.manual_seed(0)
    moe = MoE(6, 10, 1)
    mlp = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    with torch.no_grad():
        mlp[0].weight.copy_(moe.w_in[0]), mlp[0].bias.copy_(moe.b_in[0])
        mlp[2].weight.copy_(moe.w_out[0]), mlp[2].bias.copy_(moe.b_out[0])
    x = torch.randn(5, 6)
    small = prune_hidden_units(nn.Sequential(moe), 0.4)
    theirs = prune_channels(mlp, x, 0.4)
    assert torch.equal(small[0].w_in[0], theirs[0].weight)
    assert torch.equal(small[0].w_out[0], theirs[2].weight)
    assert torch.allclose(small(x), theirs(x), atol=1e-6)


def test_bk_channels_go_together_and_the_rest_computes_as_if_they_were_silent(tmp_path):
    model, before = bk(), state_of(bk())
    small = prune_bk_channels(model, 0.5)
    small = prune_hidden_units(small, 0.25, layers="layers.1.*")
    assert small.config.channels == 3 and small.config.d_ff == (12, 9) and small.config.experts == 3
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for layer in silent.layers:
            gone = bk_channel_scores(layer.mixer).argsort()[:3]
            layer.mixer.output.weight[:, torch.cat([gone, gone + 6])] = 0
        lost = hidden_unit_scores(silent.layers[1].moe).argsort(1)[:, :3]
        for e in range(3):
            silent.layers[1].moe.w_out[e][:, lost[e]] = 0
    assert torch.allclose(small(TOKENS), silent(TOKENS), atol=1e-5)
    artifact.save(small, tmp_path / "model.kit")
    assert torch.equal(artifact.load(tmp_path / "model.kit")(TOKENS), small(TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_sorted_hidden_units_compute_the_same_in_fewer_bytes():
    model = bk(d_ff=96)
    with torch.no_grad():
        for layer in model.layers:
            layer.moe.b_in.normal_()
            layer.moe.w_in *= torch.logspace(-2, 0, 96)[torch.randperm(96), None]
    torch.manual_seed(1)
    rows = {tuple(row) for row in model.layers[1].moe.w_in[2].tolist()}
    with torch.no_grad():
        before = model(TOKENS)
        assert sort_hidden_units(model) is model
        torch.testing.assert_close(model(TOKENS), before, atol=1e-5, rtol=1e-5)
    moe = model.layers[1].moe
    assert {tuple(row) for row in moe.w_in[2].tolist()} == rows
    assert torch.all(hidden_unit_scores(moe).diff(dim=1) <= 0)
    shuffled = copy.deepcopy(model)
    shrink_hidden(shuffled.layers[1].moe, torch.stack([torch.randperm(96) for _ in range(3)]))
    sizes = [
        artifact.nbytes(quantize_weights(m, Format(8, granularity="tensor")))
        for m in (model, shuffled)
    ]
    assert sizes[0] < sizes[1] - 3 * 96 * 4 / 8  # of the 3 log2(96!) bits


@pytest.mark.parametrize(
    "prune, part",
    [(prune_hidden_units, "layers.0.moe"), (prune_bk_channels, "layers.0.mixer.output")],
)
def test_with_batches_what_stays_makes_up_for_what_went(prune, part):
    model = bk()
    dense, plain, refitted = [
        layer_examples(m, [part], [TOKENS])[part][1]
        for m in (model, prune(model, 0.5), prune(model, 0.5, batches=[(TOKENS, TOKENS)]))
    ]
    assert (refitted - dense).square().mean() < 0.7 * (plain - dense).square().mean()


def test_masks_and_quantizers_are_there_again_on_the_smaller_weights():
    model = bk()
    mask = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    moe = model.layers[0].moe
    set_mask(moe, "w_in", mask)
    quantize_weights(model, {"layers.0.moe.w_in": Format(4)})
    small = prune_hidden_units(model, 0.5)
    steps = weight_of(small.layers[0].moe, "w_in").steps
    assert [type(step) for step in steps] == [Mask, FakeQuantize] and steps[1].format == Format(4)
    assert get_mask(small.layers[0].moe, "w_in").shape == (3, 6, 16)
    kept = get_mask(small.layers[0].moe, "w_in")
    assert all(any(torch.equal(row, old) for old in mask[e]) for e in range(3) for row in kept[e])
    assert torch.equal(get_mask(moe, "w_in"), mask) and small(TOKENS).shape == (2, 12, 30)


def test_ranges_of_activations_go_with_their_channels():
    model = calibrate(quantize_bk_core(bk(), 8, per_channel=True), [TOKENS])
    small = prune_bk_channels(model, 0.5)
    for layer, old in zip(small.layers, model.layers):
        keep = bk_channel_scores(old.mixer).argsort()[3:].sort().values
        pairs = zip(layer.mixer.quantize_v.modules(), old.mixer.quantize_v.modules())
        ranges = [(a, b) for a, b in pairs if isinstance(a, ActivationQuantizer)]
        assert ranges
        assert all(torch.equal(a.low, b.low[keep]) and a.channels == 3 for a, b in ranges)
    assert small(TOKENS).shape == (2, 12, 30)


PARTS = np.full((30, 2), -1, np.int32)
PARTS[8:] = np.arange(22)[:, None] % 8
EMBELLISHED = {
    "masked": lambda m: MagnitudePruner(m).prune(0.4),
    "rounded": lambda m: quantize_weights(m, Format(3, False, "group", 5)),
    "trained steps": lambda m: quantize_weights(m, Format(4), learned=True),
    "fixed grids": lambda m: quantize_weights(m, Format(4, granularity="tensor", range="mse")),
    "composed and ordered": lambda m: quantize_weights(
        order_rows(compose_tables(m, PARTS, [(TOKENS, TOKENS)], next_token_loss), np.arange(30)),
        Format(8),
    ),
}


@pytest.mark.parametrize("prune", [prune_hidden_units, prune_bk_channels])
@pytest.mark.parametrize("embellish", EMBELLISHED.values(), ids=EMBELLISHED)
def test_removing_nothing_changes_no_bit_and_no_step(prune, embellish):
    model = embellish(bk())
    for weight in weights(model):
        for step in weight.steps:
            if getattr(step, "learned", False):
                step.scale.data.mul_(1.0 + torch.rand(step.scale.shape))
    for settings in ({}, {"batches": [(TOKENS, TOKENS)]}):
        same = prune(model, 0.0, **settings)
        assert torch.equal(same(TOKENS), model(TOKENS))
        steps = [[[type(step) for step in w.steps] for w in weights(m)] for m in (model, same)]
        assert steps[0] == steps[1]
        tensors = zip(model.state_dict().items(), same.state_dict().items())
        assert all(a == b and torch.equal(s, t) for (a, s), (b, t) in tensors)


def test_untouched_weights_keep_their_steps_and_masked_readers_their_values():
    model = EMBELLISHED["composed and ordered"](bk())
    mask = torch.rand(3, 16, 12, generator=torch.Generator().manual_seed(0)) > 0.5
    set_mask(model.layers[0].moe, "w_out", mask)
    small = prune_hidden_units(model, 0.5, batches=[(TOKENS, TOKENS)])
    assert torch.equal(small.embedding.weight, model.embedding.weight)
    kept, old = (weight_of(m.layers[0].moe, "w_out").original for m in (small, model))
    columns = [{tuple(column) for column in old[e].T.tolist()} for e in range(3)]
    assert kept.shape == (3, 16, 6) and all(
        tuple(column) in columns[e] for e in range(3) for column in kept[e].T.tolist()
    )
    refitted, old = (weight_of(m.layers[1].moe, "w_out").original for m in (small, model))
    assert not any(torch.equal(a, b) for a in refitted[0].T for b in old[0].T)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: prune_channels(cnn(), IMAGES, 1.0), "sparsity is 1.0"),
        (
            lambda: prune_channels(cnn(), IMAGES, 0.5, importance="hessian"),
            "importance 'hessian'; choose from",
        ),
        (lambda: prune_channels(cnn(), IMAGES, 0.5, importance="taylor"), "pass batches="),
        (
            lambda: prune_channels(cnn(), IMAGES, 0.5, layers="conv1"),
            "named 'conv1': DigitsCNN has 0, 3, 8",
        ),
        (
            lambda: prune_channels(cnn(), torch.randn(4, 3, 8, 8), 0.5),
            "cannot prune this DigitsCNN",
        ),
        (lambda: prune_channels(bk(), TOKENS, 0.5), "cannot prune this ResNetBK"),
        (lambda: prune_hidden_units(bk(), -0.5), "sparsity is -0.5"),
        (lambda: prune_hidden_units(bk(), 0.5, layers="layers.7.*"), "layers.0.moe, layers.1.moe"),
        (lambda: prune_hidden_units(cnn(), 0.5), "no MoE layer is named .*: DigitsCNN has none"),
        (lambda: prune_bk_channels(cnn(), 0.5), "no BKMixer layer is named .*: DigitsCNN has none"),
    ],
)
def test_bad_input_is_one_sentence(act, message):
    with pytest.raises(ValueError, match=message) as error:
        act()
    assert "\n" not in str(error.value)


def test_no_unit_layer_is_emptied_and_order_is_kept():
    small = prune_bk_channels(bk(), 0.99)
    assert small.config.channels == 1 and parameter_count(small) < parameter_count(bk())
