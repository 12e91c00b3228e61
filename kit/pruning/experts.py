"""Experts: counting who is used, scoring them, dropping or merging, and shrinking the router with them;
in one step, or in stages with training between, each small enough to recover from."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kit.core.protocols import run
from kit.core.weights import copy_model, weight_of
from kit.models import MoE, refresh_config
from kit.models.moe import expert_rows
from kit.pruning.least_squares import layer_examples, refit_experts
from kit.pruning.structured import modules_of
from kit.training import TrainConfig, train
from kit.training.checkpoint import copy_into, read_checkpoint, write_checkpoint
from kit.training.losses import next_token_loss

CRITERIA = ("usage", "reap", "random", "merge")


class PrunedMoELayer(MoE):
    """A mixture of experts that counts the tokens of each expert and can lose those that have too few.

    Wraps a MoE: parameters and buffers are the same objects. `origin` holds the position each remaining
    expert had at first; `history` one entry a pruning: {"origin", "share", "kept"}, by original position.

    Args:
        moe: the layer to take over; it should not be used afterwards.
        threshold: share of the tokens under which `prune` removes an expert.
    Raises ValueError: threshold outside [0, 1).
    """

    def __init__(self, moe: MoE, threshold: float = 0.05) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold {threshold} is outside [0, 1): give a share of the tokens, such as 0.05")
        nn.Module.__init__(self)
        self.__dict__.update(moe.__dict__)
        if parametrize.is_parametrized(moe):  # torch put properties on that module's own class
            own = {k: v for k, v in vars(type(moe)).items() if k not in ("__dict__", "__weakref__")}
            self.__class__ = type(PrunedMoELayer.__name__, (PrunedMoELayer,), own)
        self.threshold = threshold
        self.origin = list(range(len(moe.usage)))
        self.history: list[dict] = []

    @property
    def shares(self) -> Tensor:
        """(E,) share of the routed tokens that went to each expert since `reset_usage`, training or not.

        Raises ValueError when no token has been counted.
        """
        if not self.usage.sum():
            raise ValueError("no token has been counted yet: run the model over some data first")
        return self.usage / self.usage.sum()

    def prune(self) -> list[int]:
        """Removes the experts with less than `threshold` of the tokens; returns their original positions.

        The most used `top_k` experts always stay. Counting starts again.
        """
        keep = self.shares >= self.threshold
        keep[self.shares.argsort(descending=True, stable=True)[: self.top_k]] = True
        return self.keep(keep.nonzero()[:, 0])

    def keep(self, experts: Tensor) -> list[int]:
        """Keeps the experts at positions `experts`, and the router's rows for them; returns those that went.

        Raises ValueError when fewer than top_k experts would stay.
        """
        keep = sorted(int(expert) for expert in experts)
        if len(keep) < self.top_k:
            raise ValueError(f"{len(keep)} experts would stay, but each token is routed to {self.top_k}: keep more")
        shares = (self.usage / self.usage.sum().clamp(min=1)).tolist()
        origin, gone = self.origin, [p for i, p in enumerate(self.origin) if i not in keep]
        keep_experts(self, torch.tensor(keep, device=self.usage.device))
        self.origin = [origin[i] for i in keep]
        self.history.append({"origin": origin, "share": shares, "kept": self.origin})
        return gone


def keep_experts(moe: MoE, keep: Tensor) -> None:
    """Keeps experts `keep` (E',) int64 and their rows of the router, in place; the usage count restarts."""
    for name in ("w_in", "b_in", "w_out", "b_out"):
        weight_of(moe, name).select(lambda t: t[keep])
    for name in ("weight", "bias"):
        weight_of(moe.router, name).select(lambda t: t[keep])
    moe.router.out_features = len(keep)
    moe.usage = moe.usage.new_zeros(len(keep))


def track_experts(model: nn.Module, threshold: float = 0.05) -> nn.Module:
    """Replaces every mixture of experts of the model by a PrunedMoELayer, in place; returns the model.

    Raises ValueError: the model has none, or the threshold is outside [0, 1).
    """
    made = {
        name: PrunedMoELayer(moe, threshold)
        for name, moe in modules_of(model, MoE).items()
        if not isinstance(moe, PrunedMoELayer)
    }
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return model


def prune_unused_experts(model: nn.Module, batches: Sequence, threshold: float = 0.05) -> nn.Module:
    """A copy of the model without the experts that get less than `threshold` of their layer's tokens.

    Tokens are counted over `batches`. The copy's mixtures of experts are PrunedMoELayers; each keeps at
    least its top_k most used experts, which are refitted to stand in for those that went.

    Raises ValueError: no mixture of experts, no batches, or a threshold outside [0, 1).
    """
    small = track_experts(copy_model(model), threshold)
    layers = modules_of(small, PrunedMoELayer)
    for layer in layers.values():
        layer.reset_usage()
        layer.threshold = threshold
    examples = layer_examples(small, list(layers), batches)
    for name, layer in layers.items():
        if layer.prune():
            refit_experts(layer, *examples[name])
    refresh_config(small)
    return small


def reduce_experts(
    model: nn.Module, keep: int, batches: Sequence, *, criterion: str = "usage", refit: bool = True, seed: int = 0
) -> nn.Module:
    """A copy of the model with at most `keep` experts a layer, chosen by what the tokens of `batches` do.

    Args:
        criterion: "usage", "reap" or "random" drop the experts of lowest score (`expert_scores`); "merge"
            joins the most similar ones (`merge_experts`) until `keep` are left.
        refit: let the experts that stay take over from those that went, by least squares.
    Raises ValueError: fewer than top_k experts to keep, an unknown criterion, no mixture of experts, no
        batches.
    """
    check_reduction(model, keep, criterion)
    small = track_experts(copy_model(model))
    reduce_in_place(small, keep, batches, criterion, refit, seed)
    return small


def check_reduction(model: nn.Module, keep: int, criterion: str) -> None:
    """Raises ValueError where `reduce_experts` would."""
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; choose from {', '.join(CRITERIA)}")
    needed = max(moe.top_k for moe in modules_of(model, MoE).values())
    if keep < needed:
        raise ValueError(f"{keep} experts would stay, but each token is routed to {needed}: keep more")


def reduce_in_place(
    model: nn.Module, keep: int, batches: Sequence, criterion: str, refit: bool = True, seed: int = 0
) -> None:
    """`reduce_experts` on a model that `track_experts` has prepared, in place."""
    layers = {n: m for n, m in modules_of(model, PrunedMoELayer).items() if m.w_in.shape[0] > keep}
    for layer in layers.values():
        layer.reset_usage()
    scores = expert_scores(model, batches, "usage" if criterion == "merge" else criterion, seed)
    examples = layer_examples(model, list(layers), batches) if refit else {}
    for name, layer in layers.items():
        if criterion == "merge":
            layer.keep(merge_experts(layer, keep, layer.usage))
        else:
            layer.keep(scores[name].argsort(descending=True, stable=True)[:keep])
    for name, (inputs, outputs) in examples.items():
        refit_experts(layers[name], inputs, outputs)
    refresh_config(model)


def expert_scores(model: nn.Module, batches: Sequence, criterion: str = "usage", seed: int = 0) -> dict[str, Tensor]:
    """The score (E,) of each expert, by the name of its layer, from one pass over `batches`.

    "usage": share of the routed tokens. "reap": mean over an expert's tokens of gate * ||expert output||_2
    (Lasby et al. 2025, "REAP the Experts"). "random": the control, drawn from `seed` and the layer's name.

    Raises ValueError: no mixture of experts in the model, or no batches.
    """
    layers = modules_of(model, MoE)
    if criterion == "random":
        generators = {n: torch.Generator().manual_seed(seed + zlib.crc32(n.encode())) for n in layers}
        return {n: torch.rand(moe.w_in.shape[0], generator=generators[n]) for n, moe in layers.items()}
    counts = {name: torch.zeros(moe.w_in.shape[0], dtype=torch.float64) for name, moe in layers.items()}
    norms = {name: torch.zeros_like(count) for name, count in counts.items()}

    def watch(name: str, moe: MoE) -> Callable:
        def collect(x: Tensor, output: Tensor) -> None:
            w_out, b_out = moe.w_out, moe.b_out
            for expert, seen in enumerate(expert_rows(moe, x)):
                outputs = F.linear(seen.hidden, w_out[expert], b_out[expert])
                counts[name][expert] += len(seen.rows)
                norms[name][expert] += (seen.gates * outputs.norm(dim=-1)).sum().item()

        return collect

    run(model, batches, {name: watch(name, moe) for name, moe in layers.items()})
    if criterion == "usage":
        return {name: (count / count.sum()).float() for name, count in counts.items()}
    return {name: (norms[name] / count.clamp(min=1)).float() for name, count in counts.items()}


def align(units: Tensor, reference: Tensor) -> tuple[Tensor, float]:
    """The order of `units` (F, n) that brings each nearest to its row of `reference`, and the distance left.

    Hidden units have no order of their own, so two experts are compared after the best one-to-one
    assignment; the distance is squared (Ainsworth et al. 2023, "Git Re-Basin").
    """
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(reference.double(), units.double()).square().cpu().numpy()
    rows, order = linear_sum_assignment(cost)
    return torch.from_numpy(order).to(units.device), float(cost[rows, order].sum())


@torch.no_grad()
def merge_experts(moe: MoE, keep: int, usage: Tensor) -> Tensor:
    """Joins the two most similar experts, again and again, until `keep` are left; returns their positions.

    In place, without changing shapes: the more used expert of each pair becomes the usage-weighted mean
    of both, hidden units aligned first, and the other one is to be dropped (`PrunedMoELayer.keep`).
    """
    size = {expert: max(int(count), 1) for expert, count in enumerate(usage)}
    units = [torch.cat([moe.w_in[e], moe.b_in[e, :, None], moe.w_out[e].T], 1) for e in size]
    router = moe.router
    shared = [torch.cat([moe.b_out[e], router.weight[e], router.bias[e, None]]) for e in size]
    aligned = {(a, b): align(units[b], units[a]) for a in size for b in size if a != b}
    while len(size) > keep:
        pairs = [(a, b) for a in size for b in size if (size[a], -a) > (size[b], -b)]
        a, b = min(pairs, key=lambda pair: aligned[pair][1])
        share = size[b] / (size[a] + size[b])
        units[a] = torch.lerp(units[a], units[b][aligned[a, b][0]], share)
        shared[a] = torch.lerp(shared[a], shared[b], share)
        size[a] += size.pop(b)
        for other in size:
            if other != a:
                aligned[a, other] = align(units[other], units[a])
                aligned[other, a] = align(units[a], units[other])
    d_model = moe.b_out.shape[1]
    originals = {name: weight_of(moe, name).original for name in ("w_in", "b_in", "w_out", "b_out")}
    gates, bias = weight_of(router).original, weight_of(router, "bias").original
    for e in size:
        parts = {"w_in": units[e][:, :d_model], "b_in": units[e][:, d_model], "w_out": units[e][:, d_model + 1 :].T}
        for name, value in {**parts, "b_out": shared[e][:d_model]}.items():
            originals[name][e] = value
        gates[e], bias[e] = shared[e][d_model:-1], shared[e][-1]
    return torch.tensor(sorted(size))


class ProgressivePruningScheduler:
    """Takes a model's experts down in stages, 8 -> 4 -> 2 (-> 1), retraining after each.

    Args:
        model: its mixtures of experts become PrunedMoELayers; it is changed in place.
        stages: experts a layer after each stage, falling.
        batches: what the experts are judged on: a few (inputs, targets) of the training split.
        criterion: "usage", "reap", "random" or "merge" (`reduce_experts`).
        distill: to retrain towards the unpruned model's predictions as well: a trainer such as
            `kit.distillation.DistillationTrainer`, made as distill(teacher, student) and asked to `fit`.
        loss: loss(model, batch) when not distilling.
        seed: of the random criterion.
    Raises ValueError: stages that do not fall or end below top_k, an unknown criterion, no experts. The
        model is untouched then.
    """

    def __init__(
        self, model: nn.Module, stages: Sequence[int] = (4, 2), *, batches: Sequence, criterion: str = "usage",
        distill: Callable | None = None, loss: Callable = next_token_loss, seed: int = 0,
    ) -> None:  # fmt: skip
        self.stages = tuple(stages)
        if not self.stages or any(a <= b for a, b in zip(self.stages, self.stages[1:])):
            raise ValueError(f"stages {self.stages} must fall, such as (4, 2)")
        check_reduction(model, self.stages[-1], criterion)
        self.teacher = copy_model(model).eval().requires_grad_(False) if distill else None
        self.model, self.batches, self.criterion = track_experts(model), list(batches), criterion
        self.distill, self.loss, self.seed = distill, loss, seed

    @property
    def layers(self) -> dict[str, PrunedMoELayer]:
        return modules_of(self.model, PrunedMoELayer)

    @property
    def history(self):
        """A DataFrame, a row an expert and pruning: stage, layer, expert (original position), share of
        tokens, kept."""
        import pandas as pd

        rows = [
            {"stage": stage, "layer": name, "expert": expert, "share": share, "kept": expert in entry["kept"]}
            for name, layer in self.layers.items()
            for stage, entry in enumerate(layer.history)
            for expert, share in zip(entry["origin"], entry["share"])
        ]
        return pd.DataFrame(rows)

    def run(
        self, loader, config: TrainConfig, *, validate: Callable[[nn.Module], float] | None = None,
        folder: Path | None = None, log: bool = True,
    ) -> nn.Module:  # fmt: skip
        """All stages, each a pruning and `config.steps` steps of training; returns the model.

        With a `folder`, each finished stage is kept there and training is checkpointed: called again
        after a kill, with a new scheduler over the same unpruned model, it goes on and ends with the same
        numbers. Raises ValueError: the folder holds stages of other settings.
        """
        folder = None if folder is None else Path(folder)
        for stage, count in enumerate(self.stages):
            done = folder / f"stage{stage}.safetensors" if folder else None
            if done and done.exists():
                self._restore(done, stage)
                continue
            reduce_in_place(self.model, count, self.batches, self.criterion, seed=self.seed)
            checkpoint = folder / f"training{stage}.safetensors" if folder else None
            own = dataclasses.replace(config, seed=config.seed + stage)
            arguments = {"validate": validate, "checkpoint": checkpoint, "log": log}
            if self.distill is None:
                train(self.model, loader, own, loss=self.loss, **arguments)
            else:
                self.distill(self.teacher, self.model).fit(loader, own, **arguments)
            if done:
                write_checkpoint(done, self._tensors(), self._header(stage))
                checkpoint.unlink(missing_ok=True)
        return self.model

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _header(self, stage: int) -> dict:
        settings = {"stages": list(self.stages[: stage + 1]), "criterion": self.criterion, "seed": self.seed}
        settings["distill"] = self.distill is not None
        return {"settings": settings, "history": {n: layer.history for n, layer in self.layers.items()}}

    def _restore(self, path: Path, stage: int) -> None:
        tensors, header = read_checkpoint(path)
        settings = self._header(stage)["settings"]
        if header["settings"] != settings:
            raise ValueError(f"{path} was written with {header['settings']}, not {settings}: use another folder")
        for name, layer in self.layers.items():
            layer.history = header["history"][name]
            layer.origin = layer.history[-1]["kept"] if layer.history else layer.origin
            keep_experts(layer, torch.arange(len(layer.origin), device=layer.usage.device))
        refresh_config(self.model)
        copy_into(self._tensors(), tensors, str(path))
