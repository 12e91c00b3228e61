"""What a weight sees: second moments of its inputs, and its gradients, over some batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from kit.core.protocols import LanguageModel, device_of, evaluating, run, tree_map
from kit.core.weights import Weight, class_of, weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "_grouped_mm", "grouped_mm"}


class _Products(TorchFunctionMode):
    """Calls collect(weight, group, rows) with what is multiplied by weights or parts of them,
    whatever code does it: x w^T, or x w for those held transposed, of one expert, of all, or of
    rows sorted by expert."""

    def __init__(self, found: list[Weight], collect: Callable):
        super().__init__()
        held, self.collect = [(weight, weight.value) for weight in found], collect
        self.found = {pair[1].untyped_storage().data_ptr(): pair for pair in held}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in PRODUCTS:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            for x, w, *rest in (tensors[i:] for i in range(len(tensors) - 1)):
                if w.ndim > 1 and (held := self.found.get(w.untyped_storage().data_ptr())):
                    self._see(*held, x, w, w.stride(-1 if name == "linear" else -2), rest)
        return function(*args, **kwargs)

    def _see(self, weight: Weight, value: Tensor, x: Tensor, w: Tensor, stride: int, rest) -> None:
        inputs = -2 if weight.view.transposed else -1
        if stride != value.stride(inputs) or x.shape[-1] != value.shape[inputs]:
            return
        if w.ndim == 2:
            offset = w.storage_offset() - value.storage_offset()
            group = offset // value.stride(0) if value.ndim == 3 else 0
            self.collect(weight, group, x.reshape(-1, x.shape[-1]))
        elif x.ndim == 3 or rest:
            parts = x if x.ndim == 3 else x.tensor_split(rest[0].tolist()[:-1])
            for group, rows in enumerate(parts):
                self.collect(weight, group, rows)


def _patches(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What multiplies the weight of each group of a convolution, (positions, columns)."""
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:
        x = x.unsqueeze(0)
    mode = module.padding_mode.replace("zeros", "constant")
    x = F.pad(x, module._reversed_padding_repeated_twice, mode)
    for axis in range(spatial):
        window = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, window, module.stride[axis])[..., :: module.dilation[axis]]
    columns = x.movedim(1, 1 + spatial).flatten(0, spatial)  # (positions, channels, *kernel)
    return [part.flatten(1) for part in columns.chunk(module.groups, 1)]


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

    def collect(weight: Weight, group: int, rows: Tensor) -> None:
        if weight.name not in grams:
            shape = weight.view.split[0], weight.view.columns, weight.view.columns
            grams[weight.name] = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        grams[weight.name][group] += rows.double().T @ rows.double()

    def convolved(weight: Weight, x: Tensor, output: Tensor) -> None:
        for group, rows in enumerate(_patches(weight.module, x)):
            collect(weight, group, rows)

    found, outputs, multiplied, watch = weights(model, select, matrices=True), [], [], {}
    for weight in found:
        if _is_output(weight):
            outputs.append(weight)
        elif isinstance(weight.module, _ConvNd):
            if class_of(weight.module) in CONVOLUTIONS and weight.attribute == "weight":
                watch[weight.name.rpartition(".")[0]] = partial(convolved, weight)
        elif not isinstance(weight.module, nn.Embedding):
            multiplied.append(weight)
    with parametrize.cached(), _Products(multiplied, collect):
        states = run(model, batches, watch)
    for weight, x in itertools.product(outputs, states):
        collect(weight, 0, x.flatten(0, -2))
    for weight in found:
        if strict and weight.name not in grams:
            what = f"the inputs of {weight.name!r} cannot be collected, as {_why_unknown(weight)}"
            raise ValueError(f"{what}: select matrices that inputs are multiplied with")
        if weight.name in grams and not torch.isfinite(grams[weight.name]).all():
            raise ValueError(f"the inputs of {weight.name!r} hold NaN or infinite values")
    return grams


def without_inputs(model: nn.Module, known: Iterable[str]) -> dict[str, str]:
    """The names of all weight matrices but those in `known`, and why no inputs are known."""
    others = (weight for weight in weights(model, matrices=True) if weight.name not in known)
    return {weight.name: _why_unknown(weight) for weight in others}


def _why_unknown(weight: Weight) -> str:
    lookup = isinstance(weight.module, (nn.Embedding, nn.EmbeddingBag))
    does = "looks its rows up" if lookup else "shows no inputs that are multiplied with it"
    return f"this {class_of(weight.module).__name__} {does}"


def input_norms(
    model: nn.Module, batches: Iterable, select: str | Iterable[str] = "*"
) -> dict[str, Tensor]:
    """Norm of each input feature over the calibration tokens, float32 (groups, C): for Wanda. "*"
    is every weight whose inputs are known (`without_inputs` tells of the others); what is named by
    a narrower pattern must be one."""
    grams = input_grams(model, batches, select, strict=select != "*")
    return {name: gram.diagonal(dim1=-2, dim2=-1).sqrt().float() for name, gram in grams.items()}


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients, of frozen parameters too; all is as it was afterwards."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    own = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    try:
        with evaluating(model), torch.enable_grad(), own:  # cuDNN's RNNs have none in this mode
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def gradients(model: nn.Module, batches: Iterable, loss: Callable) -> Iterator[dict[str, Tensor]]:
    """For each batch, moved to the model's device, the gradients of loss(model, batch) in the
    trained values of every weight that has one, by name, in evaluation mode and of frozen weights
    too; the model's own are cleared. Raises ValueError without a batch, and for a loss that no
    parameter has a part in."""
    batch, device = None, device_of(model)
    for batch in batches:
        model.zero_grad(set_to_none=True)
        with differentiable(model):
            value = loss(model, tree_map(lambda tensor: tensor.to(device), batch))
            if not value.requires_grad:
                what = f"the loss has no gradient in the parameters of this {type(model).__name__}"
                raise ValueError(f"{what}: give a model whose parameters make its outputs")
            value.backward()
        found = {weight.name: weight.original.grad for weight in weights(model)}
        model.zero_grad(set_to_none=True)
        found = {name: grad for name, grad in found.items() if grad is not None}
        yield {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}
    if batch is None:
        raise ValueError("gradients of a loss got no batch: give at least one")
