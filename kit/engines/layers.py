"""What an integer engine needs to know of a quantized model: codes, scales and input ranges, layer by
layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kit.parametrization import bake, find_step, named_weights, original_of, steps_of
from kit.pruning.mask import copy_model
from kit.quantization.activations import ActivationQuantizer
from kit.quantization.fake import FakeQuantize
from kit.quantization.formats import Format

INPUT_QUANTIZER = "input_quantizer"


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as (rows, columns) int8 codes with scales (rows, blocks a row), and its layer's input
    range.
    """

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
        return min(self.format.group_size, self.codes.shape[1]) if not self.per_row else self.codes.shape[1]


@torch.no_grad()
def integer_weight(module: nn.Module, attribute: str = "weight") -> IntegerWeight | None:
    """The integer form of a weight, or None where integer kernels take none: asymmetric, half or float."""
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
    if not isinstance(quantizer, ActivationQuantizer) or quantizer.channels or quantizer.format.bits != 8:
        return None
    scale, zero = quantizer.grid()
    return scale.item(), 128 if zero is None else int(zero.item()) + 128


def integer_weights(model: nn.Module) -> dict[bytes, IntegerWeight]:
    """The integer form of every weight that has one, under the bytes of its float values, by which an
    exported graph is searched for it: exporters rename and transpose weights, but keep their values.
    """
    found = {}
    for _, module, attribute in named_weights(model):
        weight = integer_weight(module, attribute)
        if weight is not None:
            found[content(getattr(module, attribute))] = weight
    return found


def content(weight: Tensor) -> bytes:
    """Key of a weight: its shape and bytes as (rows, columns) float32."""
    matrix = weight.detach().float().cpu().reshape(len(weight), -1).contiguous()
    return repr(tuple(matrix.shape)).encode() + matrix.numpy().tobytes()


def float_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without compression: weights multiplied out, inputs unrounded, float32."""
    model = copy_model(model)
    for module in model.modules():
        if parametrize.is_parametrized(module):  # its class, which computes them, is shared by copies
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
    return drop_input_quantizers(bake(model)).float().eval()


def quantize_input(module: nn.Module, arguments: tuple) -> tuple:
    """Forward pre-hook of layers whose inputs are quantized with a calibrated range."""
    return (getattr(module, INPUT_QUANTIZER)(arguments[0]), *arguments[1:])


def add_input_quantizers(model: nn.Module, kinds: tuple[type, ...]) -> nn.Module:
    """Gives each layer of `kinds` a quantizer of its input, to be calibrated, in place; returns the model."""
    for module in list(model.modules()):
        if isinstance(module, kinds) and not hasattr(module, INPUT_QUANTIZER):
            setattr(module, INPUT_QUANTIZER, ActivationQuantizer(8, symmetric=False))
    return hook_input_quantizers(model)


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
            delattr(module, INPUT_QUANTIZER)
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is quantize_input]:
                del hooks[key]
    return model
