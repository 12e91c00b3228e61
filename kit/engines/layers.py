"""What integer engines need of a quantized model: codes, scales and input ranges of layers."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kit.core.protocols import call_of, tree_map
from kit.core.weights import MatrixView, Weight, copy_model, materialize, weights
from kit.quantization.activations import ActivationQuantizer, calibrate
from kit.quantization.fake import packable
from kit.quantization.formats import Format

INPUT_QUANTIZER = "input_quantizer"
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
INTEGER_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as int8 codes (rows, columns) with scales (rows, blocks of a row)."""

    name: str
    codes: Tensor
    scale: Tensor
    format: Format
    view: MatrixView
    input_qparams: tuple[float, int] | None  # scale and zero point (uint8) of calibrated inputs

    @property
    def per_row(self) -> bool:
        return self.scale.shape[1] == 1

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] if self.per_row else self.format.group_size

    def scaled(self, factor: Tensor) -> "IntegerWeight":
        """The weight with each row times factor (rows,), which changes scales and signs only."""
        sign = factor.sign().where(factor != 0, 1).to(torch.int8)[:, None]
        return replace(self, codes=self.codes * sign, scale=self.scale * factor.abs()[:, None])

    def as_found(self, matrix: Tensor) -> "IntegerWeight | None":
        """This weight if its values are those of matrix (rows, columns), up to a factor a row (as
        folded batch norms leave it); else None."""
        scale = self.scale.repeat_interleave(self.block, 1)[:, : self.codes.shape[1]]
        values = self.codes * scale
        if torch.equal(values, matrix):
            return self
        if not self.per_row:
            return None
        factor = (matrix * values).sum(1) / values.square().sum(1).clamp_min(1e-30)
        tolerance = 1e-6 * matrix.abs().max().item()
        same = torch.allclose(factor[:, None] * values, matrix, 1e-5, tolerance)
        return self.scaled(factor) if same else None


@torch.no_grad()
def integer_weight(weight: Weight) -> IntegerWeight | None:
    """The integer form of a weight; None where integer kernels take none: float, half,
    12 bits, asymmetric, or changed by steps behind its quantizer."""
    quantizer = packable(weight)
    if quantizer is None or not quantizer.format.symmetric or quantizer.format.qmax > 127:
        return None
    codes, scale, _ = quantizer.codes(weight.before(quantizer.rank))
    grouped = quantizer.format.granularity == "group"
    scale = scale.reshape(len(codes), -1) if grouped else quantizer.spread(scale)[:, :1]
    qparams = _input_qparams(weight.module)
    return IntegerWeight(weight.name, codes, scale, quantizer.format, quantizer.view, qparams)


def integer_weights(model: nn.Module) -> list[IntegerWeight]:
    """The integer form of every weight that has one."""
    found = (integer_weight(weight) for weight in weights(model))
    return [weight for weight in found if weight is not None]


def _input_qparams(module: nn.Module) -> tuple[float, int] | None:
    quantizer = getattr(module, INPUT_QUANTIZER, None)
    if not isinstance(quantizer, ActivationQuantizer) or not (quantizer.high > quantizer.low).all():
        return None
    scale, zero = quantizer.qparams()
    return scale.item(), 128 if zero is None else int(zero.item()) + 128


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of somebody's model without wrappers for training on several devices or compiling.

    Raises ValueError for modules whose weights do not exist yet, or cannot be changed.
    """
    for module in model.modules():
        name = type(module).__name__
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(f"{name} has no weights yet: call the model once before")
        if any(p is not None and p.layout != torch.strided for p in module._parameters.values()):
            raise ValueError(f"a sparse parameter of {name} cannot be copied: make it dense")
        if any(p is not None and p.is_meta for p in module._parameters.values()):
            raise ValueError(f"{name} is on the meta device, without values: load a checkpoint")
        if isinstance(module, torch.jit.ScriptModule):
            weights(module)  # refuses it
    copied = copy_model(unwrapped(model))
    for name, module in list(copied.named_modules()):
        if unwrapped(module) is not module:
            copied.set_submodule(name, unwrapped(module))
    return copied


def unwrapped(module: nn.Module) -> nn.Module:
    """What DataParallel, DistributedDataParallel or torch.compile is around."""
    while isinstance(module, WRAPPERS) or "_orig_mod" in module._modules:
        module = module._modules.get("_orig_mod", module._modules.get("module"))
    return module


def float_copy(model: nn.Module) -> nn.Module:
    """A float32 copy in evaluation mode: weights multiplied out, inputs not rounded."""
    return _drop_input_quantizers(materialize(model)).float().eval()


def quantize_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of layers whose inputs are quantized with a calibrated range."""
    return tree_map(getattr(module, INPUT_QUANTIZER), (args, kwargs))


def calibrate_inputs(model: nn.Module, batches: Iterable) -> nn.Module:
    """Rounds the inputs of linear layers and convolutions to 8 bits in ranges found on `batches`
    (`kit.core.protocols.call_of`; floats in any dtype), in place.

    Layers that no batch reaches (their weight is read by other code) stay as they are.
    """
    for module in list(model.modules()):
        if isinstance(module, INTEGER_LAYERS) and not hasattr(module, INPUT_QUANTIZER):
            setattr(module, INPUT_QUANTIZER, ActivationQuantizer(8, symmetric=False))
    calls = (cast(call_of(batch), dtype_of(model)) for batch in batches)
    calibrate(hook_input_quantizers(model), calls)
    return _drop_input_quantizers(model, unless=_input_qparams)


def cast(value, dtype: torch.dtype):
    """A call, or any nest of tensors, with its floating-point tensors in dtype."""
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def hook_input_quantizers(model: nn.Module) -> nn.Module:
    """Lets input quantizers take part in the forward pass, as those from a file do not yet."""
    for module in model.modules():
        hooked = quantize_input in module._forward_pre_hooks.values()
        if hasattr(module, INPUT_QUANTIZER) and not hooked:
            module.register_forward_pre_hook(quantize_input, with_kwargs=True)
    return model


def _drop_input_quantizers(model: nn.Module, unless=lambda module: None) -> nn.Module:
    for module in model.modules():
        if hasattr(module, INPUT_QUANTIZER) and unless(module) is None:
            delattr(module, INPUT_QUANTIZER)
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is quantize_input]:
                del hooks[key]
    return model
