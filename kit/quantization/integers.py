"""Packed layers for inference: integer codes in memory, floats only while a layer computes.

A layer's `weight` is multiplied out of the codes when it is read, so everything that read the float
layer reads these, with the very values of the fake quantizer: outputs agree to the last bit. What
computes with the integers themselves is in kit.engines.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.core.weights import is_plain, materialize, matrix_view, weight_of
from kit.models import MoE
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize, quantize_weights
from kit.quantization.formats import Format
from kit.quantization.packing import pack, unpack
from kit.quantization.plans import INT4_GROUPS, INT8


class GroupWiseQuantizer(nn.Module):
    """A tensor as packed codes and a scale a group: `encode` stores it, a call gives it back.

    128 weights a group in 4 bits by default, so 0.5 byte a weight and a float16 scale for each 128.

    >>> packed = GroupWiseQuantizer().encode(torch.randn(64, 256))
    >>> packed.nbytes, packed().shape
    (8448, torch.Size([64, 256]))
    """

    data: Tensor  # uint8
    scale: Tensor  # (blocks, 1)
    zero: Tensor | None
    like: Tensor  # empty, of the dtype in which the tensor is given back
    after: nn.ModuleList  # steps of a weight behind its quantizer

    def __init__(self, format: Format = INT4_GROUPS):
        super().__init__()
        if format.bits == 16:
            raise ValueError("a half-precision format has no codes to pack: use tensor.half()")
        self.format, self.view, self.after = format, None, nn.ModuleList()
        for name in ("data", "scale", "zero", "like"):
            self.register_buffer(name, None)

    def encode(self, weight: Tensor) -> "GroupWiseQuantizer":
        """Stores a real finite tensor, its rows along the last dimension; returns itself."""
        return self.take(FakeQuantize(weight, self.format, matrix_view(weight.shape)), weight)

    @torch.no_grad()
    def take(self, quantizer: FakeQuantize, weight: Tensor) -> "GroupWiseQuantizer":
        """Stores the codes of `weight` under a fake quantizer; returns itself."""
        codes, scale, zero = quantizer.codes(weight)
        self.view, packed = quantizer.view, pack(codes.cpu().numpy(), self.format.bits)
        self.data = torch.from_numpy(np.frombuffer(packed, np.uint8).copy()).to(weight.device)
        self.scale = scale.half() if self.format.scale == "float16" else scale.clone()
        self.zero = None if zero is None else zero.to(self.format.integer)
        self.like = weight.new_empty(0)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GroupWiseQuantizer":
        """A cast changes the dtype of the tensor, not the scales that are stored."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = None if scale is None else scale.to(self.data.device)
        return self

    def codes(self) -> Tensor:
        """Codes (rows, columns), `format.integer`."""
        data, bits, shape = self.data, self.format.bits, (self.view.rows, self.view.columns)
        count = math.prod(shape)
        if bits == 8:
            return (data[:count] ^ 0x80).view(torch.int8).view(shape)
        if bits == 4:
            pairs = torch.stack([data & 15, data >> 4], 1).reshape(-1)[:count]
            return (pairs.view(torch.int8) - 8).view(shape)
        codes = unpack(data.cpu().numpy().tobytes(), count, bits)
        return torch.from_numpy(codes).to(data.device).view(shape)

    def forward(self) -> Tensor:
        """The tensor."""
        zero = None if self.zero is None else self.zero.float()
        blocks = formats.to_blocks(self.codes(), self.format)
        values = formats.dequantize(blocks, self.scale.float(), zero)
        shape = self.view.rows, self.view.columns
        value = self.view.tensor(formats.from_blocks(values, shape, self.format)).to(
            self.like.dtype
        )
        for step in self.after:
            value = step(value)
        return value

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())


def _coded(module: nn.Module, attribute: str = "weight") -> FakeQuantize | None:
    """The quantizer that gives a weight codes, whatever steps are behind it."""
    quantizer = weight_of(module, attribute).find(FakeQuantize)
    return None if quantizer is None or quantizer.format.bits == 16 else quantizer


