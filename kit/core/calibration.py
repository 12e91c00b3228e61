"""What a weight sees: second moments of its inputs, from one pass over a few calibration batches."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.core.protocols import LanguageModel, run
from kit.core.weights import Weight, weights

READERS: dict[type, Callable] = {}


def register_inputs(*kinds: type) -> Callable:
    """Decorator for reader(module, attribute, x): a list, one a group of the weight, of what multiplies
    it, (rows, columns), when a module of these classes is called with x; None for other attributes."""

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
    model: nn.Module, batches: Sequence, select: str | Iterable[str] = "*", strict: bool = True
) -> dict[str, Tensor]:
    """X^T X of what multiplies each weight matrix, summed over all calibration tokens, float64 (groups, C,
    C), in the order in which the model uses the weights.

    The weight as `MatrixView.stack` (groups, R, C): linear layers have one group, convolutions their own
    groups, stacked experts one group an expert (only the tokens routed to it).

    Args:
        strict: raise ValueError for a weight whose inputs are not known; else leave it out.
    Raises ValueError without a batch.
    """
    grams: dict[str, Tensor] = {}

    def collect(weight: Weight, reader: Callable, x: Tensor) -> None:
        rows = reader(weight.module, weight.attribute, x)
        if rows is not None:
            gram = torch.stack([part.double().T @ part.double() for part in rows])
            grams[weight.name] = grams.get(weight.name, 0) + gram

    handles, outputs = [], []
    found = weights(model, select, matrices=True)
    for weight in found:
        reader = _reader(weight)
        if _is_output(weight):
            outputs.append(weight)
        elif reader is not None:
            hook = lambda module, args, kwargs, w=weight, r=reader: collect(w, r, _first(args, kwargs))  # noqa: E731
            handles.append(weight.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        hidden = run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    for weight in outputs:
        for x in hidden:
            collect(weight, _linear, x)
    missing = next((weight for weight in found if weight.name not in grams), None)
    if strict and missing is not None:
        raise ValueError(
            f"the inputs of {missing.name!r} ({type(missing.module).__name__}) cannot be collected: select "
            "weights of linear, convolution or mixture-of-experts layers that the model calls"
        )
    return grams


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def input_norms(model: nn.Module, batches: Sequence, select: str | Iterable[str] = "*") -> dict[str, Tensor]:
    """Norm of each input feature over the calibration tokens, float32 (groups, C): what Wanda needs."""
    grams = input_grams(model, batches, select)
    return {name: gram.diagonal(dim1=-2, dim2=-1).sqrt().float() for name, gram in grams.items()}
