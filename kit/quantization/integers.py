"""Packed layers for inference: integer codes in memory, floats only while a layer computes.

A layer's `weight` is multiplied out of the codes when it is read, so everything that read the float layer reads
these, with the very values of the fake quantizer: outputs agree to the last bit. `QuantizedLinear.tune` may choose
integer products instead, within a stated bound.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.models import MoE
from kit.core.weights import bake, find_step
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize, matrix_shape, quantize_weights, seen_by
from kit.quantization.formats import Format
from kit.quantization.packing import pack, unpack
from kit.quantization.presets import INT4_GROUPS, INT8


class GroupWiseQuantizer(nn.Module):
    """A tensor as packed integer codes and a scale a group: `encode` stores it, calling it gives the floats back.

    128 weights a group in 4 bits by default, so 0.5 byte a weight and a float16 scale for each 128.

    >>> packed = GroupWiseQuantizer().encode(torch.randn(64, 256))
    >>> packed.nbytes, packed().shape
    (8448, torch.Size([64, 256]))
    """

    data: Tensor    # uint8
    scale: Tensor   # (blocks, 1)
    zero: Tensor | None

    def __init__(self, format: Format = INT4_GROUPS):
        super().__init__()
        if format.bits == 16:
            raise ValueError("a half-precision format has no codes to pack: use tensor.half()")
        self.format, self.shape, self.matrix = format, None, None
        self.register_buffer("data", None)
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)

    def encode(self, weight: Tensor) -> "GroupWiseQuantizer":
        """Stores a real finite tensor, its rows along the last dimension; returns itself."""
        return self.take(FakeQuantize(weight, matrix_shape(self, weight.shape), self.format), weight)

    @torch.no_grad()
    def take(self, quantizer: FakeQuantize, weight: Tensor) -> "GroupWiseQuantizer":
        """Stores the codes of `weight` under a fake quantizer; returns itself."""
        codes, scale, zero = quantizer.codes(weight)
        self.shape, self.matrix = weight.shape, quantizer.shape
        packed = pack(codes.cpu().numpy(), self.format.bits)
        self.data = torch.from_numpy(np.frombuffer(packed, np.uint8).copy()).to(weight.device)
        self.scale = scale.half() if self.format.scale == "float16" else scale.clone()
        self.zero = None if zero is None else zero.to(torch.int8)
        return self

    def codes(self) -> Tensor:
        """int8 codes (rows, columns)."""
        data, (count, columns), bits = self.data, self.matrix, self.format.bits
        if bits == 8:
            return (data[: count * columns] ^ 0x80).view(torch.int8).view(count, columns)
        if bits == 4:
            pairs = torch.stack([data & 15, data >> 4], 1).reshape(-1)[: count * columns]
            return (pairs.view(torch.int8) - 8).view(count, columns)
        codes = unpack(data.cpu().numpy().tobytes(), count * columns, bits)
        return torch.from_numpy(codes).to(data.device).view(count, columns)

    def forward(self) -> Tensor:
        """The tensor, float32."""
        blocks = formats.to_blocks(self.codes(), self.format)
        zero = None if self.zero is None else self.zero.float()
        values = formats.dequantize(blocks, self.scale.float(), zero)
        return formats.from_blocks(values, self.matrix, self.format).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        parts = (self.data, self.scale, self.zero)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _packed(module: nn.Module, attribute: str) -> GroupWiseQuantizer:
    quantizer = find_step(module, attribute, FakeQuantize)
    return GroupWiseQuantizer(quantizer.format).take(quantizer, seen_by(quantizer, module, attribute).detach())


def _bias(module: nn.Module) -> nn.Parameter | None:
    return None if module.bias is None else nn.Parameter(module.bias.detach().clone(), requires_grad=False)


class QuantizedLinear(nn.Module):
    """F.linear with a packed weight: inputs (..., K) -> (..., N), float32.

    Multiplied out on the fly, or, from `integer_rows` rows of input on, as integers: each row of inputs is rounded to
    INT8 by its own largest value, products are exact int32, so an output differs by at most
    sum_k max|x| / 254 * |w_k| (and float rounding). `tune` measures from how many rows on that is faster.
    Made from a linear layer whose weight carries a FakeQuantize; raises ValueError for another.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if find_step(linear, "weight", FakeQuantize) is None:
            raise ValueError("QuantizedLinear needs a layer with a quantized weight: call quantize_weights first")
        self.packed, self.bias = _packed(linear, "weight"), _bias(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.integer_rows = math.inf

    @classmethod
    def from_float(cls, linear: nn.Linear, format: Format = INT8) -> "QuantizedLinear":
        return cls(quantize_weights(nn.Sequential(bake(linear)), {"0.weight": format})[0])

    @property
    def weight(self) -> Tensor:
        return self.packed()

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() // max(x.shape[-1], 1) < self.integer_rows:
            return F.linear(x, self.packed(), self.bias)
        return self.integer(x)

    def integer(self, x: Tensor) -> Tensor:
        """The product in integers, a group of columns at a time."""
        format = self.packed.format
        rows = x.reshape(-1, x.shape[-1])
        step = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        q, codes = torch.round(rows / step).to(torch.int8), self.packed.codes()
        scale = self.packed.scale.float()
        scale = scale.view(-1) if format.granularity == "tensor" else scale.view(len(codes), -1)
        width = min(format.group_size, x.shape[-1]) if format.granularity == "group" else x.shape[-1]
        total = 0
        for index, first in enumerate(range(0, x.shape[-1], width)):
            product = torch._int_mm(q[:, first:first + width].contiguous(), codes[:, first:first + width].t())
            total = total + product * (scale if scale.ndim == 1 else scale[:, index])
        y = total * step
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)

    @torch.no_grad()
    def tune(self, rows: tuple[int, ...] = (1, 4, 16, 64, 256), repeats: int = 7) -> dict[int, tuple[float, float]]:
        """Sets `integer_rows` by measurement, the two paths in turn; returns rows -> (multiplied out, integer) seconds.

        Formats without an integer path (asymmetric, or a scale for several rows) stay multiplied out.
        """
        self.integer_rows, seconds = math.inf, {}
        if not self.packed.format.symmetric or self.packed.format.granularity == "rows":
            return seconds
        for count in sorted(rows, reverse=True):
            x = torch.randn(count, self.in_features, device=self.packed.data.device)
            times = [(_seconds(lambda: F.linear(x, self.packed(), self.bias)), _seconds(lambda: self.integer(x)))
                     for _ in range(repeats)]
            seconds[count] = tuple(sorted(values)[repeats // 2] for values in zip(*times))
        for count, (floats, integers) in seconds.items():
            if integers >= floats:
                break
            self.integer_rows = count
        return seconds


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class QuantizedEmbedding(nn.Module):
    """nn.Embedding with packed codes; `weight` multiplies all of them out."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.packed = _packed(embedding, "weight")

    @property
    def weight(self) -> Tensor:
        return self.packed()

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.packed())


class QuantizedMoELayer(MoE):
    """A mixture of experts with packed experts and router; interface, shapes and `usage` are those of the float layer.

    Made from a MoE whose weights carry FakeQuantize steps (raises ValueError if w_in or w_out do not); `from_float`
    gives a float layer INT4 experts in groups of 128 and an INT8 router.
    """

    def __init__(self, moe: MoE):
        nn.Module.__init__(self)
        if any(find_step(moe, name, FakeQuantize) is None for name in ("w_in", "w_out")):
            raise ValueError("QuantizedMoELayer needs quantized w_in and w_out: call quantize_weights first")
        self.top_k, self.balance_loss = moe.top_k, moe.balance_loss.detach()
        quantized_router = find_step(moe.router, "weight", FakeQuantize) is not None
        self.router = QuantizedLinear(moe.router) if quantized_router else bake(moe.router)
        self.packed_in, self.packed_out = _packed(moe, "w_in"), _packed(moe, "w_out")
        self.b_in = nn.Parameter(moe.b_in.detach().clone(), requires_grad=False)
        self.b_out = nn.Parameter(moe.b_out.detach().clone(), requires_grad=False)
        self.register_buffer("usage", moe.usage.clone(), persistent=False)

    @classmethod
    def from_float(cls, moe: MoE, experts: Format = INT4_GROUPS, router: Format = INT8) -> "QuantizedMoELayer":
        return cls(quantize_weights(bake(moe), {"w_*": experts, "router.weight": router}))

    @property
    def w_in(self) -> Tensor:
        return self.packed_in()

    @property
    def w_out(self) -> Tensor:
        return self.packed_out()


def pack_layers(model: nn.Module) -> nn.Module:
    """A copy for inference with packed layers in place of quantized Linear, Embedding and MoE layers; other weights are
    multiplied out. Its outputs equal those of `model` in evaluation mode, to the last bit.

    A weight that several layers share is packed in each of them.
    """
    made = {name: packed for name, module in model.named_modules() if (packed := _pack(module)) is not None}
    if "" in made:
        return made[""].eval()
    copy = bake(model)
    for name, layer in made.items():
        if not any(name.startswith(f"{outer}.") for outer in made):
            copy.set_submodule(name, layer)
    return copy.eval()


def _pack(module: nn.Module) -> nn.Module | None:
    kinds = {MoE: (QuantizedMoELayer, ("w_in", "w_out")), nn.Linear: (QuantizedLinear, ("weight",)),
             nn.Embedding: (QuantizedEmbedding, ("weight",))}
    for kind, (layer, attributes) in kinds.items():
        steps = [find_step(module, a, FakeQuantize) for a in attributes] if isinstance(module, kind) else [None]
        if all(step is not None and step.format.bits != 16 for step in steps):
            return layer(module)
    return None
