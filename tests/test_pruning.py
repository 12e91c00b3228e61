import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, TensorDataset

from kit import artifact
from kit.core.calibration import input_norms
from kit.core.weights import copy_model, weight_of, weights
from kit.models import DigitsMLP
from kit.pruning.criteria import CRITERIA, cubic_sparsity, nm_mask, prune_mask, register_criterion
from kit.pruning.magnitude import MagnitudePruner, rewind
from kit.pruning.mask import Mask, get_mask, mask_of, put_mask, set_mask
from kit.pruning.sparsegpt import prune_sparsegpt
from kit.quantization import Format, quantize_weights
from kit.quantization.token_tables import compose_tables, order_rows
from kit.training import TrainConfig, train
from kit.training.losses import classification_loss

TOKENS = torch.tensor([[3, 7, 9, 2, 5]])


def square_loss(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize(
    "module, name, example",
    [
        (nn.Linear(5, 4), "weight", torch.randn(2, 5)),
        (nn.Embedding(6, 3), "weight", torch.tensor([0, 5])),
        (nn.Conv2d(2, 3, 3), "weight", torch.randn(1, 2, 5, 5)),
        (nn.LSTM(4, 3), "weight_ih_l0", torch.randn(2, 1, 4)),
        (nn.LSTM(4, 3), "weight_hh_l0", torch.randn(2, 1, 4)),
    ],
)
def test_mask_equals_zeroed_weight_in_output_and_gradient(module, name, example):
    zeroed = copy.deepcopy(module)
    mask = torch.rand_like(getattr(module, name)) > 0.5
    with torch.no_grad():
        getattr(zeroed, name).mul_(mask)
    parameter = getattr(module, name)
    set_mask(module, name, mask)
    results = [m(example)[0] if isinstance(m, nn.LSTM) else m(example) for m in (module, zeroed)]
    assert torch.equal(*results)
    for result in results:
        result.square().sum().backward()
    assert torch.equal(parameter.grad, getattr(zeroed, name).grad * mask)
    assert torch.equal(get_mask(module, name), mask)
    copied = copy_model(module)
    assert torch.equal(getattr(copied, name), getattr(module, name))


def test_a_mask_is_updated_in_place():
    linear = nn.Linear(3, 2)
    set_mask(linear, "weight", torch.zeros(2, 3, dtype=torch.bool))
    step = weight_of(linear).find(Mask)
    set_mask(linear, "weight", torch.eye(2, 3).bool())
    assert weight_of(linear).steps == [step] and (linear.weight != 0).sum() == 2


def test_a_copy_and_its_original_do_not_share_their_masks():
    linear = nn.Linear(3, 2)
    set_mask(linear, "weight", torch.zeros(2, 3, dtype=torch.bool))
    copied = copy_model(linear)
    weight_of(copied).drop(Mask)
    assert (linear.weight == 0).all() and (copied.weight != 0).any()
    assert not parametrize.is_parametrized(copied) and torch.equal(
        copied(torch.zeros(1, 3))[0], linear.bias
    )


def test_expert_stack_and_expanded_state_dict_round_trip():
    module = nn.Module()
    module.w_in = nn.Parameter(torch.randn(3, 4, 5))
    set_mask(module, "w_in", torch.rand(3, 4, 5) > 0.5)
    other = nn.Module()
    other.w_in = nn.Parameter(torch.randn(3, 4, 5))
    set_mask(other, "w_in", torch.ones(3, 4, 5, dtype=torch.bool))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.w_in, module.w_in)


def tied_model():
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(7, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 7)}
    )
    model["head"].weight = model["embedding"].weight
    return model


def test_tied_tensors_are_one_weight_and_stay_tied():
    model = tied_model()
    (weight,) = weights(model, matrices=True)
    assert weight.name == "embedding.weight"
    put_mask(weight, torch.rand(7, 4) > 0.5)
    assert torch.equal(model["embedding"].weight, model["head"].weight)
    assert (model["head"].weight == 0).any()
    assert [w.name for w in weights(model, matrices=True)] == ["embedding.weight"]
    assert weight.original is model["head"].parametrizations.weight.original


