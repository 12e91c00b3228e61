"""What an integer engine needs to know of a quantized model: codes, scales, input ranges of each layer."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kit.core.weights import bake, find_step, named_weights, original_of, steps_of
from kit.core.weights import copy_model
from kit.quantization.activations import ActivationQuantizer, calibrate
from kit.quantization.fake import FakeQuantize
from kit.quantization.formats import Format

INPUT_QUANTIZER = "input_quantizer"
INTEGER_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as int8 codes (rows, columns) with scales (rows, blocks a row), and its layer's input range."""

    codes: Tensor
    scale: Tensor
    format: Format
    input_grid: tuple[float, int] | None  # scale and zero point (uint8) of calibrated inputs

    @property
    def per_row(self) -> bool:
        return self.scale.shape[1] == 1

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] if self.per_row else self.format.group_size

    def values(self) -> Tensor:
        """The weight in float32, (rows, columns)."""
        return self.codes * self.scale.repeat_interleave(self.block, 1)[:, : self.codes.shape[1]]

    def scaled(self, factor: Tensor) -> "IntegerWeight":
        """The weight with each row times factor (rows,): other scales, other signs where it is negative."""
        sign = factor.sign().where(factor != 0, 1).to(torch.int8)[:, None]
        return replace(self, codes=self.codes * sign, scale=self.scale * factor.abs()[:, None])

    def as_found(self, matrix: Tensor) -> "IntegerWeight | None":
        """This weight if its values are those of matrix (rows, columns), up to a factor a row; else None.

        Folded batch norms multiply rows, which leaves integer codes as they are.
        """
        values = self.values()
        if torch.equal(values, matrix):
            return self
        if not self.per_row:
            return None
        factor = (matrix * values).sum(1) / values.square().sum(1).clamp_min(1e-30)
        near = torch.allclose(factor[:, None] * values, matrix, 1e-5, 1e-6 * matrix.abs().max().item())
        return self.scaled(factor) if near else None


@torch.no_grad()
def integer_weight(module: nn.Module, attribute: str = "weight") -> IntegerWeight | None:
    """The integer form of a weight; None where integer kernels take none: asymmetric, half or float."""
    quantizer = find_step(module, attribute, FakeQuantize)
    if quantizer is None or quantizer.format.bits == 16 or not quantizer.format.symmetric:
        return None
    weight = original_of(module, attribute)
    for step in steps_of(module, attribute):
        if step is not quantizer:
            weight = step(weight)
    codes, scale, _ = quantizer.codes(weight)
    if quantizer.format.granularity in ("tensor", "rows"):
        size = len(codes) if quantizer.format.granularity == "tensor" else quantizer.format.group_size
        scale = scale.repeat_interleave(size, 0)[: len(codes)]
    return IntegerWeight(codes, scale.reshape(len(codes), -1), quantizer.format, _input_grid(module))


def _input_grid(module: nn.Module) -> tuple[float, int] | None:
    quantizer = getattr(module, INPUT_QUANTIZER, None)
    if not isinstance(quantizer, ActivationQuantizer) or not (quantizer.high > quantizer.low).all():
        return None
    scale, zero = quantizer.grid()
    return scale.item(), 128 if zero is None else int(zero.item()) + 128


def integer_weights(model: nn.Module) -> dict[tuple[int, int], list[IntegerWeight]]:
    """The integer form of every weight that has one, by shape.

    An exported graph is searched for their values, since exporters rename, transpose and scale weights.
    """
    found = {}
    for _, module, attribute in named_weights(model):
        weight = integer_weight(module, attribute)
        if weight is not None:
            found.setdefault(tuple(weight.codes.shape), []).append(weight)
    return found


def float_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without compression: weights multiplied out, inputs unrounded, float32."""
    return drop_input_quantizers(bake(copy_model(model))).float().eval()


def quantize_input(module: nn.Module, arguments: tuple) -> tuple:
    """Forward pre-hook of layers whose inputs are quantized with a calibrated range."""
    return (getattr(module, INPUT_QUANTIZER)(arguments[0]), *arguments[1:])


def calibrate_inputs(model: nn.Module, batches: Iterable) -> nn.Module:
    """Rounds the inputs of linear layers and convolutions to 8 bits in ranges found on `batches`, in place.

    Layers that no batch reaches (their weight is read by other code) stay as they are.
    """
    for module in list(model.modules()):
        if isinstance(module, INTEGER_LAYERS) and not hasattr(module, INPUT_QUANTIZER):
            setattr(module, INPUT_QUANTIZER, ActivationQuantizer(8, symmetric=False))
    calibrate(hook_input_quantizers(model), batches)
    for module in model.modules():
        if hasattr(module, INPUT_QUANTIZER) and _input_grid(module) is None:
            _drop_input_quantizer(module)
    return model


def hook_input_quantizers(model: nn.Module) -> nn.Module:
    """Makes input quantizers that came from a file take part in the forward pass; returns the model."""
    for module in model.modules():
        if hasattr(module, INPUT_QUANTIZER) and quantize_input not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(quantize_input)
    return model


def drop_input_quantizers(model: nn.Module) -> nn.Module:
    """Takes all input quantizers off, in place; returns the model."""
    for module in model.modules():
        if hasattr(module, INPUT_QUANTIZER):
            _drop_input_quantizer(module)
    return model


def _drop_input_quantizer(module: nn.Module) -> None:
    delattr(module, INPUT_QUANTIZER)
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is quantize_input]:
        del module._forward_pre_hooks[key]
