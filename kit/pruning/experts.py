"""Experts: counting who is used, scoring them, dropping or merging, and shrinking the router with
them; in one step, or in stages with training between, each small enough to recover from."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kit.core.settings import BelowOne, Seed, checks
from kit.core.store import digest
from kit.core.weights import copy_model, weight_of
from kit.models import MoE, refresh_config
from kit.models.moe import expert_rows
from kit.pruning.criteria import random_scores
from kit.pruning.least_squares import layer_examples, refit_experts
from kit.pruning.mask import check_prunable
from kit.pruning.structured import modules_of
from kit.training import TrainConfig, train
from kit.training.losses import next_token_loss

Score = Literal["usage", "reap", "random"]
Criterion = Literal[Score, "merge"]
PARTS = ("w_in", "b_in", "w_out", "b_out")


class PrunedMoELayer(MoE):
    """A mixture of experts that counts the tokens of each expert and can lose the idle ones.

    Takes over `moe`, which should not be used afterwards: parameters and buffers are the same
    objects. `origin` holds the position that each remaining expert had at first, `history` an entry
    {"origin", "share", "kept"} a pruning. `threshold`: share of the tokens under which `prune`
    removes an expert; raises ValueError outside [0, 1).
    """

    @checks
    def __init__(self, moe: MoE, threshold: BelowOne = 0.05) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(moe.__dict__)
        if parametrize.is_parametrized(moe):  # torch put properties on that module's own class
            own = {k: v for k, v in vars(type(moe)).items() if k not in ("__dict__", "__weakref__")}
            self.__class__ = type(PrunedMoELayer.__name__, (PrunedMoELayer,), own)
        self.threshold, self.history = threshold, []
        self.origin = list(range(len(moe.usage)))

    @property
    def shares(self) -> Tensor:
        """(E,) share of the routed tokens that went to each expert since `reset_usage`; ValueError
        if none did."""
        if not self.usage.sum():
            raise ValueError("no token has been counted yet: run the model over some data first")
        return self.usage / self.usage.sum()

    def prune(self) -> list[int]:
        """Removes the experts with less than `threshold` of the tokens, but not the `top_k` most
        used; returns their original positions."""
        keep = self.shares >= self.threshold
        keep[self.shares.argsort(descending=True, stable=True)[: self.top_k]] = True
        return self.keep(keep.nonzero()[:, 0])

    def keep(self, experts: Iterable[int]) -> list[int]:
        """Keeps the experts at these positions and the router's rows for them, and counts from 0;
        returns the original positions of the others. ValueError if fewer than top_k would stay."""
        keep = sorted(int(expert) for expert in experts)
        _check_count(len(keep), self.top_k)
        origin, shares = self.origin, self.usage / self.usage.sum().clamp(min=1)
        keep_experts(self, torch.tensor(keep, device=self.usage.device))
        self.origin = [origin[i] for i in keep]
        self.history.append({"origin": origin, "share": shares.tolist(), "kept": self.origin})
        return [expert for expert in origin if expert not in self.origin]


def _check_reduction(model: nn.Module, keep: int) -> None:
    _check_count(keep, max(moe.top_k for moe in modules_of(model, MoE).values()))


def _check_count(keep: int, top_k: int) -> None:
    if keep < top_k:
        raise ValueError(f"{keep} experts would stay, but a token is routed to {top_k}: keep more")


def keep_experts(moe: MoE, keep: Tensor) -> None:
    """Keeps experts `keep` (E',) int64 and their rows of the router, in place; counts from 0."""
    of_router = [weight_of(moe.router, name) for name in ("weight", "bias")]
    for weight in [weight_of(moe, name) for name in PARTS] + of_router:
        weight.select(lambda t: t[keep])
    moe.router.out_features = len(keep)
    moe.usage = moe.usage.new_zeros(len(keep))


def track_experts(model: nn.Module, threshold: float = 0.05) -> nn.Module:
    """Makes every mixture of experts of the model a PrunedMoELayer, in place; returns the model.
    Raises ValueError: the model has none, or the threshold is outside [0, 1)."""
    for name, moe in modules_of(model, MoE).items():
        if not isinstance(moe, PrunedMoELayer):
            model.set_submodule(name, PrunedMoELayer(moe, threshold))
    return model


def prune_unused_experts(model: nn.Module, batches: Iterable, threshold: float = 0.05) -> nn.Module:
    """A copy of the model without the experts that get less than `threshold` of a layer's tokens in
    `batches`; those that stay, its top_k most used at least, are refitted to stand in for them.
    Raises ValueError: no mixture of experts, no batches, or a threshold outside [0, 1)."""
    small = track_experts(copy_model(model), threshold)
    for layer in modules_of(small, PrunedMoELayer).values():
        layer.threshold = threshold
    _reduce(small, batches)
    return small


@checks
def reduce_experts(
    model: nn.Module, keep: int, batches: Iterable, *,
    criterion: Criterion = "usage", refit: bool = True, seed: Seed = 0,
) -> nn.Module:  # fmt: skip
    """A copy of the model with at most `keep` experts a layer, by what they do on `batches`.

    criterion: "usage", "reap" or "random" drop the experts of lowest score (`expert_scores`);
        "merge" joins the most similar ones (`merge_experts`) until `keep` are left.
    refit: let the experts that stay take over from those that went, by least squares.
    Raises ValueError: keep below top_k, an unknown criterion, no mixture of experts, no batches.
    """
    _check_reduction(model, keep)
    small = track_experts(copy_model(model))
    _reduce(small, batches, keep, criterion, refit, seed)
    return small


def _reduce(model, batches, keep=None, criterion="usage", refit=True, seed=0) -> None:
    """Takes experts off a model that `track_experts` has prepared, in place, after a pass over the
    batches: all but `keep` a layer, or those under its threshold; the others are refitted."""
    layers = modules_of(model, PrunedMoELayer)
    for layer in layers.values():
        layer.reset_usage()
    for name, (inputs, outputs) in layer_examples(model, layers, batches).items():
        layer, gone = layers[name], []
        if keep is None:
            gone = layer.prune()
        elif len(layer.usage) > keep and criterion == "merge":
            gone = layer.keep(merge_experts(layer, keep, layer.usage))
        elif len(layer.usage) > keep:
            scores = _scores(name, layer, inputs, criterion, seed)
            gone = layer.keep(scores.argsort(descending=True, stable=True)[:keep])
        if gone and refit:
            refit_experts(layer, inputs, outputs)
    refresh_config(model)


@checks
def expert_scores(
    model: nn.Module, batches: Iterable, criterion: Score = "usage", seed: Seed = 0
) -> dict[str, Tensor]:
    """The score (E,) of each expert, by the name of its layer, from one pass over `batches`.

    "usage": share of the routed tokens. "reap": mean over an expert's tokens of gate * ||output||_2
    (Lasby et al. 2025, "REAP the Experts"). "random": the control, drawn from `seed` and the name.
    """
    layers = modules_of(model, MoE)
    examples = layer_examples(model, layers, batches)
    return {n: _scores(n, moe, examples[n][0], criterion, seed) for n, moe in layers.items()}


@torch.no_grad()
def _scores(name: str, moe: MoE, inputs: Tensor, criterion: str, seed: int) -> Tensor:
    experts = len(moe.usage)
    if criterion == "random":
        return random_scores(name, (experts,), seed)
    counts = torch.bincount(moe.route(inputs)[2].flatten(), minlength=experts)
    if criterion == "usage":
        return counts / counts.sum()
    seen = zip(expert_rows(moe, inputs), moe.w_out, moe.b_out)
    norms = [gates * F.linear(hidden, w, b).norm(dim=-1) for (_, _, hidden, gates), w, b in seen]
    return torch.stack([norm.double().sum() for norm in norms]).float() / counts.clamp(min=1)


def align(units: Tensor, reference: Tensor) -> tuple[Tensor, float]:
    """The order of `units` (F, n) that brings each nearest to its row of `reference`, and the sum
    of squared distances left: units have no order of their own (Ainsworth et al. 2023, "Git
    Re-Basin")."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(reference.double(), units.double()).square().cpu().numpy()
    rows, order = linear_sum_assignment(cost)
    return torch.from_numpy(order).to(units.device), float(cost[rows, order].sum())


@torch.no_grad()
def merge_experts(moe: MoE, keep: int, usage: Tensor) -> Tensor:
    """Joins the two most similar experts until `keep` are left; returns their positions. In place,
    without changing shapes: the more used expert of each pair becomes the mean of both by usage,
    hidden units aligned first; the other one is to be dropped (`PrunedMoELayer.keep`)."""
    for name in ("w_in", "w_out"):
        check_prunable(weight_of(moe, name))
    router, width = moe.router, moe.b_out.shape[1]
    size = {expert: max(int(count), 1) for expert, count in enumerate(usage)}
    units = torch.cat([moe.w_in, moe.b_in[:, :, None], moe.w_out.transpose(1, 2)], 2)
    shared = torch.cat([moe.b_out, router.weight, router.bias[:, None]], 1)
    aligned = {(a, b): align(units[b], units[a]) for a in size for b in size if a != b}
    while len(size) > keep:
        pairs = [(a, b) for a in size for b in size if (size[a], -a) > (size[b], -b)]
        a, b = min(pairs, key=lambda pair: aligned[pair][1])
        share = size[b] / (size[a] + size[b])
        units[a] = torch.lerp(units[a], units[b][aligned[a, b][0]], share)
        shared[a] = torch.lerp(shared[a], shared[b], share)
        size[a] += size.pop(b)
        changed = [pair for e in size for pair in ((a, e), (e, a)) if e != a]
        aligned |= {pair: align(units[pair[1]], units[pair[0]]) for pair in changed}
    w_in, b_in, w_out = units.split([width, 1, width], 2)
    b_out, gates, bias = shared.split([width, width, 1], 1)
    for name, value in zip(PARTS, (w_in, b_in[:, :, 0], w_out.transpose(1, 2), b_out)):
        weight_of(moe, name).assign(value)
    weight_of(router).assign(gates)
    weight_of(router, "bias").assign(bias[:, 0])
    return torch.tensor(sorted(size))


class ProgressivePruningScheduler:
    """Takes a model's experts down in stages, 8 -> 4 -> 2 (-> 1), retraining after each.

    Args:
        model: changed in place; its mixtures of experts become PrunedMoELayers.
        stages: experts a layer after each stage, falling.
        batches, criterion, seed: as for `reduce_experts`.
        distill: a trainer class such as `kit.distillation.DistillationTrainer`, to learn from the
            unpruned model too: distill(teacher, student).fit(loader, config, **options of `train`).
        loss: loss(model, batch) when not distilling.
    Raises ValueError: stages that do not fall or end below top_k, an unknown criterion, no experts.
    """

    @checks
    def __init__(
        self, model: nn.Module, stages: Sequence[int] = (4, 2), *, batches: Iterable,
        criterion: Criterion = "usage", distill: Callable | None = None,
        loss: Callable = next_token_loss, seed: Seed = 0,
    ) -> None:  # fmt: skip
        self.stages, self.criterion, self.seed = tuple(stages), criterion, seed
        if not self.stages or any(a <= b for a, b in zip(self.stages, self.stages[1:])):
            raise ValueError(f"stages {self.stages} must fall, such as (4, 2)")
        _check_reduction(model, self.stages[-1])
        self.teacher = copy_model(model).eval().requires_grad_(False) if distill else None
        self.model, self.batches = track_experts(model), list(batches)
        self.distill, self.loss = distill, loss

    @property
    def history(self):
        """A DataFrame, a row an expert (by original position) and pruning, with its share."""
        import pandas as pd

        return pd.DataFrame(
            {"stage": stage, "layer": name, "expert": e, "share": share, "kept": e in entry["kept"]}
            for name, layer in modules_of(self.model, PrunedMoELayer).items()
            for stage, entry in enumerate(layer.history)
            for e, share in zip(entry["origin"], entry["share"])
        )

    def run(
        self, loader, config: TrainConfig, *, folder: str | Path | None = None, **options
    ) -> nn.Module:
        """All stages, each a pruning and `config.steps` steps of training; returns the model.

        options: of `kit.training.train`, such as validate= and log=. folder: of checkpoints. Called
        again after a kill, with a new scheduler over the same unpruned model, it goes on and ends
        with the same numbers; other stages, criteria and seeds have checkpoints of their own.
        """
        for stage, count in enumerate(self.stages):
            _reduce(self.model, self.batches, count, self.criterion, seed=self.seed)
            own = dataclasses.replace(config, seed=config.seed + stage)
            key = digest(self.stages[: stage + 1], self.criterion, self.seed, bool(self.distill))
            options["checkpoint"] = folder and Path(folder) / f"stage{stage}-{key}.safetensors"
            if self.distill is None:
                train(self.model, loader, own, loss=self.loss, **options)
            else:
                self.distill(self.teacher, self.model).fit(loader, own, **options)
        return self.model
