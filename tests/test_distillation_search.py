import dataclasses
import json

import optuna
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kit import artifact
from kit.distillation import (
    DistillationTrainer,
    ProgressiveDistillation,
    config_for_parameters,
    initialize_from_teacher,
    student_like,
)
from kit.models import (
    LSTMLM,
    DigitsCNN,
    DigitsMLP,
    DigitsMLPConfig,
    LSTMLMConfig,
    ResNetBK,
    ResNetBKConfig,
    parameter_count,
)
from kit.quantization import Format, quantize_weights
from kit.training import TrainConfig
from kit.training.evaluation import evaluate
from notebooks.reference.search import RIVALS, StudentSearch, expected_bytes, resnet_bk_space

VOCABULARY = 40


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return ResNetBK(
        ResNetBKConfig(VOCABULARY, d_model=16, layers=3, experts=2, d_ff=16, channels=8)
    ).eval()


@pytest.fixture
def loader():
    tokens = torch.randint(0, VOCABULARY, (12, 11), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=4, shuffle=True)


# Shapes from budgets


@pytest.mark.parametrize("budget", [83_000, 250_000, 1_000_000])
@pytest.mark.parametrize("vocabulary", [512, 4096, 30_000])
def test_budgets_are_kept_and_used(budget, vocabulary):
    assert (
        0.8 * budget
        < parameter_count(ResNetBK(config_for_parameters(budget, vocabulary)))
        <= budget
    )


def test_a_third_of_the_parameters_is_in_the_layers_where_the_tables_may_be_factored():
    model = ResNetBK(config_for_parameters(1_000_000, 30_000))
    body = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(("layers", "norm"))
    )
    assert 0.3 < body / parameter_count(model) < 0.4


def test_fixed_fields_are_kept_and_impossible_budgets_named():
    config = config_for_parameters(100_000, 1000, layers=2, tied=False, experts=3, embedding_rank=8)
    assert (config.layers, config.tied, config.experts, config.embedding_rank) == (2, False, 3, 8)
    with pytest.raises(ValueError, match="1,000 parameters are too few for a vocabulary of 30,000"):
        config_for_parameters(1000, 30_000)


# Initialization


def test_a_student_of_the_teachers_shape_becomes_the_teacher(teacher):
    torch.manual_seed(5)
    student = ResNetBK(teacher.config).eval()
    assert len(initialize_from_teacher(student, teacher)) == len(list(teacher.parameters()))
    tokens = torch.arange(20)[None]
    assert torch.equal(student(tokens), teacher(tokens))


def test_fewer_layers_are_the_mapped_ones(teacher):
    student = ResNetBK(dataclasses.replace(teacher.config, layers=1))
    initialize_from_teacher(student, teacher)
    assert torch.equal(student.layers[0].mixer.input.weight, teacher.layers[2].mixer.input.weight)


def test_factored_tables_are_the_truncated_svd(teacher):
    student = ResNetBK(dataclasses.replace(teacher.config, embedding_rank=5, tied=True))
    initialize_from_teacher(student, teacher)
    weight, bias = student.output()
    left, singular, right = torch.linalg.svd(teacher.head.weight)
    best = left[:, :5] * singular[:5] @ right[:5]
    torch.testing.assert_close(weight, best, atol=1e-5, rtol=1e-4)
    assert torch.equal(bias, teacher.head.bias)


def test_narrow_layers_keep_a_consistent_set_of_units(teacher):
    """With zeroed-out units of the teacher's residual stream, the kept ones compute what the
    teacher does."""
    student = ResNetBK(dataclasses.replace(teacher.config, d_model=8, channels=4, d_ff=8)).eval()
    initialize_from_teacher(student, teacher)
    importance = teacher.embedding.weight.var(0) / teacher.embedding.weight.var(0).sum()
    importance += teacher.head.weight.var(0) / teacher.head.weight.var(0).sum()
    units = importance.topk(8).indices.sort().values
    assert torch.equal(student.embedding.weight, teacher.embedding.weight[:, units])
    mixer, original = student.layers[1].mixer, teacher.layers[1].mixer
    assert torch.equal(mixer.convolution.weight, original.convolution.weight[units])
    assert torch.equal(mixer.energy, original.energy[::2])
    assert torch.equal(mixer.input.weight, original.input.weight[::2][:, units])
    assert torch.equal(student.layers[1].moe.w_in, teacher.layers[1].moe.w_in[:, ::2][:, :, units])


