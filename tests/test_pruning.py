import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from kit.pruning.mask import Mask, copy_model, get_mask, remove_masks, select, set_mask


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2 + 1


@pytest.mark.parametrize("module, name, example", [
    (nn.Linear(5, 4), "weight", torch.randn(2, 5)),
    (nn.Embedding(6, 3), "weight", torch.tensor([0, 5])),
    (nn.Conv2d(2, 3, 3), "weight", torch.randn(1, 2, 5, 5)),
    (nn.LSTM(4, 3), "weight_ih_l0", torch.randn(2, 1, 4)),
    (nn.LSTM(4, 3), "weight_hh_l0", torch.randn(2, 1, 4)),
])
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


def test_mask_stands_before_other_parametrizations_and_is_updated_in_place():
    linear = nn.Linear(3, 2)
    weight = linear.weight.detach().clone()
    parametrize.register_parametrization(linear, "weight", Double())
    set_mask(linear, "weight", torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(linear.weight, torch.ones(2, 3))
    set_mask(linear, "weight", torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(linear.weight, weight * 2 + 1)
    assert [type(step) for step in linear.parametrizations.weight] == [Mask, Double]
    remove_masks(linear)
    assert torch.equal(linear.weight, weight * 2 + 1)


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
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embedding"].weight
    return model


def test_tied_tensors_are_one_slot_and_stay_tied():
    model = tied_model()
    slots = select(model)
    assert list(slots) == ["embedding.weight"] and list(select(model, "head.*")) == ["embedding.weight"]
    slots["embedding.weight"].set_mask(torch.rand(7, 4) > 0.5)
    assert torch.equal(model["embedding"].weight, model["head"].weight)
    assert (model["head"].weight == 0).any()
    assert list(select(model)) == ["embedding.weight"]
    assert slots["embedding.weight"].parameter is model["head"].parametrizations.weight.original


def test_bad_masks_and_names_are_refused_with_the_alternatives():
    model = tied_model()
    with pytest.raises(ValueError, match="bool of shape"):
        set_mask(model["head"], "weight", torch.ones(7, 4))
    with pytest.raises(ValueError, match="no tensor 'wight'"):
        set_mask(model["head"], "wight", torch.ones(7, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"no tensor matches 'heads\*'; there are head.weight"):
        select(model, "heads*")
    assert not parametrize.is_parametrized(model["head"])
