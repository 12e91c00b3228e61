"""INT8 layers on torch's own integer kernels: oneDNN where torch has it, else `torch._int_mm`.

Weights are int8 with a scale a row; inputs are rounded to uint8, in a calibrated range or in the
batch's. The product is exact int32: y = s_x s_w (q_x - z_x) q_w + b (Jacob et al. 2018,
arXiv:1712.05877, eq. 4).
"""

import platform

import torch
from torch import Tensor, nn

from kit.core.weights import class_of, is_plain, weight_of
from kit.engines.folding import fold_batch_norms
from kit.engines.layers import IntegerWeight, float_copy, integer_weight

# Without VNNI, x86 adds pairs of uint8 x int8 products in int16, which saturates.
SATURATES = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported()
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
ONEDNN = HAS_ONEDNN and not SATURATES
FLOAT_OUTPUT = (1.0, 0, torch.float32, "none", [], "")  # scale, zero point; no operation follows


def quantize_batch(x: Tensor, qparams: tuple[float, int] | None) -> tuple[Tensor, float, int]:
    """x as uint8 codes, scale and zero point: those of `qparams`, or of x's own range and 0."""
    if qparams is None:
        low, high = (bound.item() for bound in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-30)
        qparams = scale, min(max(round(-low / scale), 0), 255)
    scale, zero = qparams
    return (x * (1 / scale)).round_().add_(zero).clamp_(0, 255).to(torch.uint8), scale, zero


class _Integer(nn.Module):
    """Codes and scales of a weight; `weight` is for other code that reads it."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__()
        self.register_buffer("codes", weight.view.tensor(weight.codes))
        self.register_buffer("scale", weight.scale[:, 0].contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.input_qparams = weight.input_qparams
        self.zeros = torch.zeros(len(self.codes), dtype=torch.int64)
        self.packed = None  # the codes in oneDNN's order, made at the first call

    def __getstate__(self):
        return {**self.__dict__, "packed": None}

    @property
    def weight(self) -> Tensor:
        return self.codes * self.scale.reshape(-1, *[1] * (self.codes.ndim - 1))


class Int8Linear(_Integer):
    """F.linear with an int8 weight: inputs (..., K) float32 -> (..., N) float32."""

    def forward(self, input: Tensor) -> Tensor:
        q, scale, zero = quantize_batch(input.reshape(-1, input.shape[-1]), self.input_qparams)
        y = self._onednn(q, scale, zero) if ONEDNN else self._int_mm(q, scale, zero)
        return y.reshape(*input.shape[:-1], len(self.codes))

    def _onednn(self, q: Tensor, scale: float, zero: int) -> Tensor:
        if self.packed is None:
            self.packed = torch.ops.onednn.qlinear_prepack(self.codes, None)
        inputs = q, scale, zero, self.packed, self.scale, self.zeros, self.bias
        return torch.ops.onednn.qlinear_pointwise(*inputs, *FLOAT_OUTPUT)

    def _int_mm(self, q: Tensor, scale: float, zero: int) -> Tensor:
        signed = (q.to(torch.int16) - 128).to(torch.int8)
        shift = (128 - zero) * self.codes.sum(1, dtype=torch.int32)
        y = (torch._int_mm(signed, self.codes.t()) + shift).float() * (self.scale * scale)
        return y if self.bias is None else y + self.bias


class Int8Conv2d(_Integer):
    """F.conv2d with an int8 weight: (B, C, H, W) -> (B, C', H', W'), float32; needs oneDNN."""

    def __init__(self, layer: nn.Conv2d, weight: IntegerWeight):
        super().__init__(weight, layer.bias)
        self.geometry = [*map(list, (layer.stride, layer.padding, layer.dilation)), layer.groups]

    def forward(self, input: Tensor) -> Tensor:
        q, scale, zero = quantize_batch(input, self.input_qparams)
        if self.packed is None:
            prepack = torch.ops.onednn.qconv_prepack
            self.packed = prepack(self.codes, self.scale, 1.0, 0, *self.geometry, None)
        inputs = q, scale, zero, self.packed, self.scale, self.zeros, self.bias
        return torch.ops.onednn.qconv_pointwise(*inputs, *self.geometry, *FLOAT_OUTPUT)


@torch.no_grad()
def int8_layer(layer: nn.Module, floats: nn.Module | None = None) -> nn.Module | str:
    """The integer layer in place of an nn.Linear or nn.Conv2d with codes, or why there is none.

    floats: the layer in floats, with a batch norm folded into it or not.
    """
    floats = float_copy(layer) if floats is None else floats  # without the hooks that round inputs
    kind = next((kind for kind in (nn.Linear, nn.Conv2d) if is_plain(floats, kind)), None)
    if kind is None:
        return f"a {class_of(layer).__name__} of its own, or with hooks"
    weight = integer_weight(weight_of(layer)) if hasattr(layer, "weight") else None
    if weight is None or not weight.per_row:
        return "no integer codes with a scale a row"
    weight = weight.as_found(weight.view.matrix(floats.weight))
    if weight is None:
        return "computed with other values than its codes"
    if kind is nn.Linear:
        return Int8Linear(weight, floats.bias)
    if not ONEDNN or floats.padding_mode != "zeros" or isinstance(floats.padding, str):
        return "no integer kernel for this padding, or this processor"
    return Int8Conv2d(floats, weight)


def int8_model(model: nn.Module) -> nn.Module:
    """A copy of a quantized model with integer layers where there are kernels, float32 elsewhere.

    Its `kept` says why layers of these kinds (and of classes made of them) are computed in floats.
    Raises ValueError if no layer can be replaced.
    """
    copy, made, kept = fold_batch_norms(float_copy(model)), {}, {}
    for name, floats in list(copy.named_modules(remove_duplicate=False)):
        if not isinstance(floats, (nn.Linear, nn.Conv2d)):
            continue
        if floats not in made:
            made[floats] = int8_layer(model.get_submodule(name), floats)
        if isinstance(made[floats], str):
            kept[name] = made[floats]
        elif name:
            copy.set_submodule(name, made[floats])
        else:
            copy = made[floats]
    if len(kept) == len(made):
        why = "".join(f"; {name or 'it'}: {why}" for name, why in kept.items())
        raise ValueError(f"{type(model).__name__} has no Linear or Conv2d for INT8 kernels{why}")
    copy.kept = kept
    return copy.eval()
