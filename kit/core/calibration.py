"""What a weight sees: second moments of its inputs, from one pass over a few calibration batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.models.moe import MoE
from kit.pruning.mask import Slot, select


def model_inputs(batch: object) -> Tensor:
    """The inputs of a batch, which is a tensor or a tuple that starts with it."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def run(model: nn.Module, batches: Sequence) -> None:
    """Forward passes in evaluation mode, on the model's device.

    Raises:
        ValueError: no batch at all.
    """
    device = next(model.parameters()).device
    seen = 0
    with evaluating(model):
        for seen, batch in enumerate(batches, 1):
            model(model_inputs(batch).to(device))
    if not seen:
        raise ValueError("calibration needs at least one batch of inputs, got none")


def routing(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (M, D), gates and their experts (M, top_k) for inputs x (..., D), as in the layer's forward."""
    rows = x.reshape(-1, x.shape[-1])
    gates, chosen = moe.router(rows).softmax(-1).topk(moe.top_k)
    return rows, gates, chosen


class ExpertRows(NamedTuple):
    """What one expert sees: row numbers (m,) int64, inputs (m, D), hidden units (m, F), gates (m,)."""

    rows: Tensor
    inputs: Tensor
    hidden: Tensor
    gates: Tensor


def expert_rows(moe: MoE, x: Tensor) -> Iterator[ExpertRows]:
    """Expert by expert, the rows of x (..., D) that are routed to it; hidden units are after GELU."""
    rows, gates, chosen = routing(moe, x)
    w_in, b_in = moe.w_in, moe.b_in
    for expert in range(w_in.shape[0]):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        hidden = F.gelu(F.linear(rows[token], w_in[expert], b_in[expert]))
        yield ExpertRows(token, rows[token], hidden, gates[token, choice])


def _linear(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [x.reshape(-1, x.shape[-1])]


def _convolution(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> list[Tensor]:
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:
        x = x.unsqueeze(0)
    x = F.pad(x, module._reversed_padding_repeated_twice)
    for axis in range(spatial):
        window = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, window, module.stride[axis])[..., ::module.dilation[axis]]
    columns = x.movedim(1, 1 + spatial).flatten(0, spatial)     # (positions, channels, *kernel)
    return [part.flatten(1) for part in columns.chunk(module.groups, 1)]


def _readers(slot: Slot) -> Callable[[nn.Module, Tensor], list[Tensor]] | None:
    module = slot.module
    if isinstance(module, MoE) and slot.attribute in ("w_in", "w_out"):
        part = "inputs" if slot.attribute == "w_in" else "hidden"
        return lambda moe, x: [getattr(rows, part) for rows in expert_rows(moe, x)]
    if isinstance(module, nn.Linear):
        return _linear
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding_mode == "zeros":
        return _convolution
    return None


def input_grams(model: nn.Module, batches: Sequence, tensors: str | Iterable[str] = "*") -> dict[str, Tensor]:
    """X^T X of what multiplies each weight, summed over all calibration tokens, float64 (groups, C, C).

    The weight as `Slot.stack` (groups, R, C): linear layers have one group, convolutions their own groups,
    expert stacks one group an expert (only the tokens routed to it). In the order in which the model uses the
    weights.

    Raises:
        ValueError: a selected tensor whose inputs are not known, or no batches.
    """
    slots = select(model, tensors)
    readers = {name: _readers(slot) for name, slot in slots.items()}
    for name, reader in readers.items():
        if reader is None:
            kind = type(slots[name].module).__name__
            raise ValueError(f"the inputs of {name!r} ({kind}) cannot be collected: "
                             "select weights of linear, convolution or mixture-of-experts layers")
    grams: dict[str, Tensor] = {}

    def collect(name: str, module: nn.Module, args: tuple) -> None:
        rows = [x.double() for x in readers[name](module, args[0])]
        gram = torch.stack([x.T @ x for x in rows])
        grams[name] = grams[name] + gram if name in grams else gram

    handles = [slot.module.register_forward_pre_hook(
        lambda module, args, name=name: collect(name, module, args)) for name, slot in slots.items()]
    try:
        run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in slots if name not in grams]
    if missing:
        raise ValueError(f"the model reads {missing[0]!r} without calling its layer, so that its inputs "
                         "cannot be collected: select other weights")
    return grams


def input_norms(model: nn.Module, batches: Sequence, tensors: str | Iterable[str] = "*") -> dict[str, Tensor]:
    """Norm of each input feature over the calibration tokens, float32 (groups, C): what Wanda needs."""
    grams = input_grams(model, batches, tensors)
    return {name: gram.diagonal(dim1=-2, dim2=-1).sqrt().float() for name, gram in grams.items()}
