"""Composed token tables against a plain loop, and the files they end in."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from kit import artifact
from kit.budget.rate import RateLoss, row_sensitivity, set_rate_formats
from kit.core.weights import weight_of
from kit.data.tokenization import BPETokenizer
from kit.distillation import DistillationTrainer
from kit.models import build_model
from kit.quantization.formats import Format
from kit.quantization.token_tables import Composition, _Compose, compose_tables
from kit.training.losses import next_token_loss

TEXT = 40 * (
    "the theory of the other weather gathers there; they breathe together, rather other than "
    "the others. "
)


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(TEXT, 290)


def model_of(tokenizer, **more):
    torch.manual_seed(0)
    return build_model(
        "ResNetBK",
        {"vocab_size": tokenizer.vocab_size, "d_model": 32, "layers": 1, "channels": 8, **more},
    ).eval()


def batch(tokenizer):
    tokens = torch.from_numpy(tokenizer.encode(TEXT)[:161]).long()
    return tokens[:160].view(4, 40), tokens[1:161].view(4, 40)


def test_parts_spell_their_token(tokenizer):
    spell = [tokenizer._backend.id_to_token(i) for i in range(tokenizer.vocab_size)]
    assert (tokenizer.parts[:256] == -1).all() and (tokenizer.parts[256:] >= 0).all()
    for token, (left, right) in enumerate(tokenizer.parts[256:], 256):
        assert spell[left] + spell[right] == spell[token]


def test_rows_are_the_recursion(tokenizer):
    torch.manual_seed(1)
    composition = Composition(tokenizer.parts, 5)
    composition.left.data, composition.right.data = (
        torch.randn(5).half().float(),
        torch.randn(5).half().float(),
    )
    composition.basis.copy_(torch.randn(5, 5))
    residual = torch.randn(tokenizer.vocab_size, 5)
    expected = residual.double()
    for i, (left, right) in enumerate(tokenizer.parts):
        if left >= 0:
            expected[i] += (
                composition.left.double() * expected[left]
                + composition.right.double() * expected[right]
            )
    expected = expected @ composition.rounding(composition.basis).double()
    assert torch.allclose(composition(residual).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients(tokenizer):
    parts = tokenizer.parts[:280]
    arguments = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((280, 3), 3, 3)]
    assert torch.autograd.gradcheck(lambda *a: _Compose.apply(*a, parts)[250:], arguments)


def test_composing_keeps_the_outputs(tokenizer):
    model, (inputs, _) = model_of(tokenizer), batch(tokenizer)
    before = model(inputs)
    compose_tables(model, tokenizer.parts, [batch(tokenizer)], next_token_loss)
    assert torch.allclose(model(inputs), before, atol=1e-4)


def test_distillation_composes_a_tied_table_once_and_with_the_same_gradients(
    tokenizer, monkeypatch
):
    model, teacher = model_of(tokenizer, tied=True), model_of(tokenizer, tied=True)
    compose_tables(model, tokenizer.parts, [batch(tokenizer)], next_token_loss)
    distill, found = DistillationTrainer(teacher, model, temperature=1.0, alpha=0.5), []
    composition = weight_of(model.embedding).find(Composition)
    for context in (parametrize.cached, nullcontext):
        monkeypatch.setattr(parametrize, "cached", context)
        calls = []
        hook = composition.register_forward_hook(lambda *_: calls.append(1))
        distill(model, batch(tokenizer)).backward()
        hook.remove()
        found.append((len(calls), weight_of(model.embedding).original.grad.clone()))
        model.zero_grad()
    (once, one), (twice, two) = found
    assert (once, twice) == (1, 2) and (one - two).norm() < 1e-6 * two.norm()


def test_fit_finds_the_factors_that_made_the_rows(tokenizer):
    torch.manual_seed(3)
    truth = Composition(tokenizer.parts, 6)
    truth.left.data, truth.right.data = (
        torch.full((6,), 0.75),
        torch.full((6,), 0.5),
    )  # the same in every basis
    rows = truth(
        torch.cat([torch.randn(256, 6), torch.zeros(tokenizer.vocab_size - 256, 6)])
    ).detach()
    found = Composition(tokenizer.parts, 6)
    residual = found.fit(rows, torch.ones(len(rows)), torch.eye(6))
    assert torch.allclose(found.left, truth.left, atol=2e-3) and residual[256:].abs().max() < 2e-2
    assert torch.allclose(found(residual), rows, atol=1e-4)


@pytest.mark.parametrize(
    "rounding, most", [(None, 0.02), (Format(6), 0.1)]
)  # a and b are fitted anew, so it is not 0
def test_columns_cost_the_same_and_tell_nothing_of_each_other(tokenizer, rounding, most):
    """In the fitted basis the curvature is a multiple of the identity and the residuals are
    uncorrelated, most first."""
    torch.manual_seed(4)
    mix, slope = torch.randn(6, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    curvature, rows = (
        slope.T @ slope,
        torch.randn(tokenizer.vocab_size, 6, dtype=torch.float64) @ mix,
    )
    composition = Composition(tokenizer.parts, 6).double()
    if rounding is None:
        composition.rounding = torch.nn.Identity()
    else:
        composition.rounding.format = rounding
    residual = composition.fit(rows, torch.ones(len(rows), dtype=torch.float64), curvature)
    basis = composition.basis
    metric, covariance = basis @ curvature @ basis.T, residual.T @ residual
    assert torch.allclose(metric / metric[0, 0], torch.eye(6, dtype=torch.float64), atol=1e-6)
    ratio = covariance / covariance.diagonal().outer(covariance.diagonal()).sqrt()
    assert (ratio - torch.eye(6)).abs().max() < most
    assert (covariance.diagonal().diff() < 0).all()


@pytest.mark.parametrize("tied", [False, True])
def test_file_gives_the_model_back(tokenizer, tmp_path, tied):
    model, examples = model_of(tokenizer, tied=tied), [batch(tokenizer)]
    compose_tables(model, tokenizer.parts, [batch(tokenizer)], next_token_loss)
    set_rate_formats(model, row_sensitivity(model, examples, next_token_loss), 4000)
    rate = RateLoss(next_token_loss, model, 9000, examples)
    rate(model, examples[0]).backward()
    assert all(
        step.left.grad.abs().sum() > 0
        for name, step in model.named_modules()
        if isinstance(step, Composition)
    )
    rate.finish()
    assert artifact.save(model, tmp_path / "a.kit") <= 9000
    again = artifact.load(tmp_path / "a.kit", parts=tokenizer.parts)
    assert torch.equal(again(examples[0][0]), model(examples[0][0]))
    trainable = artifact.load(tmp_path / "a.kit", trainable=True, parts=tokenizer.parts)
    artifact.save(trainable, tmp_path / "b.kit")
    assert (tmp_path / "a.kit").read_bytes() == (tmp_path / "b.kit").read_bytes()


def test_bad_input(tokenizer, tmp_path):
    model = model_of(tokenizer)
    with pytest.raises(ValueError, match="no weight of ResNetBK has the 289 rows"):
        compose_tables(model, tokenizer.parts[:289], [batch(tokenizer)], next_token_loss)
    with pytest.raises(ValueError, match="got no batch: give at least one"):
        compose_tables(model, tokenizer.parts, [], next_token_loss)
    with pytest.raises(ValueError, match="parts must come before"):
        Composition(np.array([[-1, -1], [2, 0], [-1, -1]]), 4)
    compose_tables(model, tokenizer.parts, [batch(tokenizer)], next_token_loss)
    set_rate_formats(model, {"embedding.weight": torch.ones(tokenizer.vocab_size)}, 20000)
    artifact.save(model, tmp_path / "a.kit")
    with pytest.raises(artifact.ArtifactError, match="parts=tokenizer.parts"):
        artifact.load(tmp_path / "a.kit")
    with pytest.raises(artifact.ArtifactError, match="another tokenizer's merges"):
        artifact.load(tmp_path / "a.kit", parts=np.full_like(tokenizer.parts, -1))
