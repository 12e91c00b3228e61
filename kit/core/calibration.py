"""What a weight sees: second moments of its inputs, from one pass over calibration batches."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.core.protocols import LanguageModel, run
from kit.core.weights import Weight, weights

READERS: dict[type, Callable] = {}


def register_inputs(*kinds: type) -> Callable:
    """Decorator for reader(module, attribute, x), which says what multiplies a weight when a module
    of these classes is called with x: a list of (rows, columns), one a group; None for others."""

    def register(reader: Callable) -> Callable:
        READERS.update(dict.fromkeys(kinds, reader))
        return reader

    return register


@register_inputs(nn.Linear)
def _linear(module: nn.Module, attribute: str, x: Tensor) -> list[Tensor] | None:
    return [x.reshape(-1, x.shape[-1])] if attribute == "weight" else None


@register_inputs(nn.Conv1d, nn.Conv2d)
def _convolution(module: nn.Conv1d | nn.Conv2d, attribute: str, x: Tensor) -> list[Tensor] | None:
    if attribute != "weight" or module.padding_mode != "zeros":
        return None
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:
        x = x.unsqueeze(0)
    x = F.pad(x, module._reversed_padding_repeated_twice)
    for axis in range(spatial):
        window = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, window, module.stride[axis])[..., :: module.dilation[axis]]
    columns = x.movedim(1, 1 + spatial).flatten(0, spatial)  # (positions, channels, *kernel)
    return [part.flatten(1) for part in columns.chunk(module.groups, 1)]


def _reader(weight: Weight) -> Callable | None:
    if weight.view.transposed and weight.original.ndim == 2:
        return _linear
    return next((READERS[kind] for kind in type(weight.module).__mro__ if kind in READERS), None)


def _is_output(weight: Weight) -> bool:
    """Whether a weight is a language model's output layer, which is read without being called."""
    if not (isinstance(weight.model, LanguageModel) and isinstance(weight.module, nn.Linear)):
        return False
    output = weight.model.output()[0]
    return output.shape == weight.original.shape and torch.equal(output, weight.value)


@torch.no_grad()
def input_grams(
    model: nn.Module, batches: Iterable, select: str | Iterable[str] = "*", strict: bool = True
) -> dict[str, Tensor]:
    """X^T X of what multiplies each weight matrix, summed over all calibration tokens, float64
    (groups, C, C), in the order in which the model uses the weights.

    As the weight in `MatrixView.stack` (groups, R, C): linear layers have one group, convolutions
    their own groups, stacked experts one group an expert (only the tokens routed to it).

    Args:
        strict: raise ValueError for a weight whose inputs are not known; else leave it out.
    Raises ValueError without a batch, and for inputs that are not finite.
    """
    grams: dict[str, Tensor] = {}

    def collect(pairs: list[tuple[Weight, Callable]], x: Tensor, output: Tensor | None) -> None:
        for weight, reader in pairs:
            rows = reader(weight.module, weight.attribute, x)
            if rows is not None:
                gram = torch.stack([part.double().T @ part.double() for part in rows])
                grams[weight.name] = grams.get(weight.name, 0) + gram

    found, outputs, called = weights(model, select, matrices=True), [], defaultdict(list)
    for weight in found:
        if _is_output(weight):
            outputs.append((weight, _linear))
        elif reader := _reader(weight):
            called[weight.name.rpartition(".")[0]].append((weight, reader))
    watch = {path: partial(collect, pairs) for path, pairs in called.items()}
    for x in run(model, batches, watch):
        collect(outputs, x, None)
    for weight in found:
        if strict and weight.name not in grams:
            kind = type(weight.module).__name__
            raise ValueError(
                f"the inputs of {weight.name!r} ({kind}) cannot be collected: select weights of "
                "linear, convolution or mixture-of-experts layers that the model calls"
            )
        if weight.name in grams and not torch.isfinite(grams[weight.name]).all():
            raise ValueError(f"the inputs of {weight.name!r} hold NaN or infinite values")
    return grams


def input_norms(
    model: nn.Module, batches: Iterable, select: str | Iterable[str] = "*"
) -> dict[str, Tensor]:
    """Norm of each input feature over the calibration tokens, float32 (groups, C): for Wanda.

    "*" is every weight whose inputs are known; what is named by a narrower pattern must be one.
    """
    grams = input_grams(model, batches, select, strict=select != "*")
    return {name: gram.diagonal(dim1=-2, dim2=-1).sqrt().float() for name, gram in grams.items()}
