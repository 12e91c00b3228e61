"""Other people's models lose channels, neurons and heads, or stay as they are."""

import pytest
import torch
from torch import nn

from kit import artifact
from kit.core.protocols import call_with
from kit.models import build_model
from kit.pruning import prune_channels, prune_layers
from kit.pruning.units import Verifier, families

IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Reordered(nn.Module):
    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.second(self.order(self.first(x).relu()))


def shuffled(x):
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("order", [lambda x: x.flip(1), lambda x: x.roll(3, 1), shuffled])
def test_reordered_channels_are_cut_rightly_or_not_at_all(order):
    model = Reordered(order)
    dead = torch.tensor([0, 1, 4, 6])
    with torch.no_grad():
        model.first.weight[dead], model.first.bias[dead] = 0, 0
        model.first.weight.mul_(9)
    try:
        small = prune_channels(model, IMAGES, 0.5, importance="l1", layers="first")
    except ValueError as error:
        assert "nothing can go" in str(error)
    else:
        torch.testing.assert_close(small(IMAGES), model(IMAGES))


def test_a_wrong_family_is_not_verified():
    call, model = call_with(IMAGES), Reordered(lambda x: x.flip(1))
    (family,) = families(model, call, ["first"])
    family.gone = [0, 1]
    assert Verifier(model, call).holds([family])
    for member in family.members:
        member["second", 1] = member["first", 0]
    assert not Verifier(model, call).holds([family])


def test_frozen_and_tied_models_stay_frozen_and_tied():
    embedding, inner = nn.Embedding(40, 16), nn.Linear(16, 16)
    head = nn.Linear(16, 40, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, inner, nn.ReLU(), head).requires_grad_(False)
    small = prune_channels(model, IDS, 0.5)
    assert small[0].weight is small[3].weight and small[0].weight.shape == (40, 8)
    assert small[0].embedding_dim == small[1].in_features == small[3].in_features == 8
    assert not any(p.requires_grad for p in small.parameters()) and small.uncut == ["3"]


SHAPES = dict(
    vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=10
)


def test_heads_and_neurons_of_llama_go_and_its_config_follows():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SHAPES, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    small = prune_channels(model, {"input_ids": IDS}, 0.5)
    assert small.config.num_attention_heads == 2 and small.config.num_key_value_heads == 1
    assert small.config.intermediate_size == 5 and model.config.intermediate_size == 10
    again = transformers.LlamaForCausalLM(small.config).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(IDS).logits, small(IDS).logits)
    assert small.generate(IDS, max_new_tokens=2, pad_token_id=0).shape == (2, 9)


def test_heads_of_a_fused_gpt2_go_whole():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=24, n_layer=1, n_head=4, n_positions=12)
    small = prune_channels(transformers.GPT2LMHeadModel(config).eval(), {"input_ids": IDS}, 0.5)
    block = small.transformer.h[0]
    assert block.attn.c_attn.weight.shape == (24, 36) and block.attn.c_proj.weight.shape == (12, 24)
    assert block.mlp.c_fc.weight.shape == (24, 48) and small.config.n_inner == 48


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        nn.init.normal_(self.inner[2].weight, std=size)

    def forward(self, x):
        return x + self.inner(x)


def test_the_layers_that_change_least_go():
    torch.manual_seed(0)
    blocks = nn.ModuleList(Residual(size) for size in (1.0, 0.01, 2.0, 0.1))
    heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])  # a list, but no stack
    model, x = Stacked(blocks, heads).eval(), torch.randn(32, 8)
    small = prune_layers(model, [x[:16], (x[16:], None)], 0.5)
    assert small.removed == ["blocks.1", "blocks.3"] and len(model.blocks) == 4
    expected = model.heads[0](blocks[2](blocks[0](x)))
    assert torch.equal(small(x)[0], expected) and len(small.heads) == 2
    assert len(prune_layers(model, [x], 0.99).blocks) == 1
    with pytest.raises(ValueError, match="has no stack of which 10% of the layers can go"):
        prune_layers(model, [x], 0.1)
    with pytest.raises(ValueError, match="at least one batch"):
        prune_layers(model, [], 0.5)


class Stacked(nn.Module):
    def __init__(self, blocks, heads):
        super().__init__()
        self.blocks, self.heads = blocks, heads

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads[0](x), self.heads[1](x)


def test_layers_of_the_kits_own_models_go_and_their_files_say_so(tmp_path):
    shape = {"vocab_size": 40, "d_model": 16, "layers": 3, "d_ff": 24, "channels": 8}
    model = build_model("ResNetBK", shape).eval()
    small = prune_layers(model, [IDS], 0.4)
    assert small.config.layers == 2 and model.config.layers == 3
    artifact.save(small, tmp_path / "a.kit")
    assert torch.equal(artifact.load(tmp_path / "a.kit")(IDS), small(IDS))
