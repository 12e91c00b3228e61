"""Quantization of what flows between layers, real or complex, with ranges from calibration."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from kit.core.protocols import run
from kit.core.settings import checks
from kit.quantization import formats
from kit.quantization.formats import Format

Mode = Literal["separate", "joint", "polar"]


class ActivationQuantizer(nn.Module):
    """Rounds a real tensor to `bits`-wide integers times a calibrated scale; straight through.

    Ranges are kept per tensor, or per channel of the last dimension. While `observing`, the input
    passes unchanged and the range is widened; otherwise it is fake-quantized.

    Args:
        channels: length of the last dimension for a range per channel; None for one range.
        bounds: (low, high) of what is bounded by definition, such as an angle.
    Raises ValueError for a complex input, before calibration, and for NaN or infinity in it.
    """

    def __init__(self, bits: int = 8, symmetric: bool = True, channels=None, bounds=None):
        super().__init__()
        self.format = Format(bits, symmetric, "channel", scale="float32")
        self.channels, self.bounds, self.observing = channels, bounds, False
        self.register_buffer("low", torch.empty(channels or 1))
        self.register_buffer("high", torch.empty(channels or 1))
        self.reset()

    def settings(self) -> dict:
        """The arguments that made it."""
        found = {"bits": self.format.bits, "symmetric": self.format.symmetric}
        return found | {"channels": self.channels, "bounds": self.bounds}

    def reset(self) -> None:
        """Forgets the range: nothing seen yet."""
        low, high = self.bounds or (math.inf, -math.inf)
        self.low.fill_(low)
        self.high.fill_(high)

    def select(self, channels: Tensor) -> None:
        """Keeps the ranges of `channels`, int64."""
        self.channels, self.low, self.high = len(channels), self.low[channels], self.high[channels]

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point, shape (channels,) or (1,), the zero point None if symmetric. Raises
        ValueError before calibration."""
        if (self.low > self.high).any():
            raise ValueError("an activation quantizer was used before calibration: run calibrate")
        return formats.qparams_of_range(self.low.clamp(max=0), self.high.clamp(min=0), self.format)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Widens the range to hold x."""
        flat = x.detach().reshape(-1, x.shape[-1] if self.channels else 1)
        if self.bounds or not len(flat):
            return
        low, high = torch.aminmax(flat, dim=0)
        if not (torch.isfinite(low) & torch.isfinite(high)).all():
            raise ValueError("calibration met NaN or infinite activations: check the batches")
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes, int8, shape of x."""
        return formats.quantize(x, *self.qparams(), self.format)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_complex():
            formats.check_weights(x, "activation")
        if self.observing:
            self.observe(x)
            return x
        return formats.fake_quantize(x.float(), *self.qparams(), self.format).to(x.dtype)


class ComplexQuantizer(nn.Module):
    """Rounds a complex tensor to pairs of integers, per tensor or channel (last dimension).

    mode "separate": real and imaginary parts have ranges of their own, from the smallest to the
    largest value (the imaginary part of a resolvent is positive, so half of a symmetric grid would
    be idle). "joint": they share one symmetric scale, so that the grid is square and phase is kept
    as well as modulus. "polar": modulus and phase are rounded, uniformly in each, the phase over
    [-pi, pi]. Calibrated like ActivationQuantizer. Gradients are straight through.
    """

    @checks
    def __init__(self, bits: int | str = 8, channels: int | None = None, mode: Mode = "separate"):
        super().__init__()
        circle = (-math.pi, math.pi) if mode == "polar" else None
        self.mode = mode
        self.first = ActivationQuantizer(bits, mode == "joint", channels)
        self.second = ActivationQuantizer(bits, mode != "separate", channels, circle)

    def settings(self) -> dict:
        """The arguments that made it."""
        return {"bits": self.first.format.bits, "channels": self.first.channels, "mode": self.mode}

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return (z.abs(), z.angle()) if self.mode == "polar" else (z.real, z.imag)

    def codes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes of (real, imaginary) or (modulus, phase), each int8 in the shape of z."""
        first, second = self._split(z)
        return self.first.codes(first), self.second.codes(second)

    def forward(self, z: Tensor) -> Tensor:
        if not z.is_complex():
            raise ValueError(f"expects a complex tensor, not {z.dtype}: use ActivationQuantizer")
        first, second = self._split(z)
        if self.mode == "joint" and self.first.observing:
            for part in (first, second):
                self.first.observe(part)
                self.second.observe(part)
            return z
        first, second = self.first(first), self.second(second)
        if self.mode == "polar":  # torch.polar has no gradient where the modulus is rounded to 0
            first, second = first * second.cos(), first * second.sin()
        return torch.complex(first, second)


ACTIVATION_MODULES = {cls.__name__: cls for cls in (ActivationQuantizer, ComplexQuantizer)}


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable) -> nn.Module:
    """Fixes every activation quantizer's range from `batches`, which `kit.core.protocols.call_of`
    takes; returns the model. Ranges found before are forgotten. Raises ValueError if there is no
    batch."""
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.reset()
        quantizer.observing = True
    try:
        run(model, batches)
    finally:
        for quantizer in quantizers:
            quantizer.observing = False
    return model
