import numpy as np
import pandas as pd
import pytest
import torch

from kit.models import build_model, parameter_count
from notebooks.reference.benchmarks import (
    MIXING,
    Attention,
    crossing,
    equal_shape,
    forward_backward,
    mixing_seconds,
)


@pytest.mark.parametrize("name, field", [("LSTMLM", "hidden"), ("TransformerLM", "d_ff")])
def test_equal_shape_is_the_nearest(name, field):
    target = parameter_count(build_model("ResNetBK", dict(vocab_size=300, d_model=32)))
    shape = equal_shape(name, target, field, vocab_size=300, d_model=32)
    sizes = [
        parameter_count(build_model(name, {**shape, field: shape[field] + by})) for by in (-1, 0, 1)
    ]
    assert abs(sizes[1] - target) <= min(abs(sizes[0] - target), abs(sizes[2] - target))
    assert abs(sizes[1] / target - 1) <= 0.03


def test_equal_shape_says_when_there_is_none():
    with pytest.raises(ValueError, match="No hidden gives LSTMLM 10 parameters"):
        equal_shape("LSTMLM", 10, "hidden", vocab_size=50)


def test_attention_is_causal_and_forward_backward_gives_all_gradients():
    torch.manual_seed(0)
    layer, x = Attention(8, 2), torch.randn(1, 6, 8, requires_grad=True)
    changed = x.detach().clone()
    changed[0, 4] += 1
    torch.testing.assert_close(layer(x)[:, :4], layer(changed)[:, :4])
    gradients = forward_backward(layer, [x], layer.parameters())()
    assert [g.shape for g in gradients] == [x.shape, *(p.shape for p in layer.parameters())]


def test_crossing_is_exact_for_power_laws():
    lengths = np.array([32, 128, 512])
    seconds = pd.DataFrame({"linear": lengths * 3.0, "square": lengths**2 / 30.0}, index=lengths)
    assert crossing(seconds, "linear", "square") == pytest.approx(90)
    assert crossing(seconds, "square", "linear") is None
    assert crossing(seconds.loc[128:], "linear", "square") == 0


def test_every_mixing_is_measured_at_every_length():
    table = mixing_seconds([8, 16], 32, d_model=8, channels=4, heads=2, seconds=0)
    assert (
        list(table.columns) == list(MIXING)
        and list(table.index) == [8, 16]
        and (table > 0).all(axis=None)
    )
