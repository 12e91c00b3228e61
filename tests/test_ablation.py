import re
import types
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kit import artifact
from kit.budget import row_sensitivity, set_rate_formats
from kit.core.weights import weights
from kit.models import ResNetBK, ResNetBKConfig
from kit.quantization.fake import FakeQuantize
from kit.training.losses import training_loss
from notebooks.reference import ablation
from notebooks.reference.ablation import Average, Chosen, Looped, Mixed, Muon, orthogonal

SMALL = {"vocab_size": 50, "d_model": 32, "experts": 2, "d_ff": 32, "channels": 16, "tied": True}


def test_orthogonal_keeps_the_singular_vectors():
    torch.manual_seed(0)
    x = torch.randn(3, 24, 40)
    for matrix in (x, x.mT):
        u, s, v = torch.linalg.svd(orthogonal(matrix, 12), full_matrices=False)
        assert (s > 0.6).all() and (s < 1.3).all()
        one, _, two = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(u @ v, one @ two, atol=2e-3, rtol=0)


def test_muon_moves_matrices_of_the_body_as_far_as_adam_would_and_the_rest_as_adam_does():
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(layers=1, **SMALL))
    before = {w.name: w.original.detach().clone() for w in weights(model)}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for rows in (False, True):
        optimizer = Muon.on(model, rows)(model.parameters(), lr=0.01, weight_decay=0.0)
        assert len(optimizer.matrices) == 5  # input, gate, output, two of the experts
        optimizer.step()
        for weight in weights(model):
            moved = (weight.original.detach() - before[weight.name]).square().mean().sqrt()
            usual = 0.2 * 0.01 if weight.original in optimizer.matrices else 0.01
            assert 0.6 * usual < moved < 1.4 * usual, weight.name
            weight.assign(before[weight.name])
            weight.original.grad = torch.randn_like(weight.original)


def test_a_looped_body_is_its_layers_twice():
    torch.manual_seed(0)
    model = Looped(ResNetBKConfig(layers=2, **SMALL)).eval()
    twice = ResNetBK(ResNetBKConfig(layers=4, **SMALL)).eval()
    twice.layers = nn.ModuleList([*model.layers, *model.layers])
    for name in ("embedding", "norm"):
        setattr(twice, name, getattr(model, name))
    tokens = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(model(tokens), twice(tokens))


def test_the_average_is_of_the_last_steps():
    model = nn.Linear(1, 1, bias=False)
    average = Average(model)
    for step in range(1, 101):
        model.weight.data.fill_(step)
        average(step, 100, model)
    average.take()
    torch.testing.assert_close(model.weight.item(), 93.0)  # of 86 to 100


def test_chosen_codes_move_a_step_towards_zero_until_the_file_fits():
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(layers=1, **SMALL)).eval()
    batches, loss = [torch.randint(0, 50, (2, 4, 9)).unbind()], training_loss(model)
    set_rate_formats(model, row_sensitivity(model, batches, loss), 4000)
    size = artifact.nbytes(model)
    chosen = Chosen(loss, model, size - 300, batches)

    def codes():
        steps = [(w, w.find(FakeQuantize)) for w in weights(model)]
        steps = [(w, s) for w, s in steps if s.learned]
        return torch.cat([s.codes(w.before(s.rank))[0].flatten().float() for w, s in steps])

    before = codes()
    chosen.finish()
    after = codes()
    moved = after != before
    assert size - 320 <= artifact.nbytes(model) <= size - 300
    assert torch.equal(after[moved], (before - before.sign())[moved])
    assert 10 < moved.sum() < len(before) / 2


@given(st.text(alphabet="aZé Q.'\n1", max_size=60))
def test_words_without_capitals_come_back(text):
    lowered = ablation.lower(text)
    assert ablation.capitals(lowered) == text
    assert not re.search(r"(?<![A-Za-z])[A-Z]+(?![A-Za-z])", lowered)


def test_words_lose_their_capitals_after_a_mark_before_their_space():
    text = "The API, a DataFrame and I."
    assert ablation.lower(text) == "\x01the\x02 api, a DataFrame and\x01 i."
    with pytest.raises(ValueError, match="which mark capitals"):
        ablation.lower("a\x01b")


def test_mixed_shows_each_written_window_once_in_the_second_half():
    windows, seen = torch.arange(6 * 4).view(6, 4), []
    mixed = Mixed(lambda model, batch: seen.append(batch), windows, 0.5)
    own = torch.full((4, 3), -1), torch.full((4, 3), -2)
    for step in range(6):  # each call comes after the hook of the step before it
        mixed(None, own)
        mixed.step(step + 1, 6, None)
    for inputs, targets in seen[:3]:
        assert (inputs == -1).all() and (targets == -2).all()
    shown = torch.cat([inputs[2:] for inputs, _ in seen[3:]])
    assert sorted(shown[:, 0].tolist()) == windows[:, 0].tolist()
    for inputs, targets in seen[3:]:
        assert (inputs[:2] == -1).all() and torch.equal(inputs[2:, 1:], targets[2:, :-1])


def test_a_model_continues_what_it_is_given():
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(layers=1, **SMALL)).eval()
    train = np.arange(40, dtype=np.int32)
    corpus = types.SimpleNamespace(train=train)
    with patch.object(ablation, "LENGTH", 12), patch.object(ablation, "STEPS", 8):
        text = ablation.written(model, corpus, 0, prompt=5)
        again = ablation.written(model, corpus, 0, prompt=5)
    assert text.shape == (8, 13) and torch.equal(text, again)
    assert (text[:, 1:5] - text[:, :4] == 1).all() and text.max() < 50