def test_bad_masks_and_names_are_refused_with_the_alternatives():
    model = tied_model()
    with pytest.raises(ValueError, match="bool of shape"):
        set_mask(model["head"], "weight", torch.ones(7, 4))
    with pytest.raises(ValueError, match="no parameter 'wight'"):
        set_mask(model["head"], "wight", torch.ones(7, 4, dtype=torch.bool))
    with pytest.raises(
        ValueError,
        match=r"no weight of two or more dimensions is named 'heads\*'.*embedding.weight",
    ):
        weights(model, "heads*", matrices=True)
    assert not parametrize.is_parametrized(model["head"])


def mlp(seed=0, widths=(12, 10, 8)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(i, o) for i, o in zip(widths, widths[1:])])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.875])
def test_layer_amount_agrees_with_torch_prune(sparsity):
    ours, theirs = mlp(), mlp()
    MagnitudePruner(ours).prune(sparsity)
    for a, b in zip(ours, theirs):
        prune.l1_unstructured(b, "weight", amount=sparsity)
        assert torch.equal(a.weight, b.weight)


def test_global_amount_agrees_with_torch_prune():
    ours, theirs = mlp(), mlp()
    MagnitudePruner(ours, scope="global").prune(0.6)
    prune.global_unstructured([(m, "weight") for m in theirs], prune.L1Unstructured, amount=0.6)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(ours, theirs))


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    sparsity=st.floats(0, 0.999),
    ties=st.booleans(),
)
def test_masks_drop_exactly_the_lowest(rows, columns, sparsity, ties):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    scores = (scores * 3).floor() if ties else scores
    mask = prune_mask(scores, sparsity)
    for row, kept in zip(scores, mask):
        assert (~kept).sum() == round(sparsity * columns)
        if kept.any() and not kept.all():
            assert row[~kept].max() <= row[kept].min()


@given(groups=st.integers(1, 4), m=st.integers(1, 8), data=st.data())
def test_n_of_m_keeps_the_best_of_every_group(groups, m, data):
    n = data.draw(st.integers(1, m))
    scores = torch.rand(3, groups * m, generator=torch.Generator().manual_seed(m))
    mask = nm_mask(scores, n, m)
    for row, kept in zip(scores.reshape(-1, m).tolist(), mask.reshape(-1, m).tolist()):
        best = sorted(range(m), key=row.__getitem__)[m - n :]
        assert [i for i, keep in enumerate(kept) if keep] == sorted(best)


def test_threshold_and_row_scope():
    model = mlp()
    expected = [m.weight.abs() >= 0.1 for m in model]
    MagnitudePruner(model).prune_below(0.1)
    assert all(torch.equal(m.weight != 0, mask) for m, mask in zip(model, expected))
    model = mlp()
    MagnitudePruner(model, "0.weight", scope="row").prune(0.5)
    assert (
        torch.equal((model[0].weight == 0).sum(1), torch.full((10,), 6))
        and (model[1].weight != 0).all()
    )


def test_wanda_ranks_by_weight_times_input_norm():
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    x = torch.randn(50, 6) * torch.tensor([0.1, 10, 1, 1, 1, 1])
    MagnitudePruner(model, scope="row", score="wanda", input_norms=input_norms(model, [x])).prune(
        0.5
    )
    weight = model[0].parametrizations.weight.original
    brute = weight.abs() * torch.tensor([x[:, j].double().square().sum().sqrt() for j in range(6)])
    assert torch.equal(
        model[0].weight != 0, torch.stack([row >= row.sort().values[3] for row in brute])
    )


def test_a_registered_score_is_found_by_name():
    """LAMP (Lee et al. 2021): w^2 over the sum of all squares of the tensor that are not
    smaller."""

    @register_criterion("lamp")
    def lamp(weight, norm, seed):
        squares = weight.view.matrix(weight.original.detach().square())
        order = squares.flatten().argsort(descending=True, stable=True)
        sums = torch.empty(squares.numel()).scatter(0, order, squares.flatten()[order].cumsum(0))
        return squares / sums.view_as(squares)

    model = mlp()
    squares = [torch.sort(layer.weight.detach().flatten().square()).values for layer in model]
    brute = torch.cat([torch.stack([s[i] / s[i:].sum() for i in range(len(s))]) for s in squares])
    try:
        MagnitudePruner(model, scope="global", score="lamp").prune(0.7)
    finally:
        del CRITERIA["lamp"]
    lost = [int((layer.weight == 0).sum()) for layer in model]
    chosen = brute.argsort()[: sum(lost)]
    assert sum(lost) == round(0.7 * 200) and lost == [
        int((chosen < 120).sum()),
        int((chosen >= 120).sum()),
    ]
    for layer, count in zip(model, lost):  # inside a tensor, LAMP ranks by magnitude
        original = weight_of(layer).original.abs().flatten()
        assert original[layer.weight.flatten() == 0].max() < original.sort().values[count]


