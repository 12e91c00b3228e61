"""Any order of the kit's public steps gives a model that files, packed layers, engines, copies and
resizing compute alike, to the last bit; or the step is refused in one sentence and changes nothing.

A few hundred sequences are tried here; `KIT_SEQUENCES=2000 python -m pytest tests/test_orders.py`
more.
"""

import copy
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import artifact
from kit.budget import row_sensitivity, set_rate_formats
from kit.core.weights import copy_model, materialize, weights
from kit.engines.kernels import int8_layer
from kit.models import build_model
from kit.pruning import MagnitudePruner, prune_bk_channels, prune_hidden_units, prune_unused_experts
from kit.pruning.structured import sort_hidden_units
from kit.quantization import Format, calibrate, quantize_bk_core, quantize_weights
from kit.quantization.gptq import gptq
from kit.quantization.hqq import hqq
from kit.quantization.integers import pack_layers
from kit.quantization.token_tables import compose_tables, order_rows
from kit.training.losses import next_token_loss

V = 64
PARTS = np.full((V, 2), -1, np.int32)
PARTS[32:] = np.arange(64).reshape(32, 2) // 2
COUNTS = np.random.default_rng(0).integers(1, 10000, V)
TOKENS = torch.randint(0, V, (2, 4, 17), generator=torch.Generator().manual_seed(0))
BATCHES = [(part[:, :-1], part[:, 1:]) for part in TOKENS]
SHAPE = dict(vocab_size=V, d_model=16, layers=1, d_ff=24, channels=6, experts=3)
MODELS = {}
for tied in (False, True):
    torch.manual_seed(0)
    MODELS[tied] = build_model("ResNetBK", {**SHAPE, "tied": tied}).eval()

FORMATS = st.builds(
    Format,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8, 16]),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel", "group", "rows"]),
    group_size=st.sampled_from([3, 8, 128]),
    range=st.sampled_from(["minmax", "percentile", "mse"]),
    scale=st.sampled_from(["float32", "float16", "log8"]),
) | st.just(Format("ternary", range="mse"))
PATTERNS = st.sampled_from(["*", "layers.*", "*.weight", "embedding.weight", "*.w_*"])
SHARES = st.sampled_from([0.0, 0.3, 0.7])


def masked(model, share, pattern):
    return MagnitudePruner(model, pattern).prune(share)


def rounded(model, format, pattern, learned):
    return quantize_weights(model, {pattern: format}, learned)


def rated(model, size):
    set_rate_formats(model, row_sensitivity(model, BATCHES, next_token_loss), size)
    return model


def composed(model):
    return compose_tables(model, PARTS, BATCHES, next_token_loss)


def ordered(model):
    return order_rows(model, COUNTS)


def fewer_experts(model, threshold):
    return prune_unused_experts(model, BATCHES, threshold)


def quantized_core(model):
    return calibrate(quantize_bk_core(model), BATCHES)


def repaired(model, format):
    return gptq(model, format, BATCHES)


def step(function, *arguments):
    return st.tuples(st.just(function), *arguments)


STEPS = st.one_of(
    step(masked, SHARES, PATTERNS),
    step(rounded, FORMATS | st.none(), PATTERNS, st.booleans()),
    step(composed),
    step(ordered),
    step(rated, st.sampled_from([600, 3000])),
    step(prune_hidden_units, SHARES),
    step(prune_bk_channels, SHARES),
    step(fewer_experts, st.sampled_from([0.0, 0.34])),
    step(sort_hidden_units),
    step(materialize),
    step(quantized_core),
    step(repaired, FORMATS),
    step(hqq, FORMATS),
)


def same(a, b):
    """To the last bit; NaN equals itself."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def outputs(model):
    with torch.no_grad():
        return model.eval()(BATCHES[0][0])


def built(tied, sequence):
    """The model after the steps; one that is refused must leave it as it was."""
    model = copy_model(MODELS[tied])
    for function, *arguments in sequence:
        before = outputs(model)
        try:
            model = function(model, *arguments)
        except ValueError as refusal:
            assert str(refusal) and "\n" not in str(refusal)
            assert same(outputs(model), before), refusal
    return model


@settings(max_examples=int(os.environ.get("KIT_SEQUENCES", 150)))
@given(st.booleans(), st.lists(STEPS, min_size=1, max_size=4))
def test_every_order_of_steps_is_computed_alike_everywhere(tmp_path_factory, tied, sequence):
    model, path = built(tied, sequence), tmp_path_factory.getbasetemp() / "orders.kit"
    expected = outputs(model)
    data = b"".join(artifact.file.serialized(model))
    path.write_bytes(data)
    assert same(outputs(artifact.load(path, parts=PARTS)), expected)
    trainable = artifact.load(path, trainable=True, parts=PARTS)
    assert same(outputs(trainable), expected)
    assert b"".join(artifact.file.serialized(trainable)) == data
    assert masks(trainable) == masks(model)
    assert same(outputs(pack_layers(model)), expected)
    assert same(outputs(artifact.load(path, parts=PARTS, packed=True)), expected)
    assert same(outputs(copy.deepcopy(model)), expected) and same(
        outputs(materialize(model)), expected
    )
    assert same(outputs(prune_hidden_units(model, 0.0)), expected)
    assert same(outputs(prune_bk_channels(model, 0.0)), expected)
    for layer in model.modules():
        within_its_bound(layer)


def masks(model):
    found = {w.name: [s for s in w.steps if s.kind == "mask"] for w in weights(model)}
    return {name: steps[0].mask.tolist() for name, steps in found.items() if steps}


def within_its_bound(layer):
    """An INT8 layer rounds its inputs to 255 steps of their range, and its weights are exact."""
    engine = int8_layer(layer)
    if not isinstance(engine, torch.nn.Module):  # the reason why it stays in floats
        return
    x = torch.randn(5, layer.weight.shape[1])
    with torch.no_grad():
        error = (engine(x) - layer(x)).abs()
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
        bound = step * layer.weight.abs().sum(1)  # half a step, and its zero point rounded
        assert (error <= bound + 1e-4 * (1 + bound)).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", [Format(8), Format(3, False, "group", 8)], ids=["8", "3"])
def test_the_pipelines_own_form_and_its_neighbours(tied, format, tmp_path):
    """What was 0.7 to 4 off (logits are about 2): quantized behind a composition, packed,
    resized."""
    for arrange in ((PARTS, COUNTS), (None, COUNTS), (PARTS, None)):
        model = copy_model(MODELS[tied])
        if arrange[0] is not None:
            compose_tables(model, PARTS, BATCHES, next_token_loss)
        if arrange[1] is not None:
            order_rows(model, COUNTS)
        quantize_weights(model, format)
        artifact.save(model, tmp_path / "a.kit")
        expected = outputs(model)
        assert same(outputs(artifact.load(tmp_path / "a.kit", parts=arrange[0])), expected)
        assert same(outputs(pack_layers(model)), expected)
        assert same(outputs(prune_hidden_units(model, 0.0)), expected)
