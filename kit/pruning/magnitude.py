"""Unstructured pruning by score: one shot, on a schedule while training, or in rounds with rewinding."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from kit.core.weights import Weight, weights
from kit.pruning import criteria
from kit.pruning.mask import check_maskable, mask_of, put_mask

SCOPES = ("tensor", "row", "global")


class MagnitudePruner:
    """Masks the weights of lowest score, in place; what is pruned stays pruned.

    Args:
        tensors: shell pattern or patterns of the weight matrices to prune (`kit.core.weights.weights`).
        scope: where weights compete: inside each "tensor", each output "row", or all together ("global").
        score: a criterion of `kit.pruning.criteria`: "magnitude" |w|; "random", the control; "wanda" |w| *
            input norm; or one registered since.
        input_norms: for criteria that need them, by tensor name (`kit.pruning.input_norms`).
        seed: of random scores.
    Raises ValueError: a pattern that matches nothing, an unknown scope or score, norms missing, or a
        weight that carries a transform.

    >>> pruner = MagnitudePruner(nn.Sequential(nn.Linear(8, 4)))
    >>> pruner.prune(0.75)[0].weight.count_nonzero().item()
    8
    """

    def __init__(
        self, model: nn.Module, tensors: str | Iterable[str] = "*", *, scope: str = "tensor",
        score: str = "magnitude", input_norms: Mapping[str, Tensor] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}; choose from {', '.join(SCOPES)}")
        if score not in criteria.CRITERIA:
            raise ValueError(f"unknown score {score!r}; choose from {', '.join(criteria.CRITERIA)}")
        self.model = model
        self.weights = {weight.name: weight for weight in weights(model, tensors, matrices=True)}
        if not self.weights:
            raise ValueError(f"{type(model).__name__} has no weight of two or more dimensions to prune")
        for weight in self.weights.values():
            check_maskable(weight)
        self.scope, self.score, self.seed, self.norms = scope, score, seed, dict(input_norms or {})
        missing = [name for name in self.weights if name not in self.norms]
        if score in criteria.NEEDS_NORMS and missing:
            raise ValueError(
                f"{score} needs the input norms of {missing[0]!r} (and {len(missing) - 1} more): "
                "pass input_norms=kit.pruning.input_norms(model, batches)"
            )

    def scores(self, weight: Weight) -> Tensor:
        """Scores (rows, columns) of a weight; already pruned entries score minus infinity."""
        values = criteria.CRITERIA[self.score](weight, self.norms.get(weight.name), self.seed)
        return values.masked_fill(~weight.view.matrix(mask_of(weight)), -torch.inf)

    def prune(self, sparsity: float | Mapping[str, float]) -> nn.Module:
        """Raises the share of masked weights to `sparsity`, exactly; returns the model.

        Args:
            sparsity: for every selected tensor (or, with scope "global", for all of them together), or
                one value for each tensor name; tensors without a value are left alone.
        Raises ValueError: a sparsity outside [0, 1), or a name that is not selected. Nothing is masked
            then.
        """
        self._check(sparsity)
        if isinstance(sparsity, Mapping):
            return self._prune_each(sparsity)
        if self.scope != "global":
            return self._prune_each(dict.fromkeys(self.weights, sparsity))
        scores = {name: self.scores(weight) for name, weight in self.weights.items()}
        return self._apply(criteria.global_masks(scores, sparsity))

    def _check(self, sparsity: float | Mapping[str, float]) -> None:
        named = sparsity if isinstance(sparsity, Mapping) else {}
        unknown = [name for name in named if name not in self.weights]
        if unknown:
            raise ValueError(f"no tensor {unknown[0]!r} is selected; there are {', '.join(self.weights)}")
        for value in named.values() if named else [sparsity]:
            criteria.check_sparsity(value)

    def _prune_each(self, sparsity: Mapping[str, float]) -> nn.Module:
        masks = {}
        for name, value in sparsity.items():
            scores = self.scores(self.weights[name])
            masks[name] = criteria.prune_mask(scores if self.scope == "row" else scores.flatten(), value)
        return self._apply(masks)

    def prune_below(self, threshold: float) -> nn.Module:
        """Masks every weight with a score under `threshold`; returns the model.

        Raises ValueError: a negative or non-finite threshold.
        """
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"threshold {threshold} must be finite and not negative: lower scores go")
        masks = {name: self.scores(weight) >= threshold for name, weight in self.weights.items()}
        return self._apply(masks)

    def prune_pattern(self, n: int, m: int) -> nn.Module:
        """Keeps the n best of every m neighbouring weights of a row (2:4: n=2, m=4); returns the model.

        Raises ValueError: m does not divide the rows of a selected tensor. Nothing is masked then.
        """
        masks = {}
        for name, weight in self.weights.items():
            try:
                criteria.check_pattern(weight.view.columns, n, m)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
            present = weight.view.matrix(mask_of(weight))
            masks[name] = criteria.nm_mask(self.scores(weight), n, m) & present
        return self._apply(masks)

    def _apply(self, masks: Mapping[str, Tensor]) -> nn.Module:
        """Masks (rows, columns), or flat, in the order of the matrix."""
        for name, mask in masks.items():
            view = self.weights[name].view
            put_mask(self.weights[name], view.tensor(mask.reshape(view.rows, view.columns)))
        return self.model

    def statistics(self):
        """A DataFrame, a row a tensor: weights, kept, sparsity, dead_rows (none left), smallest and mean
        |w| kept."""
        import pandas as pd

        rows = []
        for name, weight in self.weights.items():
            mask = weight.view.matrix(mask_of(weight))
            kept = weight.view.matrix(weight.original.detach()).abs()[mask]
            count, dead = int(mask.sum()), int((~mask.any(-1)).sum())
            row = {"tensor": name, "weights": mask.numel(), "kept": count}
            row |= {"sparsity": 1 - count / max(mask.numel(), 1), "dead_rows": dead}
            smallest, mean = (float(kept.min()), float(kept.mean())) if count else (0.0, 0.0)
            rows.append({**row, "smallest": smallest, "mean": mean})
        return pd.DataFrame(rows)

    def schedule(
        self, final: float | Mapping[str, float], *, start: float = 0.0, end: float = 0.7, every: int = 10
    ) -> Callable:
        """Hook for `kit.training.train(hooks=...)`: the cubic schedule, from the present sparsity to `final`.

        It returns True whenever masks have changed, so that the loop forgets the best state so far and
        the one it ends with has the final sparsity.

        Args:
            final: for all selected tensors, or one for each tensor name (`sparsities_for_budget`).
            start, end: fractions of the run's steps; the rest after `end` retrains at the final sparsity.
            every: steps between two prunings.
        Raises ValueError: final outside [0, 1), an unknown name, or not 0 <= start < end <= 1.
        """
        self._check(final)
        if not 0 <= start < end <= 1:
            raise ValueError(f"a schedule from {start} to {end} needs 0 <= start < end <= 1")
        kept = {}
        for name, weight in self.weights.items():
            mask = mask_of(weight)
            put_mask(weight, mask)  # so that checkpoints hold the masks from the first step on
            kept[name] = int(mask.sum()), mask.numel()
        initial = {name: 1 - part / whole for name, (part, whole) in kept.items()}
        overall = 1 - sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values())

        def hook(step: int, steps: int, model: nn.Module) -> bool:
            first, last = int(start * steps), max(int(end * steps), 1)
            due = first <= step <= last and (step % every == 0 or step == last)
            if due and isinstance(final, Mapping):
                now = {n: criteria.cubic_sparsity(step, first, last, v, initial[n]) for n, v in final.items()}
                self.prune(now)
            elif due:
                self.prune(criteria.cubic_sparsity(step, first, last, final, overall))
            return due

        return hook

    def iterate(
        self, sparsities: Iterable[float], retrain: Callable[[nn.Module], object],
        rewind_to: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:  # fmt: skip
        """Rounds of prune, optionally rewind, retrain (lottery tickets, Frankle et al. 2020).

        Args:
            sparsities: total sparsity of each round, increasing.
            retrain: trains the masked model in place.
            rewind_to: `state_dict()` of the same model, unmasked, early in its training.
        """
        for sparsity in [criteria.check_sparsity(value) for value in sparsities]:
            self.prune(sparsity)
            if rewind_to is not None:
                rewind(self.model, rewind_to)
            retrain(self.model)
        return self.model


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Sets the trained weights to those of `state` (a `state_dict()` without steps); masks stay.

    Raises ValueError: the state lacks a weight or holds it in another shape, or a weight stands in
    another order or basis. The model is untouched then.
    """
    found = weights(model)
    for weight in found:
        check_maskable(weight)
        ours, theirs = tuple(weight.original.shape), state.get(weight.name)
        if theirs is None or tuple(theirs.shape) != ours:
            held = "nothing" if theirs is None else tuple(theirs.shape)
            raise ValueError(f"the state to rewind to holds {held} for {weight.name!r}, the model {ours}")
    for weight in found:
        weight.assign(state[weight.name])
    return model
