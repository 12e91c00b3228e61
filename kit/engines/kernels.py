"""INT8 layers on torch's own integer kernels: oneDNN where torch has it, else `torch._int_mm`.

Weights are int8 with a scale a row; inputs are rounded to uint8, with a calibrated range or that of the batch. The
product is exact int32: y = s_x s_w (q_x - z_x) q_w + b (Jacob et al. 2018, arXiv:1712.05877, eq. 4).
"""

import platform
import warnings

import torch
from torch import Tensor, nn

from kit.engines.folding import batch_norm_pairs, scale_and_shift
from kit.engines.layers import IntegerWeight, float_copy, integer_weight

# Without VNNI, x86 adds pairs of uint8 x int8 products in int16, which saturates: oneDNN's integer products are wrong there.
SATURATES = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported()
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise") and not SATURATES
FLOAT_OUTPUT = (1.0, 0, torch.float32, "none", [], "")  # scale, zero point, dtype; nothing computed behind it


def quantize_batch(x: Tensor, grid: tuple[float, int] | None) -> tuple[Tensor, float, int]:
    """x as uint8 codes of its shape, with scale and zero point: `grid`, or those of its range, 0 included."""
    if grid is None:
        low, high = (bound.item() for bound in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-30)
        grid = scale, min(max(round(-low / scale), 0), 255)
    scale, zero = grid
    return (x * (1 / scale)).round_().add_(zero).clamp_(0, 255).to(torch.uint8), scale, zero


class _Integer(nn.Module):
    """Codes and scales of a weight; `weight` is for code that reads it, as nn.MultiheadAttention does."""

    def __init__(self, codes: Tensor, weight: IntegerWeight, bias: Tensor | None):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", weight.scale[:, 0].contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.input_grid = weight.input_grid
        self.zeros = torch.zeros(len(codes), dtype=torch.int64)
        self.packed = None  # the codes in oneDNN's order, made at the first call

    def __getstate__(self):
        return {**self.__dict__, "packed": None}

    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """From now on returns scale y + shift, both (rows,)."""
        sign = scale.sign().to(torch.int8).reshape(-1, *[1] * (self.codes.ndim - 1))
        self.codes, self.scale, self.packed = self.codes * sign, self.scale * scale.abs(), None
        self.bias = shift if self.bias is None else self.bias * scale + shift

    @property
    def weight(self) -> Tensor:
        return self.codes.float() * self.scale.reshape(-1, *[1] * (self.codes.ndim - 1))


class Int8Linear(_Integer):
    """F.linear with an int8 weight: inputs (..., K) float32 -> (..., N) float32."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__(weight.codes, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        q, scale, zero = quantize_batch(x.reshape(-1, x.shape[-1]), self.input_grid)
        y = self._onednn(q, scale, zero) if ONEDNN else self._int_mm(q, scale, zero)
        return y.reshape(*x.shape[:-1], len(self.codes))

    def _onednn(self, q: Tensor, scale: float, zero: int) -> Tensor:
        if self.packed is None:
            self.packed = torch.ops.onednn.qlinear_prepack(self.codes, None)
        inputs = q, scale, zero, self.packed, self.scale, self.zeros, self.bias
        return torch.ops.onednn.qlinear_pointwise(*inputs, *FLOAT_OUTPUT)

    def _int_mm(self, q: Tensor, scale: float, zero: int) -> Tensor:
        signed = (q.to(torch.int16) - 128).to(torch.int8)
        sums = torch._int_mm(signed, self.codes.t()) + (128 - zero) * self.codes.sum(1, dtype=torch.int32)
        y = sums.float() * (self.scale * scale)
        return y if self.bias is None else y + self.bias


class Int8Conv2d(_Integer):
    """F.conv2d with an int8 weight: (B, C, H, W) float32 -> (B, C', H', W') float32; needs oneDNN."""

    def __init__(self, layer: nn.Conv2d, weight: IntegerWeight):
        super().__init__(weight.codes.reshape(layer.weight.shape), weight, layer.bias)
        self.geometry = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]

    def forward(self, x: Tensor) -> Tensor:
        q, scale, zero = quantize_batch(x, self.input_grid)
        if self.packed is None:
            self.packed = torch.ops.onednn.qconv_prepack(self.codes, self.scale, 1.0, 0, *self.geometry, None)
        inputs = q, scale, zero, self.packed, self.scale, self.zeros, self.bias
        return torch.ops.onednn.qconv_pointwise(*inputs, *self.geometry, *FLOAT_OUTPUT)


class PackedLinear(_Integer):
    """F.linear on the kernels behind torch's quantized backends, "fbgemm" or "qnnpack", while torch still has them.

    fbgemm reads weights faster than the others at small batches. Inputs are rounded by each batch's range, to 7 bits
    where the processor's 8-bit products could overflow (no VNNI).
    """

    def __init__(self, weight: IntegerWeight, bias: Tensor | None, backend: str):
        super().__init__(weight.codes, weight, bias)
        self.backend, self.reduced = backend, backend == "fbgemm" and not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            self.packed = self._pack()
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduced)

    def _pack(self):
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.backend
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that these tensors are to be removed: then so is this engine
                values = torch._make_per_channel_quantized_tensor(self.codes, self.scale.double(), self.zeros, 0)
            return torch.ops.quantized.linear_prepack(values, self.bias)
        finally:
            torch.backends.quantized.engine = before


def has_backend(backend: str) -> bool:
    """Whether this torch has the kernels of a quantized backend."""
    supported = getattr(torch.backends, "quantized", None)
    return supported is not None and backend in supported.supported_engines


def int8_layer(layer: nn.Module, backend: str | None = None) -> nn.Module | None:
    """The integer layer in place of a quantized nn.Linear or nn.Conv2d; None for what the kernels cannot do."""
    weight = integer_weight(layer) if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
    if weight is None or not weight.per_row:
        return None
    if isinstance(layer, nn.Linear):
        return PackedLinear(weight, layer.bias, backend) if backend else Int8Linear(weight, layer.bias)
    plain = ONEDNN and not backend and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return Int8Conv2d(layer, weight) if plain else None


def int8_model(model: nn.Module, backend: str | None = None) -> nn.Module:
    """A copy of a quantized model with integer layers where there are kernels, dequantized floats elsewhere.

    backend: "fbgemm" or "qnnpack" for PackedLinear; None for the kernels that stay.
    Raises ValueError if no layer can be replaced, or torch has no such backend.
    """
    if backend and not has_backend(backend):
        raise ValueError(f"this torch has no {backend} kernels: choose the engine torch-int8")
    made = {layer: int8_layer(layer, backend) for layer in model.modules()}
    names = model.named_modules(remove_duplicate=False)
    replacements = {name: made[layer] for name, layer in names if made.get(layer) is not None}
    if not replacements:
        raise ValueError(
            f"{type(model).__name__} has no Linear or Conv2d with INT8 codes a row for torch's kernels"
        )
    if "" in replacements:
        return replacements[""].eval()
    copy = float_copy(model)
    folded = batch_norm_pairs(copy)
    for name, layer in replacements.items():
        copy.set_submodule(name, layer)
    for layer_name, norm_name in folded:
        if layer_name in replacements:
            replacements[layer_name].fold(*scale_and_shift(copy.get_submodule(norm_name)))
            copy.set_submodule(norm_name, nn.Identity())
    return copy.eval()
