import io
import itertools
import math
import random
import re
import resource
from contextlib import redirect_stdout
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kit.core.protocols import LanguageModel
from kit.training import TrainConfig, learning_rate, report, train
from kit.training.checkpoint import read_checkpoint, write_checkpoint
from kit.training.losses import classification_loss, next_token_loss


class ToyLM(LanguageModel):
    def __init__(self, vocab_size=11, width=8):
        super().__init__()
        self.embedding, self.mixer = (
            nn.Embedding(vocab_size, width),
            nn.GRU(width, width, batch_first=True),
        )
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(width, vocab_size)
        self.register_buffer("usage", torch.zeros(3, dtype=torch.int64), persistent=False)

    def hidden(self, tokens):
        self.usage += tokens.numel()
        return self.dropout(self.mixer(self.embedding(tokens))[0])

    def output(self):
        return self.head.weight, self.head.bias

    def auxiliary_loss(self):
        return self.head.bias.new_zeros(())


def toy(seed=0):
    torch.manual_seed(seed)
    return ToyLM()


def loader(rows=20, batch_size=4):
    tokens = torch.arange(rows * 7).reshape(rows, 7) ** 2 % 11
    return DataLoader(
        TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size, shuffle=True, drop_last=True
    )


def state(model):
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a | b)


def weight_norm(model):
    """A stand-in for a validation loss that draws random numbers, as the iterator of a DataLoader
    does."""
    torch.rand(3), random.random(), np.random.rand()
    return float(model.head.weight.detach().norm())


class Killed(Exception):
    pass


def killer(at):
    def hook(step, steps, model):
        assert steps == 23
        torch.rand(1), np.random.standard_normal(), random.gauss(0, 1)
        if step == at:
            raise Killed

    return hook


@pytest.mark.parametrize("at", [5, 8, 16, 23])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, at):
    config = TrainConfig(steps=23, lr=0.02, eval_every=4, seed=3)
    whole, validate = toy(), weight_norm
    expected = train(whole, loader(), config, validate=validate, hooks=[killer(0)], log=False)
    with pytest.raises(Killed):
        train(
            toy(),
            loader(),
            config,
            validate=validate,
            hooks=[killer(at)],
            checkpoint=tmp_path / "c",
            log=False,
        )
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    resumed = toy(seed=1)
    result = train(
        resumed,
        loader(),
        config,
        validate=validate,
        hooks=[killer(0)],
        checkpoint=tmp_path / "c",
        log=False,
    )
    assert same(state(whole), state(resumed))
    assert (result.tokens, result.best_step, result.best_validation) == (
        expected.tokens,
        expected.best_step,
        expected.best_validation,
    )
    strip = [{k: v for k, v in entry.items() if k != "seconds"} for entry in expected.history]
    assert strip == [{k: v for k, v in entry.items() if k != "seconds"} for entry in result.history]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_finished_checkpoint_is_not_trained_further(tmp_path):
    config = TrainConfig(steps=6)
    first, again = toy(), toy(seed=5)
    train(first, loader(), config, checkpoint=tmp_path / "c", log=False)
    train(
        again,
        loader(),
        config,
        checkpoint=tmp_path / "c",
        log=False,
        hooks=[lambda *_: pytest.fail("trained")],
    )
    assert same(state(first), state(again))


def test_validation_changes_nothing_but_what_is_kept():
    config = TrainConfig(steps=12, eval_every=3)
    plain, validated = toy(), toy()
    train(plain, loader(), config, log=False)
    values = iter([4.0, 3.0, 2.0, 1.0])
    result = train(
        validated, loader(), config, validate=lambda m: (weight_norm(m), next(values))[1], log=False
    )
    assert same(state(plain), state(validated)) and result.best_step == 12


