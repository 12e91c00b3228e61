"""Quantization of the BK-core: its real input v and its complex output G."""

import torch
import torch.nn as nn
from torch import Tensor

from kit.models import BKMixer
from kit.models.bk_core import staggered_reflection
from kit.quantization.activations import ActivationQuantizer, ComplexQuantizer


class QuantizedBKCore(nn.Module):
    """The causal BK-core between two quantizers: v (B, N, C) -> rounded -> G -> rounded.

    G is rounded as its reflection coefficient (`staggered_reflection`), which lies in the unit disc
    and is what the mixer passes on. Ranges are fixed by `kit.quantization.calibrate`;
    straight-through in training. `codes` gives the integers that a deployment would keep.

    Args:
        channels: C for one range a channel; None for one range a tensor.
        mode: of the complex output, see ComplexQuantizer.
    """

    def __init__(self, bits: int = 8, channels: int | None = None, mode: str = "separate"):
        super().__init__()
        self.quantize_v = ActivationQuantizer(bits, symmetric=False, channels=channels)
        self.quantize_g = ComplexQuantizer(bits, channels, mode)

    def forward(self, v: Tensor, energy: Tensor, hopping: Tensor, eta: Tensor) -> Tensor:
        """v, hopping >= 0 (B, N, C), energy, eta > 0 (C,) -> G as r (B, N, C) complex."""
        return self.quantize_g(self._reflection(v, energy, hopping, eta))

    @torch.no_grad()
    def codes(
        self, v: Tensor, energy: Tensor, hopping: Tensor, eta: Tensor
    ) -> tuple[Tensor, tuple]:
        """int8 codes of v and of the two parts of G as r."""
        reflection = self._reflection(v, energy, hopping, eta)
        return self.quantize_v.codes(v), self.quantize_g.codes(reflection)

    def _reflection(self, v: Tensor, energy: Tensor, hopping: Tensor, eta: Tensor) -> Tensor:
        return staggered_reflection(self.quantize_v(v) - energy, hopping, eta)

    def attach(self, mixer: BKMixer) -> None:
        """Makes `mixer` compute with this core's quantizers."""
        mixer.quantize_v, mixer.quantize_g = self.quantize_v, self.quantize_g


class PerChannelQuantizedBKCore(QuantizedBKCore):
    """QuantizedBKCore with a range for each of `channels` channels."""

    def __init__(self, channels: int, bits: int = 8, mode: str = "separate"):
        super().__init__(bits, channels, mode)


def quantize_bk_core(
    model: nn.Module, bits: int = 8, per_channel: bool = False, mode: str = "separate"
) -> nn.Module:
    """Gives every BK mixer of the model quantizers for v and G, in place; calibrate before use.
    Returns the model, as it is if it has no BK mixers."""
    for mixer in [m for m in model.modules() if isinstance(m, BKMixer)]:
        core = QuantizedBKCore(bits, len(mixer.energy) if per_channel else None, mode)
        core.to(mixer.energy.device).attach(mixer)
    return model