def test_kept_units_are_those_with_the_largest_share_of_variance_in_both_tables():
    """Eight units: 0-3 vary most in the embedding, 4-7 in the output layer, whose numbers are a
    thousand times larger. As shares of each table's variance, the two largest are 1 (40 % + 10 %)
    and 6 (15 % + 30 %)."""
    teacher = ResNetBK(
        ResNetBKConfig(VOCABULARY, d_model=8, layers=1, experts=1, d_ff=4, channels=4)
    ).eval()
    shares = [25, 40, 5, 5, 0, 5, 15, 5], [2, 10, 12, 8, 26, 8, 30, 4]
    noise = torch.linspace(-1, 1, VOCABULARY)
    for table, share, scale in zip(
        (teacher.embedding.weight, teacher.head.weight), shares, (1, 1000)
    ):
        deviation = torch.tensor(share, dtype=torch.float32).sqrt()
        table.data = scale * noise[:, None] * deviation / noise.std() + 7
    student = ResNetBK(dataclasses.replace(teacher.config, d_model=2))
    initialize_from_teacher(student, teacher)
    assert torch.equal(student.embedding.weight, teacher.embedding.weight[:, [1, 6]])
    assert torch.equal(student.head.weight, teacher.head.weight[:, [1, 6]])


def test_other_models_take_what_fits(teacher):
    student = LSTMLM(LSTMLMConfig(VOCABULARY, d_model=8, hidden=8))
    assert set(initialize_from_teacher(student, teacher)) == {
        "embedding.weight",
        "head.weight",
        "head.bias",
        "norm.weight",
        "norm.bias",
    }
    small, large = DigitsMLP(DigitsMLPConfig((16, 16))), DigitsMLP(DigitsMLPConfig((32, 32)))
    initialize_from_teacher(small, large)
    assert torch.equal(small[1].weight, large[1].weight[::2]) and torch.equal(
        small[3].weight, large[3].weight[::2, ::2]
    )


# Cascades


def small_student(teacher, size):
    model = ResNetBK(
        ResNetBKConfig(VOCABULARY, d_model=size // 1000, layers=1, experts=2, d_ff=8, channels=4)
    )
    return quantize_weights(model, Format(8))


def test_cascade_resumes_finished_and_killed_stages(teacher, loader, tmp_path):
    config = TrainConfig(steps=8, eval_every=2)

    def run(folder, kill=None):
        seen = []

        def hook(step, steps, model):
            seen.append(step)
            if len(seen) == kill:
                raise KeyboardInterrupt

        cascade = ProgressiveDistillation(teacher, [6000, 3000], make_student=small_student)
        student, records = cascade.run(
            loader, config, folder, validate=lambda m: evaluate(m, loader).loss, hooks=[hook]
        )
        return student, records, len(seen)

    straight, records, steps = run(tmp_path / "a")
    assert (
        steps == 8
        and [r["size"] for r in records] == [6000, 3000]
        and sum(r["tokens"] for r in records) == 8 * 40
    )
    assert all(
        r["bytes"] == (tmp_path / "a" / f"stage_{i + 1}_{r['size']}.kit").stat().st_size
        for i, r in enumerate(records)
    )
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", kill=7)
    resumed, again, steps = run(tmp_path / "b")
    assert steps <= 2
    assert all(
        torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True)
    )
    assert run(tmp_path / "b")[2] == 0
    assert not list((tmp_path / "b").glob("*.ckpt"))
    with pytest.raises(ValueError, match="other settings"):
        ProgressiveDistillation(teacher, [6000, 3000], make_student=small_student, alpha=0.5).run(
            loader, config, tmp_path / "b"
        )


def test_default_students_are_made_from_the_budget(teacher, loader, tmp_path):
    student, records = ProgressiveDistillation(teacher, [1500]).run(
        loader, TrainConfig(steps=2), tmp_path
    )
    assert parameter_count(student) == records[0]["parameters"] <= 1500
    assert student.config.vocab_size == VOCABULARY and student.config.experts == 2
    json.loads((tmp_path / "stage_1_1500.json").read_text())


@pytest.mark.parametrize("sizes", [[], [3000, 3000], [10**7], [1000, 2000]])
def test_sizes_must_fall(teacher, sizes):
    with pytest.raises(ValueError, match="must fall"):
        ProgressiveDistillation(teacher, sizes)


def test_classifiers_need_make_student():
    with pytest.raises(ValueError, match="pass make_student"):
        student_like(DigitsCNN(), 1000)


# Search


@pytest.fixture
def digits():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 8, 8, generator=generator)
    return DataLoader(
        TensorDataset(images, (images.mean((1, 2, 3)) * 50).long() % 10), batch_size=20
    )


def mlp(trial):
    return quantize_weights(
        DigitsMLP(DigitsMLPConfig((trial.suggest_int("width", 4, 32),))), Format(8)
    )


def make_search(digits, folder, **arguments):
    torch.manual_seed(0)
    return StudentSearch(
        DigitsCNN().eval(),
        digits,
        lambda m: evaluate(m, digits).loss,
        TrainConfig(steps=8),
        folder,
        mlp,
        **arguments,
    )