def _packed(module: nn.Module, attribute: str = "weight") -> GroupWiseQuantizer:
    weight, quantizer = weight_of(module, attribute), _coded(module, attribute)
    if quantizer is None:
        what = f"{type(module).__name__}.{attribute} is not quantized"
        raise ValueError(f"{what}: call quantize_weights first")
    seen = weight.before(quantizer.rank).detach()
    packed = GroupWiseQuantizer(quantizer.format).take(quantizer, seen)
    behind = [step for step in weight.steps if step.rank > quantizer.rank]
    packed.after.extend(copy.deepcopy(behind))
    return packed


def _fixed(value: Tensor | None) -> nn.Parameter | None:
    if value is None or value.is_meta:  # `artifact.load` fills this very one later
        return value
    return nn.Parameter(value.detach().clone(), requires_grad=False)


class _Packed(nn.Module):
    """A layer whose weight is multiplied out of `packed` when it is read."""

    @property
    def weight(self) -> Tensor:
        return self.packed()


class QuantizedLinear(_Packed):
    """F.linear with a packed weight: inputs (..., K) -> (..., N), float32. Made from a linear layer
    whose weight carries a FakeQuantize; raises ValueError for another."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed, self.bias = _packed(linear), _fixed(linear.bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @classmethod
    def from_float(cls, linear: nn.Linear, format: Format = INT8) -> "QuantizedLinear":
        return cls(quantize_weights(nn.Sequential(materialize(linear)), {"0.weight": format})[0])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class QuantizedEmbedding(_Packed):
    """nn.Embedding with packed codes."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.packed, self.padding_idx = _packed(embedding), embedding.padding_idx
        self.num_embeddings, self.embedding_dim = self.packed.view.rows, self.packed.view.columns

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class QuantizedMoELayer(MoE):
    """A mixture of experts with packed experts and router; used as the float layer.

    Made from a MoE whose weights carry FakeQuantize steps (raises ValueError if w_in or w_out do
    not); `from_float` gives a float layer INT4 experts in groups of 128 and an INT8 router.
    """

    def __init__(self, moe: MoE):
        nn.Module.__init__(self)
        self.packed_in, self.packed_out = _packed(moe, "w_in"), _packed(moe, "w_out")
        self.top_k, self.balance_loss = moe.top_k, moe.balance_loss.detach()
        coded = _coded(moe.router) is not None
        self.router = QuantizedLinear(moe.router) if coded else materialize(moe.router)
        self.b_in, self.b_out = _fixed(moe.b_in), _fixed(moe.b_out)
        self.register_buffer("usage", moe.usage.clone(), persistent=False)

    @classmethod
    def from_float(
        cls, moe: MoE, experts: Format = INT4_GROUPS, router: Format = INT8
    ) -> "QuantizedMoELayer":
        return cls(quantize_weights(materialize(moe), {"w_*": experts, "router.weight": router}))

    @property
    def w_in(self) -> Tensor:
        return self.packed_in()

    @property
    def w_out(self) -> Tensor:
        return self.packed_out()


LAYERS = {
    MoE: (QuantizedMoELayer, ("w_in", "w_out")),
    nn.Linear: (QuantizedLinear, ("weight",)),
    nn.Embedding: (QuantizedEmbedding, ("weight",)),
}


def pack_layers(model: nn.Module) -> nn.Module:
    """A copy for inference with packed layers in place of quantized Linear, Embedding and MoE
    layers; other weights are multiplied out. Its outputs equal those of `model` in evaluation mode,
    to the last bit. A weight that several layers share is packed in each of them.
    """
    made = packed_parts(model)
    if "" in made:
        return made[""].eval()
    packed = materialize(model)
    for name, layer in made.items():
        packed.set_submodule(name, layer)
    return packed.eval()


def packed_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The packed layers of `pack_layers`, by the path of what they take the place of."""
    made = {}
    for name, module in model.named_modules():
        layer, attributes = packs(module) or (None, ())
        inside = any(not outer or name.startswith(f"{outer}.") for outer in made)
        if layer and not inside and all(_coded(module, attribute) for attribute in attributes):
            made[name] = layer(module)
    return made


def packs(module: nn.Module) -> tuple[type, tuple[str, ...]] | None:
    """The packed layer that can take a module's place where its weights have codes, and these
    weights; or None."""
    for kind, (layer, attributes) in LAYERS.items():
        if is_plain(module, kind) or (kind is MoE and isinstance(module, MoE)):
            return None if isinstance(module, layer) else (layer, attributes)
    return None