def test_best_state_is_restored_and_patience_stops():
    seen, values = {}, iter([math.inf, 3.0, 2.0, 2.5, 2.0, 1.0])

    def validate(model):
        value = next(values)
        seen[value] = state(model)
        return value

    model = toy()
    result = train(
        model,
        loader(),
        TrainConfig(steps=60, eval_every=10, patience=2),
        validate=validate,
        log=False,
    )
    assert (result.best_validation, result.best_step) == (2.0, 30) and result.history[-1][
        "step"
    ] == 50
    assert not same(state(model), seen[2.5])
    first_two = state(model)
    assert torch.equal(first_two["head.weight"], state(model)["head.weight"])
    assert [h["validation"] for h in result.history if "validation" in h] == [
        math.inf,
        3.0,
        2.0,
        2.5,
        2.0,
    ]


def test_it_learns_and_reports():
    model, out = toy(), io.StringIO()
    with redirect_stdout(out):
        result = train(model, loader(), TrainConfig(steps=150, lr=0.02))
    assert result.history[-1]["loss"] < 0.75 * result.history[0]["loss"]
    assert result.tokens == 150 * 4 * 6 and result.history[-1]["step"] == 150 and model.training
    assert out.getvalue().startswith("step 150/150  loss ") and out.getvalue().count("\n") <= 2
    with redirect_stdout(io.StringIO()) as silent:
        train(model, loader(), TrainConfig(steps=2), log=False)
    assert silent.getvalue() == ""


def test_the_log_is_a_line_in_20_seconds_at_most_with_one_hint_and_a_last_line(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    now = lambda: clock.now
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=now, process_time=now))
    monkeypatch.setattr(report, "oversubscribed", lambda share: f"hint: {share:g}")
    state = {"step": 10, "seconds": 5.0, "tokens": 1000, "finished": False}
    history, config = [{"loss": 1.5, "lr": 1e-3}], TrainConfig(steps=40)
    run = SimpleNamespace(**state, device=torch.device("cpu"), history=history, config=config)
    say, silent = report.Report(True), report.Report(False)
    line = "step 10/40  loss 1.5000  lr 1.0e-03  200 targets/s  5 s, about 15 s left\n"
    for seconds, expected in ((19, ""), (21, line + "hint: 1\n"), (40, ""), (42, line)):
        clock.now = seconds
        say(run), silent(run)
        assert capsys.readouterr().out == expected
    run.step, run.finished, clock.now = 40, True, 43
    history[0]["validation"] = 2.0
    say(run)
    last = "step 40/40  loss 1.5000  validation 2.0000  lr 1.0e-03  200 targets/s  5 s\n"
    assert capsys.readouterr().out == last


def test_classifier_in_bfloat16_with_extra_parameters():
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    batches = [(x, (x[:, 0] > 0).long())]
    model, extra = nn.Linear(5, 2), nn.Parameter(torch.ones(2, 2))

    def loss(model, batch):
        assert torch.is_autocast_enabled("cpu")
        return classification_loss(model, batch) + (extra**2).sum()

    config = TrainConfig(steps=40, lr=0.05, precision="bfloat16", weight_decay=0)
    result = train(model, batches, config, loss=loss, extra_parameters=iter([extra]), log=False)
    assert extra.abs().max() < 0.5 and result.history[-1]["loss"] < 1 and result.tokens == 64 * 40


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, lr=1.0, warmup=0.1, final_lr=0.05)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == 1 and rates[-1] == pytest.approx(0.05) and np.all(np.diff(rates[10:]) < 0)
    assert learning_rate(0, TrainConfig(steps=1, lr=2.0, warmup=0)) == 2.0


def test_vectors_are_not_decayed():
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.bias.fill_(1), model.weight.fill_(1)

    def flat(model, batch):
        return (model.weight.sum() + model.bias.sum()) * 0

    train(
        model,
        [torch.zeros(1)],
        TrainConfig(steps=5, lr=0.1, weight_decay=0.5),
        loss=flat,
        log=False,
    )
    assert torch.equal(model.bias, torch.ones(3)) and (model.weight < 0.9).all()


