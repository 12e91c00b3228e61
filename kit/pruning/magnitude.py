"""Unstructured pruning by score: one shot, on a schedule while training, or in rounds with rewinding."""

import zlib
from collections.abc import Callable, Iterable, Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from kit.core.weights import named_weights, original_of
from kit.pruning import criteria as score
from kit.pruning.mask import Slot, select

SCOPES = ("tensor", "row", "global")
SCORES = ("magnitude", "random", "wanda")


class MagnitudePruner:
    """Masks the weights of lowest score, in place; what is pruned stays pruned.

    Args:
        tensors: glob pattern or patterns of the tensors to prune (`kit.pruning.mask.select`).
        scope: where weights compete: inside each "tensor", each output "row", or all together ("global").
        score: "magnitude" |w|; "random", the control; "wanda" |w| * input norm.
        input_norms: for "wanda", the norms by tensor name (`kit.core.calibration.input_norms`).
        seed: of the random scores.

    Example:
        >>> pruner = MagnitudePruner(nn.Sequential(nn.Linear(8, 4)))
        >>> pruner.prune(0.75).get_submodule("0").weight.count_nonzero().item()
        8

    Raises:
        ValueError: a pattern that matches nothing, an unknown scope or score, norms missing for wanda.
    """

    def __init__(self, model: nn.Module, tensors: str | Iterable[str] = "*", *, scope: str = "tensor",
                 score: str = "magnitude", input_norms: Mapping[str, Tensor] | None = None,
                 seed: int = 0) -> None:
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}; choose from {', '.join(SCOPES)}")
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; choose from {', '.join(SCORES)}")
        self.model, self.slots = model, select(model, tensors)
        self.scope, self.score, self.seed = scope, score, seed
        self.input_norms = dict(input_norms or {})
        missing = [name for name in self.slots if name not in self.input_norms]
        if score == "wanda" and missing:
            raise ValueError(f"wanda needs the input norms of {missing[0]!r} (and {len(missing) - 1} more): "
                             "pass input_norms=kit.pruning.input_norms(model, batches)")
        self._statistics: list[pd.DataFrame] = []

    def scores(self, slot: Slot) -> Tensor:
        """Scores as a matrix (rows, columns) of the slot; already pruned weights score minus infinity."""
        weight = slot.parameter.detach()
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(slot.name.encode()))
            values = slot.matrix(score.random(weight, generator))
        elif self.score == "wanda":
            norm = self.input_norms[slot.name].to(weight.device)
            values = score.wanda(slot.stack(weight), norm).flatten(0, 1)
        else:
            values = slot.matrix(score.magnitude(weight))
        return values.masked_fill(~slot.matrix(slot.mask), -torch.inf)

    def prune(self, sparsity: float | Mapping[str, float]) -> nn.Module:
        """Raise the share of masked weights to `sparsity`, exactly; returns the model.

        Args:
            sparsity: for every selected tensor (or, with scope "global", for all of them together), or one
                value for each tensor name; tensors without a value are left alone.

        Raises:
            ValueError: a sparsity outside [0, 1), or a name that is not selected. Nothing is masked then.
        """
        self._check(sparsity)
        if isinstance(sparsity, Mapping):
            return self._prune_each(sparsity)
        if self.scope != "global":
            return self._prune_each(dict.fromkeys(self.slots, sparsity))
        scores = {name: self.scores(slot) for name, slot in self.slots.items()}
        return self._apply(score.global_masks(scores, sparsity))

    def _check(self, sparsity: float | Mapping[str, float]) -> None:
        named = sparsity if isinstance(sparsity, Mapping) else {}
        unknown = [name for name in named if name not in self.slots]
        if unknown:
            raise ValueError(f"no tensor {unknown[0]!r} is selected; there are {', '.join(self.slots)}")
        for value in named.values() if named else [sparsity]:
            score.check_sparsity(value)

    def _prune_each(self, sparsity: Mapping[str, float]) -> nn.Module:
        masks = {}
        for name, value in sparsity.items():
            values = self.scores(self.slots[name])
            masks[name] = score.prune_mask(values if self.scope == "row" else values.flatten(), value)
        return self._apply(masks)

    def prune_below(self, threshold: float) -> nn.Module:
        """Mask every weight with a score under `threshold`; returns the model.

        Raises:
            ValueError: a negative or non-finite threshold.
        """
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"threshold {threshold} must be finite and not negative: lower scores go")
        return self._apply({name: self.scores(slot) >= threshold for name, slot in self.slots.items()})

    def prune_pattern(self, n: int, m: int) -> nn.Module:
        """Keep the n best of every m neighbouring weights of a row (2:4: n=2, m=4); returns the model.

        Raises:
            ValueError: m does not divide the rows of a selected tensor. Nothing is masked then.
        """
        for name, slot in self.slots.items():
            try:
                score.check_pattern(slot.matrix(slot.parameter).shape[-1], n, m)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        return self._apply({name: score.nm_mask(self.scores(slot), n, m) & slot.matrix(slot.mask)
                            for name, slot in self.slots.items()})

    def _apply(self, masks: Mapping[str, Tensor]) -> nn.Module:
        for name, mask in masks.items():
            self.slots[name].set_mask(mask.view_as(self.slots[name].parameter))
        self._statistics.append(self.statistics().assign(round=len(self._statistics)))
        return self.model

    @property
    def history(self) -> pd.DataFrame:
        """The statistics after each pruning so far, numbered by `round` from 0."""
        return pd.concat(self._statistics, ignore_index=True) if self._statistics else pd.DataFrame()

    def statistics(self) -> pd.DataFrame:
        """One row a tensor: weights, kept, sparsity, dead_rows (none left), smallest and mean |w| kept."""
        rows = []
        for name, slot in self.slots.items():
            mask, weight = slot.matrix(slot.mask), slot.matrix(slot.parameter.detach()).abs()
            kept = weight[mask]
            rows.append({"tensor": name, "weights": mask.numel(), "kept": int(mask.sum()),
                         "sparsity": 1 - int(mask.sum()) / mask.numel(),
                         "dead_rows": int((~mask.any(-1)).sum()),
                         "smallest": float(kept.min()) if len(kept) else 0.0,
                         "mean": float(kept.mean()) if len(kept) else 0.0})
        return pd.DataFrame(rows)

    def schedule(self, final: float | Mapping[str, float], *, start: float = 0.0, end: float = 0.7,
                 every: int = 10) -> Callable:
        """Hook for `kit.training.train(hooks=...)`: the cubic schedule, from the present sparsity to `final`.

        It returns True whenever masks have changed, so that the loop forgets the best state so far and the
        one it ends with has the final sparsity.

        Args:
            final: for all selected tensors, or one for each tensor name (`sparsities_for_budget`).
            start, end: fractions of the run's steps; the rest after `end` retrains at the final sparsity.
            every: steps between two prunings.

        Raises:
            ValueError: final outside [0, 1), an unknown name, or not 0 <= start < end <= 1.
        """
        self._check(final)
        if not 0 <= start < end <= 1:
            raise ValueError(f"a schedule from {start} to {end} needs 0 <= start < end <= 1")
        for slot in self.slots.values():   # so that checkpoints hold the masks from the first step on
            slot.set_mask(slot.mask)
        kept = {name: (int(slot.mask.sum()), slot.mask.numel()) for name, slot in self.slots.items()}
        initial = {name: 1 - part / whole for name, (part, whole) in kept.items()}
        overall = 1 - sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values())

        def hook(step: int, steps: int, model: nn.Module) -> bool:
            first, last = int(start * steps), max(int(end * steps), 1)
            due = first <= step <= last and (step % every == 0 or step == last)
            if due and isinstance(final, Mapping):
                self.prune({name: score.cubic_sparsity(step, first, last, value, initial[name])
                            for name, value in final.items()})
            elif due:
                self.prune(score.cubic_sparsity(step, first, last, final, overall))
            return due
        return hook

    def iterate(self, sparsities: Iterable[float], retrain: Callable[[nn.Module], object],
                rewind_to: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Rounds of prune, optionally rewind, retrain (lottery tickets, Frankle et al. 2020).

        Args:
            sparsities: total sparsity of each round, increasing.
            retrain: trains the masked model in place.
            rewind_to: `state_dict()` of the same model, unmasked, early in its training.
        """
        for sparsity in [score.check_sparsity(value) for value in sparsities]:
            self.prune(sparsity)
            if rewind_to is not None:
                rewind(self.model, rewind_to)
            retrain(self.model)
        return self.model


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Set the stored weights to those of `state` (a `state_dict()` without masks); masks stay.

    Raises:
        ValueError: the state lacks a weight or holds it in another shape. The model is untouched then.
    """
    targets = {full_name: original_of(module, name) for full_name, module, name in named_weights(model)}
    for name, tensor in targets.items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(f"the state to rewind to holds {found} for {name!r}, "
                             f"the model {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(state[name])
    return model
