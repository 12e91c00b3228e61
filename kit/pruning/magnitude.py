"""Unstructured pruning by score: one shot, on a schedule while training, or in rounds."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from kit.core.weights import Weight, weights
from kit.pruning import criteria
from kit.pruning.mask import check_prunable, mask_of, put_mask

SCOPES = ("tensor", "row", "global")


class MagnitudePruner:
    """Masks the weights of lowest score, in place; what is pruned stays pruned.

    Args:
        tensors: shell pattern or patterns of the weight matrices to prune (`kit.core.weights`).
        scope: where weights compete: inside each "tensor", each output "row", or all ("global").
        score: a criterion of `kit.pruning.criteria`: "magnitude" |w|; "random", the control;
            "wanda" |w| * input norm; or one registered since.
        input_norms: for criteria that need them, by tensor name (`kit.pruning.input_norms`).
        seed: of random scores.
    Raises ValueError: a pattern that matches nothing, an unknown scope or score, norms missing, or
        a weight that is kept in another order or basis.

    >>> pruner = MagnitudePruner(nn.Sequential(nn.Linear(8, 4)))
    >>> pruner.prune(0.75)[0].weight.count_nonzero().item()
    8
    """

    def __init__(
        self, model: nn.Module, tensors: str | Iterable[str] = "*", *, scope: str = "tensor",
        score: str = "magnitude", input_norms: Mapping[str, Tensor] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        for what, name, known in (("scope", scope, SCOPES), ("score", score, criteria.CRITERIA)):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
        self.model, self.scope, self.seed = model, scope, seed
        self.score, needs_norms = criteria.CRITERIA[score]
        self.weights = {w.name: w for w in weights(model, tensors, matrices=True)}
        if not self.weights:
            kind = type(model).__name__
            raise ValueError(f"{kind} has no weight of two or more dimensions to prune")
        self.norms = dict.fromkeys(self.weights) | dict(input_norms or {})
        for name, weight in self.weights.items():
            check_prunable(weight)
            if needs_norms and self.norms[name] is None:
                call = "input_norms=kit.pruning.input_norms(model, batches)"
                raise ValueError(f"{score} needs the input norms of {name!r}: pass {call}")

    def scores(self, weight: Weight) -> Tensor:
        """Scores (rows, columns) of a weight; already pruned entries score minus infinity."""
        values = self.score(weight, self.norms[weight.name], self.seed)
        return values.masked_fill(~weight.view.matrix(mask_of(weight)), -torch.inf)

    def prune(self, sparsity: float | Mapping[str, float]) -> nn.Module:
        """Raises the share of masked weights to `sparsity`, exactly; returns the model.

        sparsity: of every selected tensor (with scope "global", of all of them together), or one
            for each tensor name; tensors that are not named are left alone.
        Raises ValueError: a sparsity outside [0, 1), or a name that is not selected. Nothing is
            masked then.
        """
        each = self._checked(sparsity)
        scores = {name: self.scores(self.weights[name]) for name in each}
        if self.scope == "global" and each is not sparsity:
            return self._apply(criteria.global_masks(scores, sparsity))
        if self.scope != "row":
            scores = {name: score.flatten() for name, score in scores.items()}
        return self._apply({n: criteria.prune_mask(s, each[n]) for n, s in scores.items()})

    def _checked(self, sparsity: float | Mapping[str, float]) -> Mapping[str, float]:
        """One for each tensor."""
        each = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(self.weights, sparsity)
        for name, value in each.items():
            criteria.check_sparsity(value)
            if name not in self.weights:
                there = ", ".join(self.weights)
                raise ValueError(f"no tensor {name!r} is selected; there are {there}")
        return each

    def prune_below(self, threshold: float) -> nn.Module:
        """Masks every weight with a score under `threshold`; returns the model.

        Raises ValueError: a negative or non-finite threshold.
        """
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"threshold {threshold} must be finite and not negative")
        return self._apply({n: self.scores(w) >= threshold for n, w in self.weights.items()})

    def prune_pattern(self, n: int, m: int) -> nn.Module:
        """Keeps the n best of every m neighbours in a row (2:4: n=2, m=4); returns the model.

        Raises ValueError: m does not divide the rows of a selected tensor. Nothing is masked then.
        """
        for name, weight in self.weights.items():
            criteria.check_pattern(weight.view.columns, n, m, name)
        scores = {name: self.scores(weight) for name, weight in self.weights.items()}
        return self._apply({name: criteria.nm_mask(s, n, m) for name, s in scores.items()})

    def _apply(self, masks: Mapping[str, Tensor]) -> nn.Module:
        """Masks (rows, columns), or flat, in the order of the matrix."""
        for name, mask in masks.items():
            weight, view = self.weights[name], self.weights[name].view
            mask = view.tensor(mask.reshape(view.rows, view.columns))
            put_mask(weight, mask & mask_of(weight))
        return self.model

    def statistics(self):
        """A DataFrame, a row a tensor: weights, kept, sparsity, dead_rows (nothing is left)."""
        import pandas as pd

        rows = []
        for name, weight in self.weights.items():
            mask = weight.view.matrix(mask_of(weight))
            total, kept, dead = mask.numel(), int(mask.sum()), int((~mask.any(-1)).sum())
            rows.append((name, total, kept, 1 - kept / max(total, 1), dead))
        return pd.DataFrame(rows, columns=["tensor", "weights", "kept", "sparsity", "dead_rows"])

    def schedule(
        self, final: float | Mapping[str, float], *,
        start: float = 0.0, end: float = 0.7, every: int = 10,
    ) -> Callable:  # fmt: skip
        """Hook for `kit.training.train(hooks=...)`: a cubic schedule from the present sparsity on.

        It returns True whenever masks have changed, so that the loop forgets the best state so far
        and the one it ends with has the final sparsity.

        final: as for `prune`. start, end: fractions of the run's steps; what is left after `end`
            retrains. every: steps between two prunings.
        Raises ValueError: final outside [0, 1), an unknown name, or not 0 <= start < end <= 1.
        """
        self._checked(final)
        if not 0 <= start < end <= 1:
            raise ValueError(f"a schedule from {start} to {end} needs 0 <= start < end <= 1")
        for weight in self.weights.values():
            put_mask(weight, mask_of(weight))  # checkpoints hold the masks from the first step on
        now = self.statistics().set_index("tensor")
        present, overall = dict(now["sparsity"]), 1 - now["kept"].sum() / now["weights"].sum()

        def hook(step: int, steps: int, model: nn.Module) -> bool:
            first, last = int(start * steps), max(int(end * steps), 1)
            due = first <= step <= last and (step % every == 0 or step == last)
            at = partial(criteria.cubic_sparsity, step, first, last)
            if due and isinstance(final, Mapping):
                self.prune({name: at(value, present[name]) for name, value in final.items()})
            elif due:
                self.prune(at(final, overall))
            return due

        return hook

    def iterate(
        self, sparsities: Iterable[float], retrain: Callable, rewind_to: Mapping | None = None
    ) -> nn.Module:
        """Rounds of prune, optionally rewind, retrain (lottery tickets, Frankle et al. 2020).

        sparsities: total sparsity of each round, increasing. retrain: trains the masked model in
            place. rewind_to: `state_dict()` of the same model, unmasked, early in its training.
        """
        for sparsity in [criteria.check_sparsity(value) for value in sparsities]:
            self.prune(sparsity)
            if rewind_to is not None:
                rewind(self.model, rewind_to)
            retrain(self.model)
        return self.model


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Sets the trained weights to those of `state` (a `state_dict()` without steps); masks stay.

    Raises ValueError: the state lacks a weight or holds it in another shape, or a weight is kept in
    another order or basis. The model is untouched then.
    """
    found = weights(model)
    for weight in found:
        check_prunable(weight)
        ours, theirs = tuple(weight.original.shape), state.get(weight.name)
        held = "nothing" if theirs is None else tuple(theirs.shape)
        if held != ours:
            raise ValueError(f"the state to rewind to holds {held} for {weight.name!r}, not {ours}")
    for weight in found:
        weight.assign(state[weight.name])
    return model
