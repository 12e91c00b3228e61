"""Least squares after structured pruning: what reads the units that stay makes up for those that went."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kit.core.protocols import run
from kit.core.weights import Weight, weight_of
from kit.models import MoE
from kit.models.moe import expert_rows
from kit.pruning.mask import Mask

DAMPING = 0.01
SWEEPS = 5


def least_squares(
    features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weight (R, K) and bias (R,) nearest to the given ones that make features reproduce targets.

    Minimizes || s (h W^T + b) - y ||^2 + lambda || [W, b] - [W_0, b_0] ||^2 with lambda a hundredth of
    the mean diagonal of the Gram matrix (He et al. 2017, "Channel Pruning", with a prior at the present
    weights).

    Args:
        features: (m, K). targets: (m, R). scale: s, (m,), such as the gates of an expert.
    """
    if not len(features):
        return weight, bias
    ones = features.new_ones(len(features), 1)
    inputs = torch.cat([features, ones], 1).double() * (1 if scale is None else scale.double()[:, None])
    before = torch.cat([weight, bias[:, None]], 1).double().T
    gram = inputs.T @ inputs
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    after = before + torch.linalg.solve(damped, inputs.T @ (targets.double() - inputs @ before))
    return after[:-1].T.to(weight.dtype), after[-1].to(bias.dtype)


def layer_examples(model: nn.Module, names: Sequence[str], batches: Sequence) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of submodules over `batches`, as rows: name -> ((M, D_in), (M, D_out))."""
    seen: dict[str, tuple[list, list]] = {name: ([], []) for name in names}

    def keep(name: str) -> Callable:
        def rows(x: Tensor, output: Tensor) -> None:
            for found, part in zip(seen[name], (x, output)):
                found.append(part.reshape(-1, part.shape[-1]))

        return rows

    run(model, batches, {name: keep(name) for name in names})
    return {name: (torch.cat(inputs), torch.cat(outputs)) for name, (inputs, outputs) in seen.items()}


def _is_masked(weight: Weight) -> bool:
    return weight.find(Mask) is not None


@torch.no_grad()
def refit_experts(moe: MoE, inputs: Tensor, outputs: Tensor) -> None:
    """Fits w_out and b_out of each expert, in place, to map `inputs` (M, D) to `outputs` (M, D).

    Each expert in turn takes the error that the others leave on its own tokens; with more than one
    expert a token, in several sweeps. A masked w_out is left alone.
    """
    w_out, b_out = weight_of(moe, "w_out"), weight_of(moe, "b_out")
    if _is_masked(w_out):
        return
    for _ in range(1 if moe.top_k == 1 else SWEEPS):
        for expert in range(moe.w_in.shape[0]):
            residual = outputs - moe(inputs)
            rows, _, hidden, gates = list(expert_rows(moe, inputs))[expert]
            weight, bias = w_out.value[expert], b_out.value[expert]
            own = gates[:, None] * (hidden @ weight.T + bias)
            fitted = least_squares(hidden, residual[rows] + own, weight, bias, gates)
            w_out.original[expert], b_out.original[expert] = fitted
    moe.reset_usage()


@torch.no_grad()
def refit_linear(layer: nn.Linear, features: Tensor, outputs: Tensor) -> None:
    """Fits a linear layer, in place, to map `features` (M, K) to `outputs` (M, R), unless it is masked."""
    weight, bias = weight_of(layer), weight_of(layer, "bias")
    if not _is_masked(weight):
        for part, value in zip((weight, bias), least_squares(features, outputs, weight.value, bias.value)):
            part.assign(value)
