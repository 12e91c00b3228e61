import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kit import artifact
from kit.core.weights import weight_of
from kit.distillation import DistillationTrainer
from kit.models import MoE, ResNetBK, ResNetBKConfig
from kit.pruning import (
    Mask,
    ProgressivePruningScheduler,
    PrunedMoELayer,
    expert_scores,
    prune_unused_experts,
    reduce_experts,
    set_mask,
    track_experts,
)
from kit.pruning.experts import align, merge_experts
from kit.pruning.least_squares import refit_experts
from kit.quantization import FakeQuantize, Format, quantize_weights
from kit.training import TrainConfig

TOKENS = torch.randint(0, 30, (4, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [(TOKENS[:2], TOKENS[:2]), (TOKENS[2:], TOKENS[2:])]


def bk(experts=4, **changes):
    torch.manual_seed(0)
    shapes = dict(vocab_size=30, d_model=16, layers=2, d_ff=12, channels=6) | changes
    return ResNetBK(ResNetBKConfig(experts=experts, **shapes))


def moe_of(rows, top_k=1):
    """A layer whose router sends row i of `rows`, as one-hot input, to expert rows[i]."""
    torch.manual_seed(0)
    moe = MoE(len(rows), 6, max(rows) + 1, top_k)
    with torch.no_grad():
        moe.router.weight.copy_(20.0 * F.one_hot(torch.tensor(rows)).T)
        moe.router.bias.zero_()
    return moe


def test_usage_counts_every_token_in_training_and_evaluation_and_unused_experts_go():
    layer = PrunedMoELayer(moe_of([0, 1, 2, 2]))
    inputs = torch.eye(4)
    layer.train()(inputs[[0] * 60 + [2] * 20])
    layer.eval()(inputs[[3] * 16 + [1] * 4])
    assert layer.usage.tolist() == [60, 4, 36] and layer.shares.tolist() == pytest.approx(
        [0.6, 0.04, 0.36]
    )
    before = layer(inputs[[0, 2, 3]])
    layer.reset_usage(), layer(inputs[[0] * 60 + [2] * 36 + [1] * 4])
    assert layer.prune() == [1]
    assert torch.allclose(layer(inputs[[0, 2, 3]]), before, atol=1e-6)
    assert layer.origin == [0, 2] and layer.router.out_features == 2 and layer.usage.sum() == 3
    assert layer.history == [
        {"origin": [0, 1, 2], "share": pytest.approx([0.6, 0.04, 0.36]), "kept": [0, 2]}
    ]
    layer.reset_usage(), layer(inputs[[2] * 50])
    assert layer.prune() == [0] and layer.origin == [2] and layer.w_in.shape[0] == 1
    layer(inputs)
    assert layer.prune() == [] and layer.origin == [2]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_last_top_k_experts_never_go(top_k):
    layer = PrunedMoELayer(moe_of([0, 1, 2, 3], top_k), threshold=0.99)
    layer(torch.eye(4)[[0, 1, 1, 1, 2]])
    layer.prune()
    assert layer.w_in.shape[0] == top_k and 1 in layer.origin
    with pytest.raises(ValueError, match="0 experts would stay"):
        layer.keep(torch.tensor([], dtype=torch.int64))


def test_dropping_equals_routing_over_the_remaining_experts():
    model = bk()
    small = reduce_experts(model, 2, BATCHES, refit=False)
    kept = small.layers[0].moe.origin
    moe, x = model.layers[0].moe, torch.randn(20, 16)
    gates = moe.router(x)[:, kept].softmax(-1)
    expected = torch.zeros_like(x)
    for i, token in enumerate(x):
        gate, best = gates[i].max(0)
        e = kept[best]
        hidden = F.gelu(moe.w_in[e] @ token + moe.b_in[e])
        expected[i] = gate * (moe.w_out[e] @ hidden + moe.b_out[e])
    assert torch.allclose(small.layers[0].moe(x), expected, atol=1e-5)
    assert model.config.experts == 4 and small.config.experts == 2


def test_scores_are_counts_and_mean_weighted_output_norms():
    model = bk(top_k=2).eval()
    seen = []
    handle = model.layers[1].moe.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    usage, reap = (
        expert_scores(model, BATCHES, name)["layers.1.moe"] for name in ("usage", "reap")
    )
    handle.remove()
    moe, rows = model.layers[1].moe, torch.cat([x.reshape(-1, 16) for x in seen[:2]])
    values = [[] for _ in range(4)]
    for x in rows:
        gates = moe.router(x).softmax(-1)
        for e in gates.argsort(descending=True)[:2].tolist():
            output = moe.w_out[e] @ F.gelu(moe.w_in[e] @ x + moe.b_in[e]) + moe.b_out[e]
            values[e].append((gates[e] * output.norm()).item())
    assert usage.tolist() == pytest.approx([len(v) / 128 for v in values])
    assert reap.tolist() == pytest.approx([sum(v) / len(v) for v in values], rel=1e-4)
    random = expert_scores(model, BATCHES, "random", seed=3)["layers.1.moe"]
    assert torch.equal(random, expert_scores(model, BATCHES, "random", seed=3)["layers.1.moe"])


def test_alignment_is_the_best_of_all_orders():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    order, distance = align(b, a)
    best = min(
        itertools.permutations(range(5)), key=lambda p: float((a - b[list(p)]).square().sum())
    )
    assert order.tolist() == list(best)
    assert distance == pytest.approx(float((a - b[list(best)]).square().sum()), rel=1e-5)


def test_merging_joins_experts_that_differ_in_the_order_of_their_units():
    torch.manual_seed(0)
    moe = MoE(8, 6, 3)
    order = torch.randperm(6)
    with torch.no_grad():
        moe.w_in[2], moe.b_in[2] = moe.w_in[0, order], moe.b_in[0, order]
        moe.w_out[2] = moe.w_out[0][:, order]
    twin, other, x = [t.detach().clone() for t in (moe.w_in[2], moe.w_in[1])] + [torch.randn(30, 8)]
    expert = F.gelu(x @ moe.w_in[2].T + moe.b_in[2]) @ moe.w_out[2].T + moe.b_out[2]
    mean_router = (moe.router.weight[0] + 3 * moe.router.weight[2]) / 4
    kept = merge_experts(moe, 2, torch.tensor([10, 50, 30]))
    assert kept.tolist() == [1, 2]
    assert torch.allclose(moe.w_in[2], twin, atol=1e-6) and torch.equal(moe.w_in[1], other)
    merged = F.gelu(x @ moe.w_in[2].T + moe.b_in[2]) @ moe.w_out[2].T + moe.b_out[2]
    assert torch.allclose(merged, expert, atol=1e-5)
    assert torch.allclose(moe.router.weight[2], mean_router, atol=1e-6)


def test_refitted_experts_are_the_least_squares_solution_with_a_prior():
    torch.manual_seed(0)
    moe, x = MoE(6, 5, 2), torch.randn(200, 6)
    targets, before = torch.randn(200, 6), moe.w_out.detach().clone()
    gates, chosen = moe.router(x).softmax(-1).max(-1)
    refit_experts(moe, x, targets)
    for e in range(2):
        mine = chosen == e
        hidden = F.gelu(x[mine] @ moe.w_in[e].T + moe.b_in[e])
        inputs = (
            (gates[mine, None] * torch.cat([hidden, torch.ones(len(hidden), 1)], 1))
            .detach()
            .numpy()
        )
        damping = (0.01 * (inputs**2).sum(0).mean()) ** 0.5
        prior = torch.cat([before[e], torch.zeros(6, 1)], 1).numpy().T
        stacked = np.concatenate([inputs, damping * np.eye(6)])
        wanted = np.concatenate([targets[mine].numpy(), damping * prior])
        solved = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
        assert np.allclose(moe.w_out[e].detach().numpy(), solved[:-1].T, atol=1e-4)
        assert np.allclose(moe.b_out[e].detach().numpy(), solved[-1], atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_refitting_brings_the_outputs_closer(top_k):
    model = bk(6, top_k=top_k).eval()
    dense = model.hidden(TOKENS)
    errors = [
        (reduce_experts(model, 3, BATCHES, refit=refit).eval().hidden(TOKENS) - dense)
        .square()
        .mean()
        for refit in (False, True)
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("criterion", ["usage", "reap", "random", "merge"])
def test_fewer_experts_leave_a_smaller_file_that_loads(criterion, tmp_path):
    model = bk(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = reduce_experts(model, 2, BATCHES, criterion=criterion, seed=1).eval()
    artifact.save(model, tmp_path / "dense.kit", layouts=("dense",))
    artifact.save(small, tmp_path / "small.kit", layouts=("dense",))
    tables = [artifact.describe(tmp_path / name) for name in ("dense.kit", "small.kit")]
    expert_bytes = [table[table.tensor.str.contains("moe.[wb]_")].bytes.sum() for table in tables]
    assert expert_bytes[1] == expert_bytes[0] / 4 and small.config.experts == 2
    assert torch.equal(artifact.load(tmp_path / "small.kit")(TOKENS), small(TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    again = reduce_experts(model, 2, BATCHES, criterion=criterion, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values())
    )


def test_masked_and_quantized_experts_stay_masked_and_quantized():
    model = bk()
    mask = torch.rand(4, 12, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    set_mask(model.layers[0].moe, "w_in", mask)
    quantize_weights(model, {"*.moe.w_*": Format(4)})
    small = reduce_experts(model, 2, BATCHES)
    moe = small.layers[0].moe
    assert [type(step) for step in weight_of(moe, "w_in").steps] == [Mask, FakeQuantize]
    assert torch.equal(moe.w_in != 0, (model.layers[0].moe.w_in != 0)[moe.origin])
    assert isinstance(moe, PrunedMoELayer) and torch.equal(
        moe.w_in, model.layers[0].moe.w_in[moe.origin]
    )


def test_unused_experts_of_a_whole_model():
    model = bk()
    with torch.no_grad():
        model.layers[0].moe.router.bias.copy_(torch.tensor([50.0, 0, 0, 0]))
    small = prune_unused_experts(model, BATCHES)
    shares = expert_scores(model, BATCHES, "usage")
    expected = tuple(int((share >= 0.05).sum()) for share in shares.values())
    assert small.config.per_layer("experts") == expected and expected[0] == 1


class Killed(Exception):
    pass


def loader():
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 30, (16, 9), generator=generator)
    return DataLoader(TensorDataset(data[:, :-1], data[:, 1:]), batch_size=4, shuffle=True)


@pytest.mark.parametrize("distill", [None, DistillationTrainer])
def test_stages_resume_after_a_kill_to_the_same_numbers(distill, tmp_path):
    config, settings = (
        TrainConfig(steps=4, lr=1e-3),
        dict(batches=BATCHES, stages=(4, 2, 1), distill=distill),
    )

    def scheduler():
        return ProgressivePruningScheduler(bk(8, layers=1), **settings)

    whole = scheduler()
    whole.run(loader(), config, log=False)
    calls = []

    def validate(model):
        calls.append(model.config.experts)
        if calls.count(1) == 2:
            raise Killed
        return -len(calls)  # each state is the best so far

    with pytest.raises(Killed):
        scheduler().run(loader(), config, validate=validate, folder=tmp_path, log=False)
    resumed = scheduler()
    resumed.run(loader(), config, validate=validate, folder=tmp_path, log=False)
    assert calls[0] == 4 and resumed.model.config.experts == 1
    assert resumed.history.equals(whole.history)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(a, b)
    assert list(whole.history.groupby("stage").size()) == [8, 4, 2]
    for change in ({"criterion": "reap"}, {"distill": None if distill else DistillationTrainer}):
        other, alone = (
            ProgressivePruningScheduler(bk(8, layers=1), **settings | change) for _ in "ab"
        )
        other.run(loader(), config, folder=tmp_path, log=False)  # finds nothing of the first there
        alone.run(loader(), config, log=False)
        pairs = zip(other.model.parameters(), alone.model.parameters())
        assert all(torch.equal(a, b) for a, b in pairs)


def test_each_stage_sees_the_data_in_an_order_of_its_own(monkeypatch):
    seeds = []
    monkeypatch.setattr("kit.pruning.experts.train", lambda *args, **_: seeds.append(args[2].seed))
    scheduler = ProgressivePruningScheduler(bk(8, layers=1), (4, 2), batches=BATCHES)
    scheduler.run(loader(), TrainConfig(steps=1, seed=5))
    assert seeds == [5, 6]


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda m: reduce_experts(m, 0, BATCHES), "0 experts would stay"),
        (lambda m: reduce_experts(m, 2, []), "at least one batch"),
        (
            lambda m: reduce_experts(m, 2, BATCHES, criterion="entropy"),
            "criterion is 'entropy'; it must be one of 'usage'",
        ),
        (lambda m: expert_scores(m, BATCHES, "merge"), "criterion is 'merge'; it must be one of"),
        (
            lambda m: prune_unused_experts(m, BATCHES, 1.0),
            "threshold is 1.0; it must be a number from 0 and below 1",
        ),
        (lambda m: track_experts(nn.Linear(3, 3)), "Linear has none"),
        (
            lambda m: ProgressivePruningScheduler(m, (2, 4), batches=BATCHES),
            r"stages \(2, 4\) must fall",
        ),
        (lambda m: ProgressivePruningScheduler(m, (2, 0), batches=BATCHES), "0 experts would stay"),
        (lambda m: PrunedMoELayer(MoE(4, 4, 2)).prune(), "run the model over some data"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_model_alone(act, message):
    model = bk()
    with pytest.raises(ValueError, match=message) as error:
        act(model)
    assert "\n" not in str(error.value)
    assert type(model.layers[0].moe) is MoE and model.config == bk().config
