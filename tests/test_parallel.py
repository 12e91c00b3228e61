"""Two processes of batch b train as one of batch 2b. This file is also what the processes run:
`python -m tests.test_parallel folder` trains every case and keeps what came out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kit.budget.rate import RateLoss, row_sensitivity, set_rate_formats
from kit.core.protocols import LanguageModel
from kit.distillation import DistillationTrainer
from kit.models.moe import MoE
from kit.pruning import MagnitudePruner
from kit.quantization import Format, quantize_weights
from kit.training import TrainConfig, parallel, train
from kit.training.evaluation import evaluate
from kit.training.losses import next_token_loss
from notebooks.reference.data_parallel import launch

CONFIG = TrainConfig(8, lr=0.02, eval_every=4)


class Tiny(LanguageModel):
    def __init__(self, width=12, dropout=0.0, experts=False):
        super().__init__()
        self.embedding, self.mixer = nn.Embedding(11, width), nn.Linear(width, width)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, 11)
        self.unused = nn.Linear(2, 2)
        self.moe = MoE(width, 8, 3) if experts else None

    def hidden(self, tokens):
        x = self.embedding(tokens).cumsum(1)
        x = x if self.moe is None else x + self.moe(x)
        return self.dropout(torch.tanh(self.mixer(x)))

    def output(self):
        return self.head.weight, self.head.bias


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return Tiny(**settings).double()


def loader(rows=30, batch_size=5, ignored=3):  # odd, and targets do not count: uneven shares
    tokens = torch.arange(rows * 7).reshape(rows, 7) ** 2 % 11
    targets = tokens[:, 1:].clone()
    targets[ignored - 1 :: ignored, 2:] = -100
    return DataLoader(TensorDataset(tokens[:, :-1], targets), batch_size, shuffle=True)


def plain(folder, **arguments):
    model = tiny(experts=True)
    validate = lambda m: evaluate(m, loader()).loss
    result = train(model, loader(), CONFIG, validate=validate, log=False, **arguments)
    numbers = [[e["loss"], e.get("validation", 0.0)] for e in result.history]
    usage = {"usage": model.moe.usage.double()}
    return model, usage | {"tokens": torch.tensor(result.tokens), "history": torch.tensor(numbers)}


def learned_steps(folder):
    model = quantize_weights(tiny(), {"*.weight": Format(4)}, learned=True)
    train(model, loader(), CONFIG, log=False)
    return model, {}


def scheduled_masks(folder):
    model = tiny()
    hook = MagnitudePruner(model).schedule(0.6, every=2)
    train(model, loader(), CONFIG, hooks=[hook], log=False)
    return model, {}


def rate(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(24, 32)
    data = DataLoader(TensorDataset(x, x.roll(1, 1) * 2), 6, shuffle=True)

    def loss(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    batches = list(data)[:2]
    set_rate_formats(model, row_sensitivity(model, batches, loss), 2600)
    term = RateLoss(loss, model, 2200, batches)
    extra = term.parameters()
    config = TrainConfig(10, lr=2e-3)
    train(model, data, config, loss=term, hooks=[term.step], extra_parameters=extra, log=False)
    sizes = torch.tensor([[entry["bytes"], entry["lambda"]] for entry in term.history])
    return model, {"sizes": sizes, "state": term.state.detach()}


def distilled(folder):
    teacher, student = tiny(1, width=16).eval(), tiny()
    features = {"features": [("mixer", "mixer")], "feature_loss": "cosine"}  # a mean over tokens
    trainer = DistillationTrainer(teacher, student, **features)
    trainer.fit(loader(ignored=99), CONFIG, log=False)
    return student, {}


def dropped_out(folder):
    model, parts = tiny(dropout=0.3), 2 // parallel.processes()
    train(model, loader(), TrainConfig(8, lr=0.02, accumulate=parts), log=False)
    return model, {}


def resumed(folder):
    return plain(folder, checkpoint=folder / "from-the-other")


CASES = (plain, learned_steps, scheduled_masks, rate, distilled, dropped_out, resumed)


class Killed(Exception):
    pass


def kill(step, steps, model):
    if step == 6:
        raise Killed


def until_killed(folder):
    """Leaves a checkpoint of step 4 of 8."""
    try:
        plain(folder, checkpoint=folder / "for-the-other", hooks=[kill])
    except Killed:
        return


def trained(folder):
    """All tensors of each case."""
    found = {}
    for case in CASES:
        model, more = case(folder)
        tensors = dict(model.named_parameters()) | more
        found |= {f"{case.__name__}: {name}": t.detach() for name, t in tensors.items()}
    return found


def main(folder):
    print("device", parallel.join("cpu"), "process", parallel.rank(), flush=True)
    until_killed(folder)
    found = trained(folder)
    torch.save(found, folder / f"{parallel.rank()}.pt")


def test_two_processes_train_as_one(tmp_path, monkeypatch, capsys):
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir(), alone.mkdir()
    until_killed(alone)
    (alone / "for-the-other").rename(together / "from-the-other")
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch("tests.test_parallel", str(together), processes=2)
    assert "process 0" in (log := capsys.readouterr().out) and "process 1" in log
    (together / "for-the-other").rename(alone / "from-the-other")
    one, two, twin = trained(alone), *(torch.load(together / f"{i}.pt") for i in range(2))
    assert one.keys() == two.keys() and len(one) > 50
    for name in one:
        assert torch.equal(two[name], twin[name]), name
        precise = {"rtol": 1e-4, "atol": 1e-5} if name.startswith("rate") else {}
        values = two[name].float(), one[name].float()
        torch.testing.assert_close(*values, **precise, msg=lambda text: f"{name}: {text}")
    before = dict(tiny(experts=True).named_parameters())
    assert all(
        torch.equal(one[f"plain: unused.{n}"], before[f"unused.{n}"]) for n in ("weight", "bias")
    )
    for name in ("history", "usage", "tokens", "head.weight"):  # as if it had not been killed
        torch.testing.assert_close(one[f"resumed: {name}"], one[f"plain: {name}"])


def test_a_process_that_fails_ends_the_launch(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(subprocess.CalledProcessError):
        launch("tests.test_parallel", processes=1)


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulated_parts_train_as_the_whole(parts):
    whole, cut = tiny(), tiny()
    train(whole, loader(), CONFIG, log=False)
    config = TrainConfig(8, lr=0.02, eval_every=4, accumulate=parts)
    train(cut, loader(), config, log=False)
    for ours, theirs in zip(cut.parameters(), whole.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_half_precision_scales_gradients_and_resumes(tmp_path):
    def classify(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    torch.manual_seed(0)
    x = torch.randn(64, 8)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 16, shuffle=True)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    config, whole, again = TrainConfig(20, lr=0.02, precision="float16"), model(), model()
    result = train(whole, data, config, loss=classify, log=False)
    full = train(model(), data, TrainConfig(20, lr=0.02), loss=classify, log=False)
    assert result.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.01)
    with pytest.raises(Killed):
        train(
            model(), data, config, loss=classify, hooks=[kill], checkpoint=tmp_path / "c", log=False
        )
    train(again, data, config, loss=classify, checkpoint=tmp_path / "c", log=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_a_scale_that_cannot_fall_further_is_an_error():
    model = nn.Linear(3, 2)
    data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1]) + 0 * model.weight.sum().sqrt()

    with pytest.raises(ValueError, match="not finite"):
        nn.init.constant_(model.weight, 0.0)  # the root's gradient is infinite there
        train(model, data, TrainConfig(40, precision="float16"), loss=loss, log=False)


def test_what_cannot_be_shared_out_is_refused():
    config = TrainConfig(2, accumulate=2)
    with pytest.raises(ValueError, match="tensors of .3, 4. rows"):
        train(tiny(), [(torch.ones(4, 3).long(), torch.ones(3, 3).long())], config, log=False)
    norms = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    batch = [(torch.randn(6, 4), torch.zeros(6).long())]
    with pytest.raises(ValueError, match="Batch norms would see a batch in 2 parts"):
        train(norms, batch, config, loss=next_token_loss, log=False)
    norms[1].eval()
    loss = lambda model, batch: model(batch[0]).square().mean()
    train(norms, batch, config, loss=loss, log=False)
    with pytest.raises(ValueError, match="loss \\(nan\\) is not finite"):
        ignored = torch.full((4, 3), -100)
        train(tiny(), [(torch.ones(4, 3).long(), ignored)], config, log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
