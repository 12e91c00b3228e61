import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from kit.models import (
    MODELS,
    DigitsCNN,
    DigitsCNNConfig,
    DigitsMLP,
    LSTMLMConfig,
    ResNetBK,
    ResNetBKConfig,
    TransformerLMConfig,
    build_model,
    parameter_count,
)
from kit.training.losses import next_token_loss

SMALL = {"vocab_size": 50, "d_model": 16}
CONFIGS = {
    "ResNetBK": ResNetBKConfig(**SMALL, layers=2, d_ff=24, channels=8),
    "top-2": ResNetBKConfig(**SMALL, layers=2, d_ff=24, channels=8, top_k=2),
    "tied": ResNetBKConfig(**SMALL, layers=1, d_ff=24, channels=8, tied=True),
    "factored": ResNetBKConfig(**SMALL, layers=1, d_ff=24, channels=8, embedding_rank=5),
    "tied, factored": ResNetBKConfig(
        **SMALL, layers=1, d_ff=24, channels=8, embedding_rank=5, tied=True
    ),
    "pruned": ResNetBKConfig(**SMALL, layers=2, experts=(3, 1), d_ff=(24, 9), channels=(8, 3)),
    "LSTM": LSTMLMConfig(**SMALL, hidden=12),
    "Transformer": TransformerLMConfig(**SMALL, layers=2, d_ff=32),
}
CLASSES = {config: model for model, config in MODELS.values()}
every_language_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make(config):
    torch.manual_seed(0)
    return CLASSES[type(config)](config)


def tokens(length=20):
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))


@every_language_model
def test_interface(config):
    model = make(config).eval()
    weight, bias = model.output()
    hidden, logits = model.hidden(tokens()), model(tokens())
    assert hidden.shape == (2, 20, 16) and weight.shape == (50, 16) and bias.shape == (50,)
    assert logits.shape == (2, 20, 50)
    torch.testing.assert_close(F.linear(hidden, weight, bias), logits)
    assert model.auxiliary_loss().shape == ()


@every_language_model
def test_causal(config):
    """Changing one token changes no logit before it, and changes its own."""
    model = make(config).eval()
    before = model(tokens())
    changed = tokens()
    changed[:, 12] = (changed[:, 12] + 7) % 50
    after = model(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12])
    assert (after[:, 12] - before[:, 12]).abs().max() > 1e-3


@every_language_model
def test_a_longer_text_begins_like_a_shorter_one(config):
    model = make(config).eval()
    torch.testing.assert_close(model(tokens())[:, :9], model(tokens()[:, :9]))


def test_remembers_beyond_the_convolution():
    model = make(CONFIGS["ResNetBK"]).eval()
    changed = tokens(60)
    changed[:, 0] = (changed[:, 0] + 7) % 50
    moved = (model.hidden(changed) - model.hidden(tokens(60))).abs().amax((0, 2))
    assert (moved[7:30] > 0).all() and moved[20] > 1e-6  # two layers of four taps reach six tokens


@every_language_model
def test_every_parameter_learns(config):
    model = make(config)
    everything = torch.arange(50).reshape(2, 25)
    next_token_loss(model, (everything, everything.flip(1))).backward()
    silent = {
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    }
    lonely = {
        "layers.1.moe.router.weight",
        "layers.1.moe.router.bias",
    }  # one expert: nothing to choose
    assert silent == (lonely if config == CONFIGS["pruned"] else set())


@every_language_model
def test_rebuilt_from_name_and_json(config):
    model = make(config).eval()
    described = json.loads(json.dumps(dataclasses.asdict(config)))
    twin = build_model(type(model).__name__, described).eval()
    assert twin.config == config
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(tokens()), model(tokens()))


@every_language_model
def test_copied_after_a_forward(config):
    model = make(config)
    model(tokens())
    copy.deepcopy(model)


def test_reference_size():
    """The reference language model: 4.15 million parameters within 3 %."""
    with torch.device("meta"):
        model = ResNetBK(
            ResNetBKConfig(vocab_size=30000, d_model=64, layers=4, experts=4, d_ff=128)
        )
    assert abs(parameter_count(model) / 4.15e6 - 1) < 0.03