def test_a_hook_may_replace_parameters():
    model, before = toy(), []

    def shrink(step, steps, model):
        if step == 4:
            before.append(model.embedding.weight)
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
            return True

    old = model.head.weight
    train(model, loader(), TrainConfig(steps=8), hooks=[shrink], log=False)
    assert model.head.weight is not old and model.embedding.weight is before[0]
    assert not torch.equal(model.head.weight, old)


def test_a_rebuilt_optimizer_goes_on_where_it_was():
    """A hook that says at every step that parameters were replaced, though none were, changes
    nothing."""
    plain, rebuilt, config = toy(), toy(), TrainConfig(steps=9, lr=0.02)
    train(plain, loader(), config, log=False)
    train(rebuilt, loader(), config, hooks=[lambda *_: True], log=False)
    assert same(state(plain), state(rebuilt))


def test_frozen_submodules_stay_in_evaluation_mode():
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3) * 5 + 3, torch.randint(2, (8,)))]

    def network():
        return nn.Sequential(
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.Sequential(nn.ReLU(), nn.Dropout()),
            nn.Linear(4, 2),
        )

    seen = []
    hooks = [lambda step, steps, model: seen.append([m.training for m in model.modules()])]
    model = network()
    model[1].eval(), model[2][1].eval()
    modes = [m.training for m in model.modules()]
    train(model, batches, TrainConfig(steps=3), loss=classification_loss, hooks=hooks, log=False)
    assert (
        model[1].running_mean.eq(0).all()
        and seen == [modes] * 3
        and [m.training for m in model.modules()] == modes
    )
    whole = network().eval()
    train(whole, batches, TrainConfig(steps=3), loss=classification_loss, hooks=hooks, log=False)
    assert (
        whole[1].running_mean.ne(0).any()
        and all(seen[-1])
        and not any(m.training for m in whole.modules())
    )


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(4, 2), torch.ones(4, 2), torch.tensor([0, 1, 1, -100])),
        {
            "input1": torch.ones(4, 2),
            "input2": torch.ones(4, 2),
            "labels": torch.tensor([0, 1, 1, -100]),
        },
        [torch.ones(4, 2), torch.ones(4, 2), torch.tensor([0, 1, 1, -100])],
    ],
)
def test_batches_of_every_kind(batch):
    model = nn.Bilinear(2, 2, 3)
    result = train(model, [batch], TrainConfig(steps=5), loss=classification_loss, log=False)
    assert result.tokens == 5 * 3 and math.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize(
    "field, values",
    [
        ("steps", [0, "3", True, 2.5, math.inf, None, math.nan]),
        ("lr", [-1.0, math.nan, math.inf, "0.1", None, False]),
        ("warmup", [2, "0"]),
        ("clip", [0, None]),
        ("final_lr", [1.5]),
        ("eval_every", [0, 1.0, True]),
        ("patience", [0, "2"]),
        ("precision", ["fp8", None, 16]),
        ("weight_decay", [-1, math.inf]),
        ("seed", [None, 0.5, 2**70]),
    ],
)
def test_bad_settings_are_named(field, values):
    for value in values:
        with pytest.raises(
            ValueError, match=f"^{field} is {re.escape(repr(value))}; it must be "
        ) as error:
            TrainConfig(**{"steps": 5, field: value})
        assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_settings_and_survive_a_checkpoint(tmp_path):
    config = TrainConfig(
        steps=np.int64(4), lr=np.float32(0.5), clip=math.inf, eval_every=np.int32(2)
    )
    first, again = toy(), toy(seed=1)
    train(first, loader(), config, checkpoint=tmp_path / "c", log=False)
    train(again, loader(), config, checkpoint=tmp_path / "c", log=False)
    assert same(state(first), state(again))