def test_a_lower_sparsity_revives_nothing():
    model = mlp()
    MagnitudePruner(model).prune(0.5)
    before = get_mask(model[0]).clone()
    MagnitudePruner(model).prune(0.2)
    assert torch.equal(get_mask(model[0]), before)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda m: compose_tables(
            m, np.array([[-1, -1]] * 4 + [[0, 1]] * 6, np.int32), [TOKENS], square_loss
        ),
        lambda m: order_rows(m, np.arange(1, 11)),
    ],
    ids=["composition", "row_order"],
)
@pytest.mark.parametrize(
    "act",
    [
        lambda m: set_mask(m[0], "weight", torch.ones(10, 6, dtype=torch.bool)),
        lambda m: MagnitudePruner(m),
        lambda m: prune_sparsegpt(m, [TOKENS], 0.5, "0.*"),
        lambda m: rewind(m, dict(m.state_dict())),
    ],
    ids=["mask", "score", "sparsegpt", "rewind"],
)
def test_weights_in_another_order_or_basis_are_refused(arrange, act):
    torch.manual_seed(0)
    model = arrange(nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3)))
    before = model(TOKENS)
    with pytest.raises(ValueError, match="weight' carries a (composition|row_order) step"):
        act(model)
    assert torch.equal(model(TOKENS), before) and get_mask(model[1]) is None


def test_a_mask_says_more_than_the_zeros_of_what_it_masks(tmp_path):
    """A kept weight that rounds to 0 is trained on after loading; a mask of the zeros alone takes
    no bytes."""

    def loaded(format, sparsity):
        model = MagnitudePruner(mlp()).prune(sparsity)
        artifact.save(quantize_weights(model, format), tmp_path / "a.kit")
        return model, artifact.load(tmp_path / "a.kit", mlp(1), trainable=True)

    model, again = loaded(Format(2), 0.3)
    assert ((model[0].weight == 0) & get_mask(model[0])).any()
    for ours, theirs in zip(model, again):
        assert torch.equal(get_mask(theirs), get_mask(ours)) and torch.equal(
            ours.weight, theirs.weight
        )
    again[0].weight.sum().backward()
    assert torch.equal(weight_of(again[0]).original.grad != 0, get_mask(model[0]))

    class Write(list):
        tensor = list.append

    mask, entries = torch.rand(4, 5) > 0.5, Write()
    assert Mask(mask).encode(None, mask.float(), entries) == {} and not entries
    stored = torch.where(torch.arange(20).view(4, 5) % 3 == 0, 0, mask.float())  # some kept are 0
    assert Mask(mask).encode(None, stored, entries) == {"explicit": 2}
    assert torch.equal(entries[0], mask[stored == 0][:, None])  # what zeros do not tell
    with pytest.raises(ValueError, match="entries that are masked are not zero"):
        Mask(mask).encode(None, torch.ones(4, 5), entries)


def test_norms_of_inputs_that_are_not_finite_are_refused_by_name():
    with pytest.raises(ValueError, match="'1.weight' hold NaN or infinite"):
        input_norms(
            nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), [torch.tensor([[0.0, 1.0, torch.inf]])]
        )


def test_random_scores_depend_on_seed_and_name_alone():
    def masks(seed, tensors="*"):
        model = mlp()
        MagnitudePruner(model, tensors, score="random", seed=seed).prune(0.5)
        return model[1].weight != 0

    assert torch.equal(masks(0), masks(0, "1.*")) and not torch.equal(masks(0), masks(1))


def test_cubic_schedule_is_equation_one():
    for step in range(0, 120, 7):
        t = min(max(step, 10), 90)
        assert cubic_sparsity(step, 10, 90, 0.8, 0.2) == pytest.approx(
            0.8 - 0.6 * (1 - (t - 10) / 80) ** 3
        )
    values = [cubic_sparsity(step, 0, 100, 0.9) for step in range(101)]
    assert values[0] == 0 and values[-1] == 0.9 and values == sorted(values)