def test_search_finds_the_front_and_keeps_a_budget(digits, tmp_path):
    search = make_search(digits, tmp_path, budget=2500)
    assert len(search.run(5)) == 5
    table = search.run(8)
    assert len(table) == 8 and set(table["state"]) <= {"complete", "pruned"}
    done = table[table["state"] == "complete"]
    for row in done.itertuples():
        dominated = ((done["bytes"] <= row.bytes) & (done["perplexity"] < row.perplexity)).any()
        assert row.bytes == (tmp_path / f"trial_{row.trial}.kit").stat().st_size
        assert row.on_front != dominated or (done["bytes"] == row.bytes).sum() > 1
    student, row = search.best(2500)
    assert (
        row["bytes"] <= 2500
        and row["perplexity"] == done[done["bytes"] <= 2500]["perplexity"].min()
    )
    assert evaluate(student, digits).perplexity == pytest.approx(row["perplexity"], rel=1e-6)
    with pytest.raises(ValueError, match="no student fits 100 bytes"):
        search.best(100)
    assert len(make_search(digits, tmp_path, budget=2500).table()) == 8


def test_hopeless_trials_stop_early(digits, tmp_path):
    search = make_search(digits, tmp_path)

    def good_then_hopeless(trial):
        width = 4 + trial.number if trial.number < RIVALS else 32
        model = DigitsMLP(DigitsMLPConfig((trial.suggest_int("width", width, width),)))
        if trial.number >= RIVALS:
            model[-1].weight.data *= 1e3
        return model

    search.space = good_then_hopeless
    states = search.run(RIVALS + 1)["state"].tolist()
    assert states[:RIVALS] == ["complete"] * RIVALS and states[-1] == "pruned"
    assert search.table()["steps"].tolist()[-1] < 8


def test_the_descent_keeps_what_helps_and_stays_in_the_budget(digits, tmp_path):
    def space(trial):
        shape = trial.suggest_int("width", 4, 32), trial.suggest_int("second", 4, 32)
        return DigitsMLP(DigitsMLPConfig(shape))

    def distance(model):  # from the best shape, (20, 8)
        shape = [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
        return (abs(shape[0] - 20) + abs(shape[1] - 8)) / 100

    search = make_search(digits, tmp_path, budget=40_000)
    search.space, search.validate = space, distance
    changes = [{"second": 12}, {"width": 20}, {"second": 8}, {"width": 32, "second": 32}]
    table = search.descend({"width": 8, "second": 4}, changes, 20)
    rest = [(8, 12), (20, 4), (20, 12), (20, 8), (32, 32)]  # (8, 12) is no better than (8, 4)
    assert list(zip(table["width"], table["second"])) == [(8, 4), *rest]
    unlimited = make_search(digits, tmp_path / "unlimited")
    unlimited.space, unlimited.validate = space, distance
    assert unlimited.descend({"width": 8, "second": 4}, changes, 20).equals(table)
    small = make_search(digits, tmp_path / "small", budget=12_000)
    small.space, small.validate = space, distance
    assert (32, 32) not in set(
        zip(*small.descend({"width": 8, "second": 4}, changes, 20)[["width", "second"]].T.values)
    )
    assert len(small.descend({"width": 8, "second": 4}, changes, 20)) == 5


def test_no_student_is_trained_twice(digits, tmp_path):
    search = make_search(digits, tmp_path)
    for _ in range(3):
        search.study.enqueue_trial({"width": 8})
    assert search.run(2)["width"].tolist().count(8) == 1


def test_a_budget_that_nothing_meets(digits, tmp_path):
    with pytest.raises(ValueError, match="over the budget of 10 bytes"):
        make_search(digits, tmp_path, budget=10).run(1)


@pytest.mark.parametrize("fill", [1.0, 0.5])
def test_the_language_model_space_fills_the_budget_with_quantized_students(fill):
    settings = {"rank": 0.5, "layers": 2, "experts": 2, "bits": 4, "fill": fill}
    space = resnet_bk_space(VOCABULARY, 20_000)
    student = space(optuna.trial.FixedTrial(settings))
    assert student.config.embedding_rank == student.config.d_model // 2 and student.config.tied
    assert (
        isinstance(student, nn.Module)
        and len(student.layers[0].mixer.gate.weight[0].unique()) <= 16
    )
    assert 0.8 * fill * 20_000 < expected_bytes(student) <= fill * 20_000
    assert space(optuna.trial.FixedTrial(settings)).config == student.config


def test_expected_bytes_are_those_of_the_trained_file(teacher, loader, tmp_path):
    student = quantize_weights(
        ResNetBK(ResNetBKConfig(VOCABULARY, 16, 2, 2, 32, 12, tied=True)), Format(4)
    )
    before, expected = artifact.save(student, tmp_path / "untrained.kit"), expected_bytes(student)
    DistillationTrainer(teacher, student).fit(loader, TrainConfig(steps=20, lr=1e-2), log=False)
    trained = artifact.save(student, tmp_path / "trained.kit")
    assert abs(expected - trained) < 0.1 * trained < trained - before
