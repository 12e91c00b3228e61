"""ResNet-BK: a causal language model that mixes tokens by tridiagonal resolvents, in O(N)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.core.settings import BelowOne, Count, settings
from kit.models import bk_core
from kit.models.base import LanguageModel
from kit.models.moe import RESIDUAL_SCALE, MoE

ETA_FLOOR = 1e-3


@settings
class ResNetBKConfig:
    """Shapes of a ResNetBK. `experts`, `d_ff` and `channels` are one integer for all layers or a
    tuple with one each; `conv` is the convolution's taps;
    `embedding_rank` factors the (V, D) matrices."""

    vocab_size: Count = 30000
    d_model: Count = 64
    layers: Count = 4
    experts: Count | tuple[Count, ...] = 4
    d_ff: Count | tuple[Count, ...] = 128
    channels: Count | tuple[Count, ...] = 48
    top_k: Count = 1
    conv: Count = 4
    tied: bool = False
    embedding_rank: Count | None = None
    dropout: BelowOne = 0.0

    def __post_init__(self):
        for name in ("experts", "d_ff", "channels"):
            value, count = getattr(self, name), len(self.per_layer(name))
            if count != self.layers:
                there = f"{name} = {value} has {count} entries for {self.layers} layers"
                raise ValueError(f"{there}: give one each")
        if min(self.per_layer("experts")) < self.top_k:
            need = f"between 1 and the number of experts, {self.experts}"
            raise ValueError(f"top_k = {self.top_k} must be {need}")

    def per_layer(self, name: str) -> tuple[int, ...]:
        """A field as a tuple with one entry per layer."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.layers


class BKMixer(nn.Module):
    """Causal token mixing by the left resolvent of a tridiagonal operator per channel.

    A depthwise causal convolution; then per token and channel a potential v and an off-diagonal
    entry h (linear in the convolved input, hopping p = h^2); the reflection coefficient r of the
    resolvent (`staggered_reflection`) with learned energy E and width eta per channel; and a
    projection of [Re r, Im r], each gated by the token. `quantize_v` and `quantize_g` see v (B, N,
    C) and r (B, N, C) complex, |r| < 1.
    """

    def __init__(self, d_model: int, channels: int, conv: int = 4):
        super().__init__()
        self.convolution = nn.Conv1d(d_model, d_model, conv, groups=d_model)
        self.input = nn.Linear(d_model, 2 * channels)
        self.gate = nn.Linear(d_model, 2 * channels)
        self.output = nn.Linear(2 * channels, d_model)
        self.energy = nn.Parameter(torch.linspace(-0.1, 0.1, channels)[torch.randperm(channels)])
        width = torch.logspace(math.log10(0.01), 0, channels) - ETA_FLOOR / 2
        self.raw_eta = nn.Parameter(width + torch.log(-torch.expm1(-width)))  # softplus undone
        self.quantize_v, self.quantize_g = nn.Identity(), nn.Identity()
        with torch.no_grad():
            self.input.weight *= 0.3
            self.input.bias[:channels], self.input.bias[channels:] = 0, 1
            self.output.weight *= RESIDUAL_SCALE
            self.output.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        local = bk_core.causal_convolution(x, self.convolution.weight, self.convolution.bias)
        v, off_diagonal = self.input(local).chunk(2, -1)
        eta, gate = F.softplus(self.raw_eta) + ETA_FLOOR, self.gate(x)
        operator = self.quantize_v(v) - self.energy, off_diagonal.square(), eta
        if torch.compiler.is_exporting() and isinstance(self.quantize_g, nn.Identity):
            return self.output(torch.cat(bk_core.staggered_reflection_pair(*operator), -1) * gate)
        r = self.quantize_g(bk_core.staggered_reflection(*operator))
        return self.output(bk_core.gated_parts(r, gate))


class ResNetBKLayer(nn.Module):
    """Pre-norm residual block: BK mixer, then mixture of experts."""

    def __init__(self, config: ResNetBKConfig, channels: int, d_ff: int, experts: int):
        super().__init__()
        width = config.d_model
        self.norm_mixer, self.norm_moe = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer = BKMixer(width, channels, config.conv)
        self.moe = MoE(width, d_ff, experts, config.top_k)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.mixer(self.norm_mixer(x)))
        return x + self.dropout(self.moe(self.norm_moe(x)))


class ResNetBK(LanguageModel):
    """Causal language model of BK mixers and mixtures of experts; ResNetBKConfig has its shapes."""

    def __init__(self, config: ResNetBKConfig):
        super().__init__(config)
        shapes = zip(*(config.per_layer(name) for name in ("channels", "d_ff", "experts")))
        self.layers = nn.ModuleList(ResNetBKLayer(config, *shape) for shape in shapes)
        self.norm = nn.LayerNorm(config.d_model)

    def shapes(self) -> dict:
        found = {"channels": [len(layer.mixer.energy) for layer in self.layers]}
        for axis, name in enumerate(("experts", "d_ff")):
            found[name] = [layer.moe.w_in.shape[axis] for layer in self.layers]
        found = {k: v[0] if len(set(v)) == 1 else tuple(v) for k, v in found.items()}
        return found | {"layers": len(self.layers)}