def test_schedule_hook_reaches_the_target_and_never_revives_a_weight():
    model = mlp()
    pruner = MagnitudePruner(model)
    hook = pruner.schedule(0.75, end=0.5, every=5)
    assert get_mask(model[0]).all()
    before = get_mask(model[0]).clone()
    for step in range(1, 41):
        with torch.no_grad():
            for weight in pruner.weights.values():
                weight.original.add_(torch.randn_like(weight.original))
        hook(step, 40, model)
        assert not (get_mask(model[0]) & ~before).any()
        before = get_mask(model[0]).clone()
    assert [int((m.weight == 0).sum()) for m in model] == [90, 60]
    last = pruner.statistics()
    assert list(last.kept) == [30, 20] and list(last.sparsity) == [0.75, 0.75]
    assert list(last.dead_rows) == [int((m.weight == 0).all(1).sum()) for m in model]


def test_schedule_in_the_training_loop_keeps_the_best_of_the_final_sparsity():
    torch.manual_seed(0)
    images, labels = torch.randn(40, 1, 8, 8), torch.randint(0, 10, (40,))
    model = DigitsMLP()
    pruner = MagnitudePruner(model, scope="global")
    values = iter(range(100))  # validation gets worse: the first state it may choose is the best
    loader = DataLoader(TensorDataset(images, labels), batch_size=20)
    result = train(
        model,
        loader,
        TrainConfig(steps=20, eval_every=1),
        loss=classification_loss,
        log=False,
        validate=lambda model: next(values),
        hooks=[pruner.schedule(0.8, end=0.5, every=2)],
    )
    statistics = pruner.statistics()
    assert 1 - statistics.kept.sum() / statistics.weights.sum() == pytest.approx(0.8, abs=1e-3)
    assert result.best_step == 10 and (model[1].weight == 0).any()


def test_schedule_of_each_tensor_to_a_sparsity_of_its_own():
    model = mlp()
    hook = MagnitudePruner(model).schedule({"0.weight": 0.5, "1.weight": 0.9}, end=1.0, every=1)
    sparsities = []
    for step in range(1, 11):
        hook(step, 10, model)
        sparsities.append([float((layer.weight == 0).float().mean()) for layer in model])
    assert sparsities[4] == pytest.approx([0.5 * (1 - 0.5**3), 0.9 * (1 - 0.5**3)], abs=0.01)
    assert sparsities[-1] == pytest.approx([0.5, 0.9])


@pytest.mark.parametrize("final", [0.8, {"0.weight": 0.8}])
def test_a_schedule_starts_at_the_present_sparsity(final):
    model = MagnitudePruner(nn.Sequential(nn.Linear(40, 50))).prune(0.4)
    hook, sparsities = MagnitudePruner(model).schedule(final, end=1.0, every=1), []
    for step in range(1, 11):
        hook(step, 10, model)
        sparsities.append(float((model[0].weight == 0).float().mean()))
    assert sparsities == pytest.approx(
        [0.8 - 0.4 * (1 - step / 10) ** 3 for step in range(1, 11)], abs=1e-3
    )


def test_masks_stay_exact_zeros_through_quantization_aware_training_and_the_file(tmp_path):
    torch.manual_seed(0)
    model = MagnitudePruner(DigitsMLP()).prune(0.8)
    masks = {weight.name: mask_of(weight).clone() for weight in weights(model, matrices=True)}
    quantize_weights(
        model,
        {"1.*": Format(8), "3.*": Format(4, granularity="group", group_size=16), "5.*": Format(4)},
        learned=True,
    )
    loader = DataLoader(
        TensorDataset(torch.randn(40, 1, 8, 8), torch.randint(0, 10, (40,))), batch_size=20
    )
    before = model[1].weight.detach().clone()
    train(model, loader, TrainConfig(steps=5, lr=1e-2), loss=classification_loss, log=False)
    artifact.save(model.eval(), tmp_path / "model.kit")
    loaded = artifact.load(tmp_path / "model.kit")
    for weight in weights(model, matrices=True):
        value, mask = weight.value, masks[weight.name]
        assert (value[~mask] == 0).all() and torch.equal(mask_of(weight), mask)
        assert torch.equal(loaded.get_parameter(weight.name), value)
    assert not torch.equal(before, model[1].weight)


