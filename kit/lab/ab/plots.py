"""Pictures of comparisons and samplers."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from kit.lab.ab.comparison import Comparison
from kit.lab.ab.thompson import ThompsonSampler
from kit.lab.figures import COLOURS, MUTED, new_axes, styled


@styled
def plot_comparisons(comparisons: Mapping[str, Comparison], margin: float | None = None,
                     ax: Axes | None = None) -> Axes:
    """Forest plot: each difference with its t interval, zero, and the margin (in the values' unit) if given."""
    ax = new_axes(ax, (6.8, 0.9 + 0.4 * len(comparisons)))
    for row, (name, result) in enumerate(comparisons.items()):
        _interval(ax, row, result.difference, result.interval, COLOURS[0])
        ax.annotate(f"p = {result.p:.2g}", (result.interval[1], row), (8, 0), textcoords="offset points", va="center")
    ax.axvline(0, color=MUTED, linewidth=1.1)
    if margin is not None:
        ax.axvline(margin, color=COLOURS[1], linewidth=1.1, linestyle=(0, (4, 3)))
        ax.annotate("margin", (margin, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", color=COLOURS[1])
    ax.set(xlabel="difference of means")
    ax.margins(x=0.25)
    return _rows(ax, list(comparisons))


@styled
def plot_sampler(sampler: ThompsonSampler, axes: tuple[Axes, Axes] | None = None) -> tuple[Axes, Axes]:
    """Left: each arm's mean as believed, with its central 95 %. Right: the evaluations spent on it."""
    if axes is None:
        size = (9.0, 1.0 + 0.4 * len(sampler.arms))
        axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)[1]
    left, right = axes
    low, middle, high = np.quantile(sampler.draws(20_000), (0.025, 0.5, 0.975), axis=0)
    for row in range(len(sampler.arms)):
        _interval(left, row, middle[row], (low[row], high[row]), COLOURS[0])
    counts = [len(sampler.values[arm]) for arm in sampler.arms]
    right.barh(range(len(counts)), counts, 0.64, color=COLOURS[0])
    for row, count in enumerate(counts):
        right.annotate(str(count), (count, row), (4, 0), textcoords="offset points", va="center")
    left.set(xlabel="mean value of the arm, 95 % credible")
    right.set(xlabel="evaluations", xlim=(0, 1.12 * max(1, *counts)))
    return _rows(left, sampler.arms), _rows(right, sampler.arms)


def _interval(ax: Axes, row: int, value: float, interval: tuple[float, float], colour: str) -> None:
    ax.plot(interval, (row, row), color=colour, linewidth=2)
    ax.plot(value, row, "o", color=colour)


def _rows(ax: Axes, names: list[str]) -> Axes:
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    return ax
