import pytest
import torch
import torch.nn.functional as F

from kit.models import bk_kernels
from kit.models.bk_core import causal_convolution


def draw(batch=2, steps=9, channels=5, taps=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, steps, channels), (channels, 1, taps), (channels,)
    return [
        torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes
    ]


def by_torch(x, weight, bias):
    padded = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    return F.conv1d(padded, weight, bias, groups=x.shape[2]).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 9, 5, 4), (1, 2, 3, 4), (3, 1, 1, 2), (2, 40, 130, 1)])
def test_values_and_gradients_are_those_of_conv1d(shape, dtype, monkeypatch):
    monkeypatch.setattr(bk_kernels, "GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    inputs = draw(*shape, dtype)
    weight = torch.randn(shape[:3], dtype=dtype, generator=torch.Generator().manual_seed(1))
    y, truth = causal_convolution(*inputs), by_torch(*inputs)
    torch.testing.assert_close(y, truth)
    gradients = torch.autograd.grad(y, inputs, weight)
    torch.testing.assert_close(gradients, torch.autograd.grad(truth, inputs, weight))


def test_strided_inputs_and_other_dtypes():
    x, weight, bias = draw()
    strided = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(causal_convolution(strided, weight, bias), by_torch(x, weight, bias))
    halves = [part.bfloat16() for part in (x, weight, bias)]
    assert causal_convolution(*halves).dtype == torch.bfloat16


def test_wrong_shapes_are_named():
    x, weight, bias = draw()
    with pytest.raises(ValueError, match=r"\(2, 5, 9\), \(5, 1, 4\), \(5,\): give \(B, N, D\)"):
        causal_convolution(x.transpose(1, 2), weight, bias)
