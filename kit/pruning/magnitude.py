"""Unstructured pruning by score: in one shot, in rounds, or on a schedule while training."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kit.core.settings import NotNegative, Seed, checked, checks
from kit.core.weights import Weight, check_values, weights
from kit.pruning import criteria
from kit.pruning.mask import check_prunable, mask_of, put_mask


class MagnitudePruner:
    """Masks the weights of lowest score, in place; what is pruned stays pruned.

    Args:
        tensors: shell pattern or patterns of the weight matrices to prune (`kit.core.weights`).
        scope: where weights compete: inside each "tensor", each output "row", or all ("global").
        score: "magnitude" |w|; "random", the control, drawn from `seed`; "wanda" |w| * input norm;
            or another of `kit.pruning.criteria`.
        input_norms: for criteria that need them, by tensor name (`kit.pruning.input_norms`).
    Raises ValueError: a pattern that matches nothing, an unknown scope or score, norms missing, or
        a weight that is kept in another order or basis.

    >>> pruner = MagnitudePruner(nn.Sequential(nn.Linear(8, 4)))
    >>> pruner.prune(0.75)[0].weight.count_nonzero().item()
    8
    """

    @checks
    def __init__(
        self, model: nn.Module, tensors: str | Iterable[str] = "*", *,
        scope: Literal["tensor", "row", "global"] = "tensor", score: str = "magnitude",
        input_norms: Mapping[str, Tensor] | None = None, seed: Seed = 0,
    ) -> None:  # fmt: skip
        self.model, self.scope, self.seed, known = model, scope, seed, criteria.CRITERIA
        self.score, needs_norms = known[checked("score", score, Literal[*known])]
        self.weights = {w.name: w for w in weights(model, tensors, matrices=True)}
        if not self.weights:
            kind = type(model).__name__
            raise ValueError(f"{kind} has no weight of two or more dimensions to prune")
        self.norms = dict.fromkeys(self.weights) | dict(input_norms or {})
        for name, weight in self.weights.items():
            check_prunable(weight)
            if needs_norms and self.norms[name] is None:
                call = "input_norms=kit.pruning.input_norms(model, batches)"
                what = f"{score} needs the input norms of {name!r}: pass {call}"
                raise ValueError(f"{what}, or leave out by tensors= what multiplies no inputs")

    def scores(self, weight: Weight) -> Tensor:
        """Scores (rows, columns) of a weight; already pruned entries score minus infinity. Raises
        ValueError for a weight that is not finite."""
        check_values(weight.original, weight.name)
        values = self.score(weight, self.norms[weight.name], self.seed)
        return values.masked_fill(~weight.view.matrix(mask_of(weight)), -torch.inf)

    def prune(self, sparsity: float | Mapping[str, float]) -> nn.Module:
        """Raises the share of masked weights to `sparsity`, exactly; returns the model.

        sparsity: of every selected tensor (with scope "global", of all of them together), or one
            for each tensor name; tensors that are not named are left alone.
        Raises ValueError, before anything is masked: outside [0, 1), or a name not selected.
        """
        each = self._checked(sparsity)
        scores = {name: self.scores(self.weights[name]) for name in each}
        if self.scope != "row":
            scores = {name: score.flatten() for name, score in scores.items()}
        if self.scope == "global" and each is not sparsity:
            mask = criteria.prune_mask(torch.cat(list(scores.values())), sparsity)
            parts = mask.split([len(score) for score in scores.values()])
            return self._apply(dict(zip(scores, parts)))
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

    @checks
    def prune_below(self, threshold: NotNegative) -> nn.Module:
        """Masks every weight with a score under `threshold`; returns the model. Raises ValueError
        for a threshold that is negative or not finite."""
        return self._apply({n: self.scores(w) >= threshold for n, w in self.weights.items()})

    def prune_pattern(self, n: int, m: int) -> nn.Module:
        """Keeps the n best of every m neighbours in a row (2:4: n=2, m=4); returns the model.
        Raises ValueError if m does not divide all rows; nothing is masked then."""
        for name, weight in self.weights.items():
            criteria.check_pattern(weight.view.columns, n, m, name)
        scores = {name: self.scores(weight) for name, weight in self.weights.items()}
        return self._apply({name: criteria.nm_mask(s, n, m) for name, s in scores.items()})

    def _apply(self, masks: Mapping[str, Tensor]) -> nn.Module:
        """Adds masks (rows, columns), or flat, to those that are there."""
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

        final: as for `prune`, and its errors. start, end: fractions of the run's steps, 0 <= start
            < end <= 1; what is left after `end` retrains. every: steps between two prunings.
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


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Sets the trained weights to those of `state`, a `state_dict()` without steps, early in the
    same model's training; masks stay. After each of several prunings, this makes lottery tickets
    (Frankle et al. 2020). Raises ValueError if the state does not fit; the model is untouched then.
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
