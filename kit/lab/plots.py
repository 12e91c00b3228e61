"""Plots of training, weights, sizes, and compression against quality: data in, Axes (or Figure) out.

Every function takes ``ax`` to draw into, or makes a figure. Colours come from a palette that colour-blind
readers can tell apart; markers and dashes carry the same distinction in grey print.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kit.lab.figures import (
    COLOURS,
    DASHES,
    GREY,
    INK,
    MARKERS,
    MUTED,
    as_array,
    byte_text,
    interval_of,
    label_line_ends,
    label_points,
    new_axes,
    plain_log,
    save,
    styled,
)
from kit.lab.records import pareto_front, quality_column

__all__ = ["bars", "component_bytes", "heat_map", "lines", "pareto", "save", "stage_waterfall",
           "training_curves", "weight_histogram"]
_AXIS = {"perplexity": "test perplexity", "bits_per_byte": "test bits per byte", "accuracy": "test accuracy",
         "bytes": "bytes of the file", "ratio": "compression ratio", "step": "optimizer step",
         "tokens": "tokens seen", "seconds": "seconds"}


@styled
def lines(curves: Mapping | pd.DataFrame, xlabel: str, ylabel: str, *, logx: bool = False, logy: bool = False,
          references: Mapping[str, float] | None = None, markers: bool = True,
          ax: Axes | None = None) -> Axes:
    """Labelled curves.

    Args:
        curves: name -> (x, y), or (x, y, low, high) with a shaded band; or a DataFrame, a curve a column.
        references: name -> height of a horizontal line.
    """
    ax = new_axes(ax)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set(xscale="log" if logx else "linear", yscale="log" if logy else "linear")
    if isinstance(curves, pd.DataFrame):
        curves = {str(name): (column.dropna().index, column.dropna()) for name, column in curves.items()}
    ends = []
    for order, (name, (x, y, *band)) in enumerate(curves.items()):
        x, y, look = as_array(x), as_array(y), order % len(COLOURS)
        marker = MARKERS[look] if markers else None
        ax.plot(x, y, color=COLOURS[look], linestyle=DASHES[look], marker=marker)
        if band:
            ax.fill_between(x, *map(as_array, band), color=COLOURS[look], alpha=0.18, linewidth=0)
        if name:
            ends.append((x[-1], y[-1], name, COLOURS[look]))
    for name, height in (references or {}).items():
        ax.axhline(height, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        ends.append((ax.get_xlim()[1], height, name, GREY))
    for axis in [axis for axis, log in ((ax.xaxis, logx), (ax.yaxis, logy)) if log]:
        plain_log(axis, "B" if "bytes" in axis.get_label_text() else "")
    measured = {tuple(as_array(x)) for x, *_ in curves.values()}
    if logx and len(measured) == 1 and len(min(measured)) <= 8:
        ax.set_xticks(*measured)
    ax.autoscale_view()
    if ends:
        label_line_ends(ax, ends)
    return ax


def training_curves(histories: Mapping[str, Sequence[Mapping]],
                    references: Mapping[str, float] | None = None, *, key: str = "validation",
                    x: str = "step", perplexity: bool = True, ax: Axes | None = None) -> Axes:
    """Learning curves of one or more models.

    Args:
        histories: name -> ``TrainResult.history``.
        references: name -> height of a horizontal line, such as the perplexity of a Kneser-Ney model.
        key: the value of the history to draw, in nats a token; entries without it are left out.
        x: "step", "tokens" or "seconds".
        perplexity: draw exp(value), on a log axis.

    Raises:
        ValueError: a history has no such value.
    """
    curves = {}
    for name, history in histories.items():
        rows = [row for row in history if row.get(key) is not None]
        if not rows:
            raise ValueError(f"The history of {name} has no {key!r}; train with validate= or plot the loss.")
        values = np.array([row[key] for row in rows], dtype=float)
        curves[name] = [row[x] for row in rows], np.exp(values) if perplexity else values
    kind = {"validation": "validation", "loss": "training"}.get(key, key)
    ylabel = f"{kind} perplexity" if perplexity else f"{kind} loss (nats per token)"
    few = max(len(values) for _, values in curves.values()) <= 30
    return lines(curves, _AXIS.get(x, x), ylabel, references=references, logy=perplexity, markers=few, ax=ax)


@styled
def weight_histogram(weights, grid=None, *, xlabel: str = "weight", bins: int = 120,
                     ax: Axes | None = None) -> Axes:
    """Distribution of weights (tensor or array of any shape), and the levels of a quantization grid as lines.

    Args:
        grid: levels in the unit of the weights.
    """
    ax, weights = new_axes(ax), as_array(weights)
    counts, edges = np.histogram(weights, bins=bins)
    ax.stairs(100 * counts / weights.size, edges, fill=True, color=COLOURS[0], alpha=0.35)
    ax.stairs(100 * counts / weights.size, edges, color=COLOURS[0], linewidth=1.2)
    ax.set(xlabel=xlabel, ylabel="share of the weights per bin (%)", ylim=(0, None))
    ax.grid(False)
    if grid is not None:
        levels = np.unique(as_array(grid))
        for level in levels:
            ax.axvline(level, color=COLOURS[1], linewidth=0.9, zorder=1)
        ax.set_title(f"{weights.size:,} weights (blue), {len(levels)} levels (red lines)")
    return ax


@styled
def component_bytes(before: Mapping[str, float], after: Mapping[str, float], *,
                    ax: Axes | None = None) -> Axes:
    """Bytes of each component in the dense file and in the compressed one, largest on top, with the ratio.

    Args:
        before, after: component -> bytes on disk; a component absent from `after` was removed.
    """
    names = sorted(before, key=before.get)
    ax = new_axes(ax, (6.8, 0.9 + 0.52 * len(names)))
    places, largest = np.arange(len(names)), max(before.values())
    ax.barh(places + 0.19, [before[name] for name in names], 0.36, color="#C9C9C9")
    ax.barh(places - 0.19, [after.get(name, 0) for name in names], 0.36, color=COLOURS[0])
    for place, name in zip(places, names):
        large, small = before[name], after.get(name, 0)
        change = f"{byte_text(small)}  (÷ {large / small:.3g})" if small else "removed"
        ax.text(large + 0.01 * largest, place + 0.19, byte_text(large), va="center", fontsize=9, color=GREY)
        ax.text(small + 0.01 * largest, place - 0.19, change, va="center", fontsize=9, color=COLOURS[0])
    ax.set(yticks=places, yticklabels=names, xlim=(0, 1.2 * largest), xlabel="bytes in the file")
    dense, compressed = byte_text(sum(before.values())), byte_text(sum(after.values()))
    ax.set_title(f"{dense} dense (grey), {compressed} compressed (blue)")
    return _horizontal(ax)


@styled
def stage_waterfall(stages: pd.DataFrame | Sequence[Mapping], *, quality: str | None = None, origin: int = 0) -> Figure:
    """What each stage took off the file (hatched) and what that cost; the first stage is the dense model.

    Args:
        stages: rows with name, bytes and perplexity (or accuracy, or `quality`); low and high where known.
        origin: the row whose quality the others' is compared with.
    """
    stages = pd.DataFrame(stages).reset_index(drop=True)
    quality = quality or ("perplexity" if "perplexity" in stages else "accuracy")
    size, places = (9.2, 1.2 + 0.5 * len(stages)), -np.arange(len(stages))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained",
                                         width_ratios=(3, 2))
    left.set(yticks=places, yticklabels=stages["name"], ylim=(places[-1] - 0.6, 0.7), xlabel=_AXIS["bytes"])
    right.set(xlabel=_AXIS.get(quality, quality))
    _remaining_bytes(left, stages["bytes"].to_numpy(float), places)
    value = stages[quality].to_numpy(float)
    interval = interval_of(stages, quality)
    right.errorbar(value, places, xerr=interval, fmt="o", color=COLOURS[1], elinewidth=1.2)
    right.axvline(value[origin], color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=0)
    for place, now in zip(places, value):
        text = f"{now:.4g}" + (f"  ({100 * (now / value[origin] - 1):+.1f} %)" if place != places[origin] else "")
        right.annotate(text, (now, place), (0, 7), textcoords="offset points", ha="center", fontsize=9,
                       bbox=dict(facecolor="white", edgecolor="none", pad=0.6))
    right.margins(x=0.25)
    _horizontal(left)
    _horizontal(right)
    return figure


def _remaining_bytes(ax: Axes, sizes: np.ndarray, places: np.ndarray) -> None:
    for place, now, previous in zip(places, sizes, [sizes[0], *sizes]):
        ax.barh(place, now, 0.6, color=COLOURS[0])
        ax.barh(place, max(previous - now, 0), 0.6, left=now, color="white", edgecolor=MUTED, hatch="////")
        text = byte_text(now) + (f"  ÷ {sizes[0] / now:.3g}" if place else "")
        ax.text(max(previous, now) + 0.012 * sizes.max(), place, text, va="center", fontsize=9.5)
    ax.set_xlim(0, 1.3 * sizes.max())


@styled
def pareto(frame: pd.DataFrame, *, cost: str = "bytes", quality: str | None = None, by: str = "notebook",
           label: str = "ratio", ax: Axes | None = None) -> Axes:
    """File size against quality, a point a run: what no other run dominates in colour, the others muted.

    Args:
        frame: as from `kit.lab.records.read_results`; runs on another corpus than most are left out and counted.
        quality: column of the vertical axis (default `kit.lab.records.quality_column`); intervals where known.
        by: column that sets marker and colour.
        label: column written beside each undominated run.

    Raises:
        ValueError: no run has both a size and a quality.
    """
    quality = quality or quality_column(frame)
    kept = frame[frame[[cost, quality]].notna().all(axis=1)]
    kept = kept[kept["comparable"].astype(bool)] if "comparable" in kept else kept
    if not len(kept):
        raise ValueError(f"No run has both {cost} and {quality}; run a notebook that writes them first.")
    more_is_better = [quality] if quality == "accuracy" else []
    best = pareto_front(kept, [cost] if more_is_better else [cost, quality], more_is_better)
    ax, front = new_axes(ax, (7.2, 4.6)), kept[best].sort_values(cost)
    ax.set(xscale="log", xlabel=_AXIS.get(cost, cost), ylabel=_AXIS.get(quality, quality))
    ax.step(front[cost], front[quality], where="post", color="#BDBDBD", linewidth=1.1, zorder=1)
    _points(ax, kept, front.index, cost, quality, by)
    plain_log(ax.xaxis, "B" if cost == "bytes" else "")
    if len(frame) > len(kept):
        ax.set_title(f"not shown (another corpus, or no figures): {len(frame) - len(kept)}", fontsize=9.5)
    texts = [f"÷ {value:.3g}" if label == "ratio" else str(value) for value in front.get(label, [])]
    whiskers = zip(kept[cost], kept[quality], *interval_of(kept, quality))
    avoid = [(x, y + part) for x, y, down, up in whiskers for part in (-down, -down / 2, 0, up / 2, up)]
    label_points(ax, list(zip(front[cost], front[quality], texts)), avoid)
    return ax


def _points(ax: Axes, kept: pd.DataFrame, front: pd.Index, cost: str, quality: str, by: str) -> None:
    for order, (name, group) in enumerate(kept.groupby(by)):
        colour, marker = COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)]
        on_front = group.index.isin(front)
        for rows, line, face in ((group[~on_front], MUTED, "white"), (group[on_front], colour, colour)):
            ax.errorbar(rows[cost], rows[quality], yerr=interval_of(rows, quality), fmt=marker, color=line,
                        markerfacecolor=face, elinewidth=1.2, zorder=3 if face == colour else 2)
        ax.plot([], [], marker, color=colour, label=name)
    if len(front) < len(kept):
        ax.plot([], [], "o", color=MUTED, markerfacecolor="white", label="dominated")
    ax.margins(0.08)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2, handletextpad=0.3)


@styled
def heat_map(frame: pd.DataFrame, label: str, *, format: str = ".3g", ax: Axes | None = None) -> Axes:
    """The values of a table as colours and numbers; `label` says what they are, NaN leaves a cell empty."""
    values = frame.to_numpy(float)
    ax = new_axes(ax, (2.2 + 0.62 * values.shape[1], 1.4 + 0.36 * values.shape[0]))
    image = ax.imshow(values, cmap="cividis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if image.norm(value) < 0.55 else "black"
            ax.text(column, row, f"{value:{format}}", ha="center", va="center", color=colour, fontsize=9)
    ax.set(xticks=range(values.shape[1]), xticklabels=frame.columns, xlabel=frame.columns.name or "")
    ax.set(yticks=range(values.shape[0]), yticklabels=frame.index, ylabel=frame.index.name or "")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, label=label).outline.set_visible(False)
    return ax


@styled
def bars(values: Mapping[str, float], xlabel: str, *,
         intervals: Mapping[str, tuple[float, float]] | None = None, highlight: str | None = None,
         format: str = ".3g", ax: Axes | None = None) -> Axes:
    """Labelled bars from the top in the given order, with an interval (low, high) where there is one.

    Args:
        highlight: name of the one bar in colour (default: all).
    """
    ax, intervals = new_axes(ax, (6.8, 0.9 + 0.4 * len(values))), intervals or {}
    places, heights = -np.arange(len(values)), list(values.values())
    colours = [COLOURS[0] if highlight in (None, name) else "#B9B9B9" for name in values]
    ax.barh(places, heights, 0.64, color=colours)
    ends = [max(value, *intervals.get(name, (value,))) for name, value in values.items()]
    for place, (name, value), end in zip(places, values.items(), ends):
        if name in intervals:
            ax.plot(intervals[name], (place, place), color=INK, linewidth=1.2, marker="|")
        ax.text(end + 0.012 * max(ends), place, f"{value:{format}}", va="center", fontsize=9.5)
    ax.set(yticks=places, yticklabels=values, xlabel=xlabel, xlim=(0, 1.12 * max(ends)))
    return _horizontal(ax)


def _horizontal(ax: Axes) -> Axes:
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    if "bytes" in ax.get_xlabel():
        ax.xaxis.set_major_formatter(EngFormatter("B"))
    return ax
