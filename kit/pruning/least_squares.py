"""Least squares after structured pruning: what reads the units that stay makes up for the rest."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kit.core.protocols import run
from kit.core.weights import weight_of
from kit.models import MoE
from kit.models.moe import expert_rows
from kit.pruning.mask import Mask, check_prunable

DAMPING = 0.01
SWEEPS = 5


def least_squares(
    features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weight (R, K) and bias (R,) nearest to the given ones that turn features into targets.

    Minimizes || s (h W^T + b) - y ||^2 + lambda || [W, b] - [W_0, b_0] ||^2, lambda a hundredth of
    the mean diagonal of the Gram matrix (He et al. 2017, "Channel Pruning", with a prior), features
    h (m, K), targets y (m, R), and scale s (m,), such as the gates of an expert.
    """
    if not len(features):
        return weight, bias
    ones = features.new_ones(len(features), 1)
    scales = 1 if scale is None else scale.double()[:, None]
    inputs = torch.cat([features, ones], 1).double() * scales
    before = torch.cat([weight, bias[:, None]], 1).double().T
    gram = inputs.T @ inputs
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    after = before + torch.linalg.solve(damped, inputs.T @ (targets.double() - inputs @ before))
    return after[:-1].T.to(weight.dtype), after[-1].to(bias.dtype)


def layer_examples(model: nn.Module, names: Iterable[str], batches: Iterable) -> dict[str, tuple]:
    """Inputs and outputs of submodules over `batches`, as rows: name -> ((M, D_in), (M, D_out))."""
    seen: dict[str, list] = {name: [] for name in names}

    def keep(name: str) -> Callable:
        return lambda *pair: seen[name].append([part.flatten(0, -2) for part in pair])

    run(model, batches, {name: keep(name) for name in seen})
    return {name: tuple(map(torch.cat, zip(*pairs))) for name, pairs in seen.items()}


@torch.no_grad()
def refit_experts(moe: MoE, inputs: Tensor, outputs: Tensor) -> None:
    """Fits w_out and b_out of each expert, in place, to map `inputs` (M, D) to `outputs` (M, D).
    Each expert in turn takes the error that the others leave on its own tokens; with more than one
    expert a token, in several sweeps. A masked w_out is left alone."""
    w_out, b_out = weight_of(moe, "w_out"), weight_of(moe, "b_out")
    check_prunable(w_out)
    if w_out.find(Mask):
        return
    seen = list(expert_rows(moe, inputs))
    for _ in range(1 if moe.top_k == 1 else SWEEPS):
        for expert, (rows, _, hidden, gates) in enumerate(seen):
            weight, bias = w_out.value[expert], b_out.value[expert]
            own = gates[:, None] * (hidden @ weight.T + bias)
            targets = (outputs - moe(inputs))[rows] + own
            fitted = least_squares(hidden, targets, weight, bias, gates)
            w_out.original[expert], b_out.original[expert] = fitted
    moe.reset_usage()


@torch.no_grad()
def refit_linear(layer: nn.Linear, features: Tensor, outputs: Tensor) -> None:
    """Fits a layer, in place, to map `features` (M, K) to `outputs` (M, R), unless it is masked."""
    weight, bias = weight_of(layer), weight_of(layer, "bias")
    check_prunable(weight)
    if not weight.find(Mask):
        fitted = least_squares(features, outputs, weight.value, bias.value)
        weight.assign(fitted[0]), bias.assign(fitted[1])
