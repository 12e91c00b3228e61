"""Pictures of comparisons and samplers."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np

from kit.ab.comparison import Comparison
from kit.ab.thompson import ThompsonSampler


def plot_comparisons(comparisons: Mapping[str, Comparison], margin: float | None = None, ax=None):
    """Forest plot: each difference with its t interval, zero, and the margin (in the values' unit) if
    given.
    """
    ax = ax or plt.subplots(figsize=(6, 0.8 + 0.4 * len(comparisons)))[1]
    for row, (name, result) in enumerate(comparisons.items()):
        ax.plot(result.interval, (row, row), color="C0", lw=2)
        ax.plot(result.difference, row, "o", color="C0")
        ax.annotate(
            f"p = {result.p:.2g}", (result.interval[1], row), (6, 0), textcoords="offset points", va="center"
        )
    ax.axvline(0, color="0.4", lw=1)
    if margin is not None:
        ax.axvline(margin, color="C3", lw=1, ls="--", label="margin")
        ax.legend(frameon=False)
    ax.set(
        yticks=range(len(comparisons)),
        yticklabels=list(comparisons),
        xlabel="difference of means",
        ylim=(len(comparisons) - 0.5, -0.5),
    )
    ax.margins(x=0.25)
    return ax


def plot_sampler(sampler: ThompsonSampler, axes=None):
    """Left: what is believed of each arm's mean. Right: evaluations given to each arm."""
    left, right = axes if axes is not None else plt.subplots(1, 2, figsize=(9, 3), layout="constrained")[1]
    draws = sampler.draws(20_000)
    for arm, column in zip(sampler.arms, draws.T):
        left.hist(
            column,
            bins=80,
            range=np.quantile(draws, (0.001, 0.999)),
            density=True,
            histtype="stepfilled",
            alpha=0.5,
            label=arm,
        )
    left.set(xlabel="mean value of the arm", ylabel="posterior density")
    left.legend(frameon=False)
    right.barh(
        sampler.arms,
        [len(sampler.values[arm]) for arm in sampler.arms],
        color=[f"C{i}" for i in range(len(sampler.arms))],
    )
    right.invert_yaxis()
    right.set(xlabel="evaluations")
    return left, right
