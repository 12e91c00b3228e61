"""Experts: counting who is used, scoring them, dropping or merging, and shrinking the router with them."""

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from kit.models import MoE
from kit.core.calibration import expert_rows, run
from kit.pruning.mask import copy_model
from kit.pruning.least_squares import layer_examples, refit_experts
from kit.pruning.shapes import modules_of, replace, resizing

CRITERIA = ("usage", "reap", "random", "merge")


def check_threshold(threshold: float) -> None:
    """Raises ValueError unless the threshold is a share of tokens that leaves something."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold} is outside [0, 1): give a share of the tokens, such as 0.05")


class PrunedMoELayer(MoE):
    """A mixture of experts that counts the tokens of each expert and can lose those that have too few.

    Wraps a MoE: parameters and buffers are the same objects. `origin` holds the position each remaining
    expert had at first; `history` one entry a pruning: {"origin", "share", "kept"}, all by original position.

    Args:
        moe: the layer to take over; it should not be used afterwards.
        threshold: share of the tokens under which `prune` removes an expert.

    Raises:
        ValueError: threshold outside [0, 1).
    """

    def __init__(self, moe: MoE, threshold: float = 0.05) -> None:
        check_threshold(threshold)
        nn.Module.__init__(self)
        self.__dict__.update(moe.__dict__)
        self.threshold = threshold
        self.origin = list(range(len(moe.usage)))
        self.history: list[dict] = []

    @property
    def shares(self) -> Tensor:
        """(E,) share of the routed tokens that went to each expert since `reset_usage`, training or not.

        Raises:
            ValueError: no token has been counted.
        """
        if not self.usage.sum():
            raise ValueError("no token has been counted yet: run the model over some data first")
        return self.usage / self.usage.sum()

    def prune(self) -> list[int]:
        """Remove the experts with less than `threshold` of the tokens; returns their original positions.

        The most used `top_k` experts always stay. Counting starts again.
        """
        shares = self.shares
        most = shares.argsort(descending=True, stable=True)[:self.top_k]
        keep = shares >= self.threshold
        keep[most] = True
        return self.keep(keep.nonzero()[:, 0])

    def keep(self, experts: Tensor) -> list[int]:
        """Keep the experts at positions `experts`, and the router's rows for them; returns those that went.

        Raises:
            ValueError: fewer than top_k experts would stay.
        """
        keep = sorted(int(expert) for expert in experts)
        if len(keep) < self.top_k:
            raise ValueError(f"{len(keep)} experts would stay, but each token is routed to {self.top_k}: "
                             "keep more")
        shares = (self.usage / self.usage.sum().clamp(min=1)).tolist()
        origin, gone = self.origin, [p for i, p in enumerate(self.origin) if i not in keep]
        with resizing(self):
            keep_experts(self, torch.tensor(keep, device=self.usage.device))
        self.origin = [origin[i] for i in keep]
        self.history.append({"origin": origin, "share": shares, "kept": self.origin})
        return gone


def keep_experts(moe: MoE, keep: Tensor) -> None:
    """Keep experts `keep` (E',) int64 and their rows of the router, in place; the usage count restarts."""
    for name in ("w_in", "b_in", "w_out", "b_out"):
        replace(moe, name, getattr(moe, name)[keep])
    replace(moe.router, "weight", moe.router.weight[keep])
    replace(moe.router, "bias", moe.router.bias[keep])
    moe.router.out_features = len(keep)
    moe.usage = moe.usage.new_zeros(len(keep))


def track_experts(model: nn.Module, threshold: float = 0.05) -> nn.Module:
    """Replace every mixture of experts of the model by a PrunedMoELayer, in place; returns the model.

    Raises:
        ValueError: the model has none, or the threshold is outside [0, 1).
    """
    layers = {name: moe for name, moe in modules_of(model, MoE, "*").items()
              if not isinstance(moe, PrunedMoELayer)}
    check_threshold(threshold)
    if layers:
        with resizing(model):
            for name, moe in layers.items():
                model.set_submodule(name, PrunedMoELayer(moe, threshold))
    return model


def prune_unused_experts(model: nn.Module, batches: Sequence, threshold: float = 0.05) -> nn.Module:
    """A copy of the model without the experts that get less than `threshold` of their layer's tokens.

    Tokens are counted over `batches`. The copy's mixtures of experts are PrunedMoELayers; each keeps at
    least its top_k most used experts, which are refitted to stand in for those that went (`refit_experts`).

    Raises:
        ValueError: no mixture of experts, no batches, or a threshold outside [0, 1).
    """
    small = track_experts(copy_model(model), threshold)
    layers = modules_of(small, PrunedMoELayer, "*")
    for layer in layers.values():
        layer.reset_usage()
    examples = layer_examples(small, list(layers), batches)
    shrunk = {name: examples[name] for name, layer in layers.items() if layer.prune()}
    _refit(small, shrunk)
    return small


def reduce_experts(model: nn.Module, keep: int, batches: Sequence, *, criterion: str = "usage",
                   refit: bool = True, seed: int = 0) -> nn.Module:
    """A copy of the model with at most `keep` experts a layer, chosen by what the tokens of `batches` do.

    Args:
        criterion: "usage", "reap" or "random" drop the experts of lowest score (`expert_scores`); "merge"
            joins the most similar ones (`merge_experts`) until `keep` are left.
        refit: let the experts that stay take over from those that went, by least squares (`refit_experts`).

    Raises:
        ValueError: fewer than top_k experts to keep, an unknown criterion, no mixture of experts, no batches.
    """
    check_reduction(model, keep, criterion)
    small = track_experts(copy_model(model))
    reduce_in_place(small, keep, batches, criterion, refit, seed)
    return small


def check_reduction(model: nn.Module, keep: int, criterion: str) -> None:
    """Raises ValueError where `reduce_experts` would."""
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; choose from {', '.join(CRITERIA)}")
    needed = max(moe.top_k for moe in modules_of(model, MoE, "*").values())
    if keep < needed:
        raise ValueError(f"{keep} experts would stay, but each token is routed to {needed}: keep more")


def reduce_in_place(model: nn.Module, keep: int, batches: Sequence, criterion: str, refit: bool = True,
                    seed: int = 0) -> None:
    """`reduce_experts` on a model that `track_experts` has prepared, in place."""
    layers = {name: layer for name, layer in modules_of(model, PrunedMoELayer, "*").items()
              if layer.w_in.shape[0] > keep}
    for layer in layers.values():
        layer.reset_usage()
    scores = expert_scores(model, batches, "usage" if criterion == "merge" else criterion, seed)
    examples = layer_examples(model, list(layers), batches) if refit else {}
    for name, layer in layers.items():
        if criterion == "merge":
            with resizing(model):
                chosen = merge_experts(layer, keep, layer.usage)
        else:
            chosen = scores[name].argsort(descending=True, stable=True)[:keep]
        layer.keep(chosen)
    _refit(model, examples)


def _refit(model: nn.Module, examples: dict[str, tuple[Tensor, Tensor]]) -> None:
    with resizing(model):
        for name, (inputs, outputs) in examples.items():
            refit_experts(model.get_submodule(name), inputs, outputs)


def expert_scores(model: nn.Module, batches: Sequence, criterion: str = "usage",
                  seed: int = 0) -> dict[str, Tensor]:
    """The score (E,) of each expert, by the name of its layer, from one pass over `batches`.

    "usage": share of the routed tokens. "reap": mean over an expert's tokens of gate * ||expert output||_2
    (Lasby et al. 2025, "REAP the Experts"). "random": the control, drawn from `seed` and the layer's name.

    Raises:
        ValueError: no mixture of experts in the model, or no batches.
    """
    layers = modules_of(model, MoE, "*")
    if criterion == "random":
        return {name: torch.rand(moe.w_in.shape[0], generator=torch.Generator().manual_seed(
            seed + zlib.crc32(name.encode()))) for name, moe in layers.items()}
    counts = {name: torch.zeros(moe.w_in.shape[0], dtype=torch.float64) for name, moe in layers.items()}
    norms = {name: torch.zeros_like(count) for name, count in counts.items()}

    def collect(name: str, moe: MoE, args: tuple) -> None:
        w_out, b_out = moe.w_out, moe.b_out
        for expert, seen in enumerate(expert_rows(moe, args[0])):
            outputs = F.linear(seen.hidden, w_out[expert], b_out[expert])
            counts[name][expert] += len(seen.rows)
            norms[name][expert] += (seen.gates * outputs.norm(dim=-1)).sum().item()

    handles = [moe.register_forward_pre_hook(lambda moe, args, name=name: collect(name, moe, args))
               for name, moe in layers.items()]
    try:
        run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    if criterion == "usage":
        return {name: (count / count.sum()).float() for name, count in counts.items()}
    return {name: (norms[name] / count.clamp(min=1)).float() for name, count in counts.items()}


def align(units: Tensor, reference: Tensor) -> tuple[Tensor, float]:
    """The order of `units` (F, n) that brings each nearest to its row of `reference`, and the distance left.

    Hidden units have no order of their own, so two experts are compared after the best one-to-one assignment;
    the distance is squared (Ainsworth et al. 2023, "Git Re-Basin").
    """
    cost = torch.cdist(reference.double(), units.double()).square().cpu().numpy()
    rows, order = linear_sum_assignment(cost)
    return torch.from_numpy(order).to(units.device), float(cost[rows, order].sum())


def merge_experts(moe: MoE, keep: int, usage: Tensor) -> Tensor:
    """Join the two most similar experts, again and again, until `keep` are left; returns their positions.

    In place, without changing shapes: the more used expert of each pair becomes the usage-weighted mean of
    both, hidden units aligned first, and the other one is to be dropped (`PrunedMoELayer.keep`).
    """
    weights = {expert: max(int(count), 1) for expert, count in enumerate(usage)}
    units = [torch.cat([moe.w_in[e], moe.b_in[e, :, None], moe.w_out[e].T], 1).detach() for e in weights]
    shared = [torch.cat([moe.b_out[e], moe.router.weight[e], moe.router.bias[e, None]]).detach()
              for e in weights]
    aligned = {(a, b): align(units[b], units[a]) for a in weights for b in weights if a != b}
    while len(weights) > keep:
        pairs = [(a, b) for a in weights for b in weights if (weights[a], -a) > (weights[b], -b)]
        a, b = min(pairs, key=lambda pair: aligned[pair][1])
        share = weights[b] / (weights[a] + weights[b])
        units[a] = torch.lerp(units[a], units[b][aligned[a, b][0]], share)
        shared[a] = torch.lerp(shared[a], shared[b], share)
        weights[a] += weights.pop(b)
        for other in weights:
            if other != a:
                aligned[a, other] = align(units[other], units[a])
                aligned[other, a] = align(units[a], units[other])
    d_model = moe.b_out.shape[1]
    with torch.no_grad():
        for e in weights:
            moe.w_in[e], moe.b_in[e] = units[e][:, :d_model], units[e][:, d_model]
            moe.w_out[e] = units[e][:, d_model + 1:].T
            moe.b_out[e], moe.router.weight[e] = shared[e][:d_model], shared[e][d_model:-1]
            moe.router.bias[e] = shared[e][-1]
    return torch.tensor(sorted(weights))