def test_rounds_with_rewinding_train_from_the_early_weights():
    model = mlp()
    early = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    seen = []

    def retrain(model):
        seen.append((float((model[0].weight == 0).float().mean()), model[0].bias.detach().clone()))
        with torch.no_grad():
            model[0].bias.add_(5)

    pruner = MagnitudePruner(model)
    for sparsity in (0.25, 0.5):
        rewind(pruner.prune(sparsity), early)
        retrain(model)
    assert [share for share, _ in seen] == [0.25, 0.5]
    assert all(torch.equal(bias, early["0.bias"]) for _, bias in seen)
    assert torch.equal(model[0].weight, early["0.weight"] * get_mask(model[0]))


@pytest.mark.parametrize(
    "act, message",
    [
        (
            lambda m: MagnitudePruner(m).prune(1.0),
            "sparsity is 1.0; it must be a number from 0 and below 1",
        ),
        (lambda m: MagnitudePruner(m).prune(-0.1), "sparsity is -0.1"),
        (lambda m: MagnitudePruner(m).prune(float("nan")), "sparsity is nan"),
        (lambda m: MagnitudePruner(m).prune({"0.weight": 0.5, "1.weight": 2}), "sparsity is 2"),
        (
            lambda m: MagnitudePruner(m).prune({"2.weight": 0.5}),
            "no tensor '2.weight'.*0.weight, 1.weight",
        ),
        (
            lambda m: MagnitudePruner(m, "conv*"),
            "no weight of two or more dimensions is named 'conv.*0.weight",
        ),
        (lambda m: MagnitudePruner(m, "*.bias"), "no weight of two or more dimensions is named"),
        (
            lambda m: MagnitudePruner(m).prune_pattern(2, 8),
            "pattern 2:8 needs rows that 8 divides, not the 12 of 0.weight",
        ),
        (lambda m: MagnitudePruner(m).prune_pattern(5, 4), "must keep between 1 and 4"),
        (lambda m: MagnitudePruner(m, score="wanda"), "wanda needs the input norms of '0.weight'"),
        (
            lambda m: MagnitudePruner(m, score="fisher"),
            "score is 'fisher'; it must be one of 'magnitude'",
        ),
        (lambda m: MagnitudePruner(m, scope="layer"), "scope is 'layer'"),
        (
            lambda m: MagnitudePruner(m).prune_below(-1),
            "threshold is -1; it must be a number from 0",
        ),
        (lambda m: MagnitudePruner(m).schedule({"0.weight": 1}), "sparsity is 1"),
        (lambda m: MagnitudePruner(m).schedule(0.5, start=0.8, end=0.2), "0 <= start < end <= 1"),
        (
            lambda m: rewind(m, m.state_dict() | {"0.weight": torch.zeros(3)}),
            r"holds \(3,\) for '0.weight'",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_model_alone(act, message):
    model = mlp()
    with pytest.raises(ValueError, match=message) as error:
        act(model)
    assert "\n" not in str(error.value)
    assert not any(parametrize.is_parametrized(m) for m in model)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), mlp().state_dict().values())
    )


@pytest.mark.parametrize("bits, share", [(None, 0.25), (8, 0.33), (4, 0.40)])
def test_eighty_percent_of_zeros_make_a_small_tensor_that_loads_with_the_same_zeros(
    bits, share, tmp_path
):
    def layer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 256))
        nn.init.normal_(model[0].weight, std=0.05)
        return quantize_weights(model, Format(bits)) if bits else model

    dense, pruned = layer(), MagnitudePruner(layer()).prune(0.8)
    artifact.save(dense, tmp_path / "dense.kit", layouts=("dense",))
    artifact.save(pruned, tmp_path / "pruned.kit")
    sizes = [
        artifact.describe(tmp_path / name).set_index("tensor").bytes["0.weight"]
        for name in ("dense.kit", "pruned.kit")
    ]
    assert sizes[1] <= share * sizes[0]
    loaded = artifact.load(tmp_path / "pruned.kit", nn.Sequential(nn.Linear(128, 256)))
    assert (loaded[0].weight[~get_mask(pruned[0])] == 0).all()
    x = torch.randn(3, 128)
    assert torch.equal(loaded(x), pruned(x))
