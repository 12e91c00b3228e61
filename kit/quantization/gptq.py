"""Rounding that repairs: GPTQ (Frantar et al. 2022, arXiv:2210.17323) and bias correction (Nagel et al. 2019)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kit.core.weights import find_step, original_of
from kit.core.calibration import evaluating, input_grams, model_inputs
from kit.pruning.mask import Slot, select
from kit.quantization import formats
from kit.quantization.fake import FakeQuantize, quantize_weights
from kit.quantization.formats import Format

BLOCK = 128


def gptq_round(weight: Tensor, gram: Tensor, scale: Tensor, zero: Tensor | None, format: Format,
               damping: float = 0.01) -> Tensor:
    """Values of a fixed grid that make tr (W - Q) H (W - Q)^T small, H = X^T X of the weight's inputs.

    Columns are rounded by falling H_jj (act-order); the error of each is spread over those still to come:
    w_{>j} -= (w_j - q_j) / U_jj * U_{j,>j}, U^T U = (H + damping * mean(diag H))^-1 (algorithm 1, Cholesky form).

    Args:
        weight (G, R, C) and gram (G, C, C), one for each set of inputs. scale and zero: (G, R, C), of each weight.
    Returns (G, R, C) float32: scale * (codes - zero).
    """
    order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    columns = order[:, None, :].expand_as(weight)
    ordered = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None].expand_as(gram))
    upper = _inverse_factor(ordered, damping)
    rest, scale = weight.double().gather(2, columns), scale.gather(2, columns)
    zero = None if zero is None else zero.gather(2, columns)
    rounded = torch.empty_like(scale)
    for first in range(0, weight.shape[2], BLOCK):
        last = min(first + BLOCK, weight.shape[2])
        errors = torch.zeros_like(rest[:, :, first:last])
        for j in range(first, last):
            at = (slice(None), slice(None), slice(j, j + 1))
            grid = scale[at], None if zero is None else zero[at]
            rounded[at] = formats.dequantize(formats.quantize(rest[at], *grid, format), *grid)
            errors[:, :, j - first] = ((rest[at] - rounded[at]) / upper[:, j:j + 1, j:j + 1])[:, :, 0]
            rest[:, :, j + 1:last] -= errors[:, :, j - first, None] * upper[:, j:j + 1, j + 1:last]
        rest[:, :, last:] -= errors @ upper[:, first:last, last:]
    return torch.empty_like(rounded).scatter(2, columns, rounded)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U (G, C, C), U^T U = (gram + damping * mean diagonal)^-1; inputs that never fired count as independent."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    extra = damping * diagonal.mean(1, keepdim=True) + (diagonal == 0)
    lower = torch.linalg.cholesky(gram + torch.diag_embed(extra))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


@torch.no_grad()
def gptq(model: nn.Module, plan: Format | Mapping[str, Format | None], batches: Sequence,
         damping: float = 0.01) -> nn.Module:
    """`quantize_weights` and then GPTQ on every weight whose inputs can be collected, in place, in the order of use.

    Each weight's inputs come from the model with all before it rounded, one pass a weight over `batches` (a list of
    inputs, or of tuples that start with them). What is not multiplied with inputs (embeddings) or hides them (recurrent
    layers) keeps the nearest codes. Masked weights stay zero. The grids are fixed afterwards.
    Raises ValueError if there is no batch.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("GPTQ got no batch: expected at least one to measure the inputs of each weight on")
    quantize_weights(model, plan)
    slots = {name: slot for name, slot in select(model).items() if (q := _quantizer(slot)) and q.format.bits != 16}
    for name in _in_order_of_use(model, slots, batches[:1]):
        slot = slots[name]
        quantizer, gram = _quantizer(slot), _gram(model, slot, batches)
        weight = torch.where(slot.mask, slot.parameter, 0.0).float()
        scale, zero = quantizer.grid(weight)
        grid = [None if part is None else slot.stack(quantizer.spread(part).reshape(weight.shape))
                for part in (scale, zero)]
        rounded = gptq_round(slot.stack(weight), gram, *grid, quantizer.format, damping)
        slot.parameter.copy_(rounded.reshape(weight.shape))
        quantizer.set_grid(scale, zero)
    return model


def _quantizer(slot: Slot) -> FakeQuantize | None:
    return find_step(slot.module, slot.attribute, FakeQuantize)


def _is_output(model: nn.Module, slot: Slot) -> bool:
    """Whether a weight is the output matrix of a language model, which is read without calling its layer."""
    head = getattr(model, "head", None)
    return hasattr(model, "output") and slot.module is head and model.output()[0].shape == slot.parameter.shape


def _gram(model: nn.Module, slot: Slot, batches: Sequence) -> Tensor | None:
    """X^T X (groups, C, C) float64 of a weight's inputs; None where they are not known."""
    if not _is_output(model, slot):
        try:
            return input_grams(model, batches, slot.name)[slot.name]
        except ValueError:  # no layer whose inputs are known: there are batches
            return None
    total = 0
    with evaluating(model):
        for batch in batches:
            rows = model.hidden(model_inputs(batch).to(slot.parameter.device)).flatten(0, -2).double()
            total = total + rows.T @ rows
    return total[None]


def _in_order_of_use(model: nn.Module, slots: Mapping[str, Slot], batches: Sequence) -> list[str]:
    known = [name for name, slot in slots.items()
             if not _is_output(model, slot) and _gram(model, slot, batches) is not None]
    ordered = list(input_grams(model, batches, known)) if known else []
    return ordered + [name for name, slot in slots.items() if _is_output(model, slot)]


@torch.no_grad()
def correct_bias(model: nn.Module, reference: nn.Module, batches: Sequence) -> nn.Module:
    """Shifts the bias of each quantized Linear and convolution so that its mean output is that of the same layer in
    `reference`, the model before quantization; layer by layer, in place, in the order of use. Returns the model.

    A language model's output layer is not called, so it keeps its bias. Raises ValueError if there is no batch.
    """
    batches, wanted = list(batches), {}
    if not batches:
        raise ValueError("bias correction got no batch: expected at least one to measure mean outputs on")
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) and module.bias is not None
             and find_step(module, "weight", FakeQuantize) is not None]
    wanted = _mean_outputs(reference, names, batches)
    for name in wanted:
        module = model.get_submodule(name)
        original_of(module, "bias").add_(wanted[name] - _mean_outputs(model, [name], batches)[name])
    return model


def _mean_outputs(model: nn.Module, names: Sequence[str], batches: Sequence) -> dict[str, Tensor]:
    """Mean output (channels,) of each named layer over batches and positions, in the order of use."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, module: nn.Module, y: Tensor) -> None:
        axis = -1 if isinstance(module, nn.Linear) else 1 if y.ndim == module.weight.ndim else 0
        flat = y.movedim(axis, -1).reshape(-1, y.shape[axis]).double()
        sums[name] = sums.get(name, 0) + flat.sum(0)
        counts[name] = counts.get(name, 0) + len(flat)

    handles = [model.get_submodule(name).register_forward_hook(lambda module, args, y, name=name: add(name, module, y))
               for name in names]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in batches:
                model(model_inputs(batch).to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items()}
