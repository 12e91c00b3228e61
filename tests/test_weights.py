"""What `Weight` refuses, in one sentence: steps that no file holds, a second step of one rank, and
parametrizations that are no steps."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from kit import artifact, quick_quantize
from kit.core.steps import STEPS, Step, register_step
from kit.core.weights import copy_model, materialize, weight_of, weights
from kit.pruning import MagnitudePruner
from kit.quantization import FakeQuantize, Format, quantize_weights
from kit.quantization.gptq import gptq


class Halved(Step):
    rank = 10

    def forward(self, x):
        return x / 2

    def encode(self, x, stored, write):
        return {}

    @classmethod
    def decode(cls, entry, read, weight, stored, parts):
        return cls(), None


@pytest.fixture
def halved(monkeypatch):
    monkeypatch.setattr(Halved, "kind", "halved", raising=False)
    monkeypatch.setitem(STEPS, "halved", Halved)
    return Halved


def test_a_step_that_no_file_can_hold_is_refused_when_it_is_put_on(monkeypatch, halved):
    weight = weight_of(nn.Linear(3, 2))
    value = weight.value.clone()

    class Unnamed(Halved):  # inherits the name of another class
        pass

    for present, message in ((Unnamed, "Unnamed has no name"), (Halved, "give it a.* decode")):
        monkeypatch.setattr(Halved, "decode", Step.decode)
        with pytest.raises(ValueError, match=message):
            weight.put(present())
        assert weight.steps == [] and torch.equal(weight.value, value)


def test_a_name_in_files_has_one_class():
    with pytest.raises(ValueError, match="'mask' are of kit.pruning.mask: choose another"):
        register_step("mask")(Halved)
    assert "kind" not in vars(Halved)
    assert register_step("mask")(STEPS["mask"]) is STEPS["mask"]  # the same cell, run again


def test_a_step_of_the_same_rank_is_replaced_only_by_its_own_class(halved):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    weight = weight_of(model[1])
    weight.put(Halved())
    weight.put(second := Halved())
    assert weight.steps == [second]
    with pytest.raises(ValueError, match=r"carries a Halved.*call drop\(Halved\) first"):
        quantize_weights(model, Format(8))
    assert weight_of(model[0]).steps == []  # untouched: the first layer would have taken it
    weight.drop(Halved)
    quantize_weights(model, Format(8))
    with pytest.raises(ValueError, match=r"call drop\(FakeQuantize\) first"):
        weight.put(Halved())
    assert isinstance(weight.steps[0], FakeQuantize)


def test_a_file_with_an_unknown_step_says_what_to_import(halved, monkeypatch, tmp_path):
    layer = nn.Linear(3, 2)
    monkeypatch.setattr(Halved, "projection", True)
    weight_of(layer).put(Halved())
    artifact.save(layer, tmp_path / "halved.kit")
    monkeypatch.delitem(STEPS, "halved")
    with pytest.raises(artifact.ArtifactError, match="no step 'halved'.*import the file"):
        artifact.load(tmp_path / "halved.kit", nn.Linear(3, 2))


def test_vectors_that_are_shaped_to_be_broadcast_are_no_matrices():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, 8))
            self.scale = nn.Parameter(torch.ones(3, 1, 1))
            self.places = nn.Parameter(torch.ones(1, 5, 8))
            self.old = nn.utils.weight_norm(nn.Conv1d(4, 6, 3))
            self.one, self.narrow = nn.Linear(8, 1), nn.Linear(1, 8)
            self.recurrent = nn.LSTM(1, 2)

    found = [weight.name for weight in weights(Block(), matrices=True)]
    layers = ["old.weight_v", "one.weight", "narrow.weight"]
    recurrent = ["recurrent.weight_hh_l0", "recurrent.weight_ih_l0"]
    assert found == ["places", *layers, *recurrent]
    model = MagnitudePruner(Block()).prune(0.5)
    assert (model.old.weight_g != 0).all() and (model.old.weight_v == 0).sum() == 36


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_that_are_no_steps_are_refused_and_materialize_makes_them_plain(
    norm, tmp_path
):
    torch.manual_seed(0)
    layer = getattr(parametrizations, norm)(nn.Linear(6, 6))
    model, x = nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 2)).eval(), torch.randn(5, 6)
    outputs = model(x)
    for refused in (
        lambda: weights(model),
        lambda: artifact.save(model, tmp_path / "no.kit"),
        lambda: MagnitudePruner(model),
        lambda: quantize_weights(model, Format(8)),
        lambda: weight_of(layer).select(lambda tensor: tensor[:2]),
    ):
        with pytest.raises(ValueError, match=r"'weight' of a (\w*)Linear.*materialize"):
            refused()
    assert torch.equal(model(x), outputs)
    plain = materialize(model)
    assert torch.equal(plain(x), outputs)
    artifact.save(MagnitudePruner(plain).prune(0.5), tmp_path / "plain.kit")
    again = artifact.load(tmp_path / "plain.kit", materialize(model))
    assert torch.equal(again(x), plain(x)) and (again[0].weight == 0).sum() == 18
    assert torch.allclose(quick_quantize(model, backend="torch-int8")(x), outputs, atol=0.1)


def test_a_layer_with_sparse_gradients_is_trained_with_dense_ones_under_steps():
    for make in (nn.Embedding, nn.EmbeddingBag):
        layer, tokens = make(20, 4, sparse=True), torch.randint(0, 20, (3, 5))
        dense = make(20, 4, _weight=layer.weight.detach().clone())
        grads = []
        for model in (nn.Sequential(layer), nn.Sequential(dense)):
            quantize_weights(MagnitudePruner(model).prune(0.5), Format(8))
            model(tokens).square().sum().backward()
            grads.append(weight_of(model[0]).original.grad)
        assert not grads[0].is_sparse and torch.equal(*grads)


def test_gptq_refuses_what_it_cannot_see_through(monkeypatch):
    @register_step("doubled")
    class Doubled(Halved):
        rank = 15

        @classmethod
        def decode(cls, entry, read, weight, stored, parts):
            return cls(), None

    try:
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(9, 4)
        weight_of(model[0]).put(Doubled())
        before = copy_model(model)
        with pytest.raises(ValueError, match="'0.weight' carries a doubled step.*leave it out"):
            gptq(model, Format(4), [x])
        assert torch.equal(model(x), before(x))
        assert len(gptq(model, {"1.*": Format(2)}, [x])[1].weight[0].unique()) <= 4
    finally:
        del STEPS["doubled"]