def test_bad_runs_say_what_to_do(tmp_path):
    config = TrainConfig(steps=3)
    with pytest.raises(ValueError, match="no batches"):
        train(toy(), [], config, log=False)
    with pytest.raises(ValueError, match="pass validate="):
        train(toy(), loader(), TrainConfig(steps=3, patience=1), log=False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        train(toy().requires_grad_(False), loader(), config, log=False)
    with pytest.raises(ValueError, match=r"loss \(nan\) is not finite at step 2 of 3.*lower lr"):
        train(toy(), loader(), config, loss=_nan_at_step_two(), log=False)
    with pytest.raises(ValueError, match="gradient .* is not finite at step 1"):
        train(
            toy(),
            loader(),
            config,
            loss=lambda m, b: m.head.weight.sub(m.head.weight.detach()).abs().sqrt().sum(),
            log=False,
        )
    with pytest.raises(ValueError, match="validation loss is NaN"):
        train(toy(), loader(), config, validate=lambda m: math.nan, log=False)


def _nan_at_step_two():
    calls = iter([1.0, math.nan])
    return lambda model, batch: model.head.weight.sum() * 0 + next(calls)


def test_bad_checkpoints_are_refused_in_one_sentence(tmp_path):
    path, config = tmp_path / "c", TrainConfig(steps=3)
    train(toy(), loader(), config, checkpoint=path, log=False)

    def refused(message, model=None, config=config):
        with pytest.raises(ValueError, match=message) as error:
            train(model or toy(), loader(), config, checkpoint=path, log=False)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    refused("written with lr=0.003, not 0.1", config=TrainConfig(steps=3, lr=0.1))
    refused("does not fit this model", model=ToyLM(width=9))
    good, written = path.read_bytes(), tmp_path / "written"
    written.write_bytes(good)
    for damaged in (good[: len(good) // 2], good[:20], b"", b"\x80\x02pickle"):
        path.write_bytes(damaged)
        refused("is damaged")
    clean = load_file(written)
    save_file(clean, path)
    refused("not a training checkpoint")
    groups, state = read_checkpoint(written)

    def edited(group, name, tensor, **changes):
        tensors = {**groups[group], name: tensor}
        changed = {**groups, group: {k: t for k, t in tensors.items() if t is not None}}
        other = msgspec.structs.replace(state)
        for field, value in changes.items():
            setattr(other, field, value)
        write_checkpoint(path, changed, other)

    weight = groups["model"]["head.weight"]
    edited("model", "head.weight", weight.clone().fill_(math.nan))
    refused("NaN in 'model/head.weight'")
    for name in ("exp_avg", "exp_avg_sq", "step"):
        for bad in (torch.zeros(3), None, torch.zeros_like(weight).double()):
            edited("optimizer", f"head.weight/{name}", bad)
            refused(f"'head.weight/{name}' is ")
    edited("best", "head.weight", torch.zeros(3))
    refused("'embedding.weight' is absent")
    edited("model", "head.weight", weight, step=4, position=4)
    refused("step 4 of 3")
    edited("model", "head.weight", weight, position=10**12)
    refused("at batch 1000000000000 and step 3")
    numpy = groups["rng.now"]["numpy"]
    for place, value in ((0, -1.0), (3, math.nan), (624, 10.0**6), (624, 3.5)):
        wrong = numpy.clone()
        wrong[place] = value
        edited("rng.now", "numpy", wrong)
        refused("is damaged")
    edited("rng.epoch", "torch", groups["rng.now"]["torch"][:-1])
    refused("is damaged")
    edited("other", "head.weight", weight)
    refused("it holds {'other'}")


def test_every_flipped_byte_of_a_checkpoint_is_found(tmp_path):
    path, config = tmp_path / "c", TrainConfig(steps=2)
    train(toy(), loader(), config, checkpoint=path, log=False)
    good = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(good), 40):
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            train(toy(), loader(), config, checkpoint=path, log=False)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "c"
    train(toy(), loader(), TrainConfig(steps=1), checkpoint=path, log=False)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError, match=str(path)) as error:
            write_checkpoint(path, *read_checkpoint(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_global_generators_are_what_they_were_before(fails):
    def draws():
        return torch.rand(1), np.random.standard_normal(), random.gauss(0, 1)

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    running = model[1].running_mean.clone()
    batch = torch.randn(8, 4), torch.randint(0, 3, (8,))

    def loss(model, batch):
        assert [module.training for module in model] == [True, False, True]
        if fails:
            raise RuntimeError("in the loss")
        return classification_loss(model, batch)

    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = draws()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    try:
        train(model, [batch], TrainConfig(steps=2, seed=3), loss=loss, log=False)
    except ValueError as error:
        assert fails and "RuntimeError: in the loss" in str(error)
    assert draws() == expected
    assert [module.training for module in model] == [True, False, True]
    assert torch.equal(model[1].running_mean, running)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_layers_with_sparse_gradients_are_trained_as_with_dense_ones(layer):
    tokens, labels = torch.randint(0, 20, (8, 5)), torch.randint(0, 3, (8,))
    if layer is nn.Embedding:
        tokens = tokens[:, 0]
    trained = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(layer(20, 4, sparse=sparse), nn.Linear(4, 3))
        config = TrainConfig(steps=3, lr=0.1)
        train(model, [(tokens, labels)], config, loss=classification_loss, log=False)
        trained.append(model[0].weight)
    torch.testing.assert_close(*trained)


class Breaking:
    """A loader whose third batch cannot be read while `broken`."""

    broken = True

    def __iter__(self):
        for number, batch in enumerate(loader()):
            torch.rand(3)  # as augmentation draws
            if self.broken and number == 2:
                raise OSError("the disk is gone")
            yield batch


def _float_after(good, calls):
    def loss(model, batch):
        value = next_token_loss(model, batch)  # counts uses in a buffer, and draws for dropout
        return 1.5 if next(calls) == good else value

    return loss


@pytest.mark.parametrize("cause", ["loader", "loss", "epoch"])
def test_what_was_trained_before_a_failure_is_kept(tmp_path, cause):
    config, batches, loss = TrainConfig(steps=8), Breaking(), next_token_loss
    whole, resumed = toy(), toy()
    Breaking.broken = cause == "loader"
    if cause == "epoch":  # of five batches; a DataLoader draws as an epoch begins
        batches = loader()
    if cause != "loader":
        loss = _float_after({"loss": 2, "epoch": 5}[cause], itertools.count())
    says = (
        "Step 3 of 8 fails .OSError: the disk is gone"
        if cause == "loader"
        else "is a float; it must"
    )
    with pytest.raises(ValueError, match=says) as error:
        train(toy(), batches, config, loss=loss, checkpoint=tmp_path / "c", log=False)
    assert "\n" not in str(error.value)
    Breaking.broken = False
    train(whole, batches, config, log=False)
    train(resumed, batches, config, checkpoint=tmp_path / "c", log=False)
    assert same(state(whole), state(resumed))


@pytest.mark.parametrize(
    "loss, says",
    [
        (lambda m, b: m.head.weight.sum(0), "a torch.Size.*; it must be a tensor of one number"),
        (lambda m, b: 2.0, "a float; it must be a tensor"),
        (lambda m, b: torch.tensor(1.0), "Step 1 of 3 fails .RuntimeError.*labels out of range"),
        (lambda m, b: m.head.weight[10**6].sum(), "Step 1 of 3 fails .IndexError.*out of range"),
        (lambda m, b: undefined, "Step 1 of 3 fails .NameError"),  # noqa: F821
    ],
)
def test_losses_that_are_none_are_one_sentence(loss, says):
    with pytest.raises(ValueError, match=says) as error:
        train(toy(), loader(), TrainConfig(steps=3), loss=loss, log=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.tensor([0, -1]), torch.ones(2)])
def test_labels_that_are_none_are_one_sentence(labels):
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="^targets ") as error:
        train(model, [(torch.randn(2, 2), labels)], TrainConfig(2), loss=classification_loss)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_a_folder_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="checkpoint is the folder"):
        train(toy(), loader(), TrainConfig(steps=3), checkpoint=tmp_path)