def test_mixture_losses_are_summed():
    model = make(CONFIGS["ResNetBK"])
    model(tokens())
    assert model.auxiliary_loss() == sum(layer.moe.balance_loss for layer in model.layers)
    assert make(CONFIGS["LSTM"]).auxiliary_loss() == 0


def test_tied_model_has_one_matrix():
    model = make(CONFIGS["tied"])
    assert model.output()[0] is model.embedding.weight and model.output()[1] is model.output_bias
    names = {name for name, p in model.named_parameters() if 50 in p.shape}
    assert names == {"embedding.weight", "output_bias"}


def test_quantizers_see_potential_and_resolvent():
    model, seen = make(CONFIGS["ResNetBK"]), {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: output})

    mixer = model.layers[0].mixer
    mixer.quantize_v.register_forward_hook(keep("v"))
    mixer.quantize_g.register_forward_hook(keep("g"))
    before = model(tokens())
    assert seen["v"].shape == seen["g"].shape == (2, 20, 8)
    assert seen["v"].dtype == torch.float32 and seen["g"].dtype == torch.complex64
    assert (seen["g"].abs() < 1).all()
    mixer.quantize_g = torch.nn.Dropout(1.0)
    assert not torch.allclose(model(tokens()), before)


def test_each_weight_is_read_once_a_forward():
    model, reads = make(CONFIGS["top-2"]), []

    class Count(torch.nn.Module):
        def forward(self, weight):
            reads.append(1)
            return weight

    for module, name in [
        (m, n) for m in model.modules() for n, _ in m.named_parameters(recurse=False)
    ]:
        torch.nn.utils.parametrize.register_parametrization(module, name, Count())
    reads.clear()
    model(tokens())
    assert len(reads) == sum(1 for _ in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_exported_program_agrees():
    model = make(dataclasses.replace(CONFIGS["top-2"], layers=1)).eval()
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(model, (tokens(),), dynamic_shapes=({1: length},)).module()
    torch.testing.assert_close(program(tokens(33)), model(tokens(33)))


@pytest.mark.parametrize("name", ["DigitsCNN", "DigitsMLP"])
def test_digit_classifiers(name):
    model = build_model(name, {})
    images = torch.rand(5, 1, 8, 8)
    logits = model(images)
    assert logits.shape == (5, 10)
    logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    twin = build_model(name, json.loads(json.dumps(dataclasses.asdict(model.config))))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(images), model.eval()(images))


def test_cnn_has_batch_norm_to_fold():
    norms = [
        m
        for m in DigitsCNN(DigitsCNNConfig(channels=(4, 6, 8))).modules()
        if isinstance(m, torch.nn.BatchNorm2d)
    ]
    assert [norm.num_features for norm in norms] == [4, 6, 8]
    assert parameter_count(DigitsMLP()) == 64 * 65 + 64 * 65 + 10 * 65


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("GPT", {}, "unknown model 'GPT': choose one of ResNetBK, LSTMLM"),
        ("ResNetBK", {"d_modell": 3}, "ResNetBKConfig has no field d_modell"),
        ("ResNetBK", {"layers": 0}, "layers is 0; it must be a whole number from 1"),
        (
            "ResNetBK",
            {"channels": [3, 0, 4, 4]},
            "channels is .*a tuple of which each is a whole number from 1",
        ),
        ("ResNetBK", {"experts": [3, 2]}, r"experts = \(3, 2\) has 2 entries for 4 layers"),
        (
            "ResNetBK",
            {"experts": [3, 2, 1, 3], "top_k": 2},
            "top_k = 2 must be between 1 and the number of experts",
        ),
        ("ResNetBK", {"dropout": 1.0}, "dropout is 1.0; it must be a number from 0 and below 1"),
        (
            "ResNetBK",
            {"embedding_rank": 0},
            "embedding_rank is 0; it must be a whole number from 1 to 1,000,000,000 or None",
        ),
        (
            "TransformerLM",
            {"d_model": 64, "heads": 5},
            "d_model = 64 must be a multiple of twice .* heads, 5",
        ),
        ("LSTMLM", {"hidden": -1}, "hidden is -1; it must be"),
        ("DigitsCNN", {"channels": [0]}, "channels is .0.; it must be a tuple"),
    ],
)
def test_bad_settings(name, config, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, config)
