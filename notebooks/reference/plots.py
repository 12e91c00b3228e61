"""Plots of weights, sizes, curves, and compression against quality: data in, Axes (or Figure) out.

They draw into `ax` or a new figure, in colours that colour-blind readers can tell apart; markers
and dashes say the same in grey print.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from kit.lab.records import quality_column
from notebooks.reference import figures
from notebooks.reference.figures import COLOURS, GREY, MUTED, new_axes, row_axes, styled
from notebooks.reference.figures import save as save

AXIS = {"bytes": "bytes of the file", "bits_per_byte": "test bits per byte"}
AXIS |= {"perplexity": "test perplexity", "accuracy": "test accuracy", "ratio": "compression ratio"}


@styled
def lines(
    curves, xlabel, ylabel, *, logx=False, logy=False, references=None, markers=True, ax=None
) -> Axes:
    """Labelled curves: name -> (x, y), or (x, y, low, high) with a shaded band; or a DataFrame, a
    curve a column. references: name -> height of a horizontal line."""
    ax, ends = new_axes(ax), []
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if isinstance(curves, pd.DataFrame):
        columns = {str(name): column.dropna() for name, column in curves.items()}
        curves = {name: (column.index, column) for name, column in columns.items()}
    curves = {name: [figures.as_array(part) for part in curve] for name, curve in curves.items()}
    for order, (name, (x, y, *band)) in enumerate(curves.items()):
        colour, marker, dash = figures.look(order)
        look = {"color": colour, "linestyle": dash, "marker": marker if markers else None}
        ax.plot(x, y, **look, label=name)
        if band and len(x) > 1:
            ax.fill_between(x, *band, color=colour, alpha=0.18, linewidth=0)
        elif band:
            ax.vlines(x, *band, color=colour, linewidth=1.2)
        ends += [(x[-1], y[-1], name, colour)] if name else []
    for scale in ["x"] * logx + ["y"] * logy:
        figures.log_scale(ax, scale)
    for name, height in (references or {}).items():
        ax.axhline(height, **figures.REFERENCE, label=name)
        ends.append((ax.get_xlim()[1], height, name, GREY))
    measured = {tuple(curve[0]) for curve in curves.values()}
    if logx and len(measured) == 1 and len(min(measured)) <= 8:
        ax.set_xticks(*measured)
    ax.autoscale_view()
    if not ends:
        return ax
    places = ax.transAxes.inverted().transform(ax.transData.transform([end[:2] for end in ends]))
    moved = np.abs(figures.spread(places[:, 1], 0.06) - places[:, 1]).max()
    if np.ptp(places[:, 0]) < 0.12 and moved < 0.1:
        figures.label_line_ends(ax, ends)
    else:  # lines to their labels would cross the data
        lines = {line.get_label(): line for line in ax.get_lines()}
        order = sorted(ends, key=lambda end: -end[1])
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
        ax.legend([lines[end[2]] for end in order], [end[2] for end in order], **place)
    return ax


@styled
def weight_histogram(weights, grid=None, *, xlabel="weight", bins=120, ax=None) -> Axes:
    """Distribution of weights (tensor or array), and the levels of a quantization grid."""
    ax, weights = new_axes(ax), figures.as_array(weights)
    counts, edges = np.histogram(weights, bins=bins)
    ax.stairs(100 * counts / weights.size, edges, fill=True, color=COLOURS[0], alpha=0.35)
    ax.stairs(100 * counts / weights.size, edges, color=COLOURS[0], linewidth=1.2)
    ax.set(xlabel=xlabel, ylabel="share of the weights per bin (%)", ylim=(0, None))
    ax.grid(False)
    if grid is not None:
        levels = np.unique(figures.as_array(grid))
        for level in levels:
            ax.axvline(level, color=COLOURS[1], linewidth=0.9, zorder=1)
        ax.set_title(f"{weights.size:,} weights (blue), {len(levels)} levels (red lines)")
    return ax


@styled
def stage_waterfall(stages: pd.DataFrame | Sequence[Mapping], *, quality=None, origin=0) -> Figure:
    """What each stage took off the file (hatched) and what that cost; the first is the dense model.

    stages: rows with name, bytes, perplexity (or accuracy, or `quality`), and low, high if known.
    origin: the row with whose quality the others' is compared.
    """
    stages = pd.DataFrame(stages).reset_index(drop=True)
    quality = quality or ("perplexity" if "perplexity" in stages else "accuracy")
    options = {"figsize": (9.2, 1.2 + 0.5 * len(stages)), "sharey": True, "layout": "constrained"}
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2), **options)
    for ax in (right, left):
        _, places = row_axes(ax, stages["name"])
    sizes = stages["bytes"].to_numpy(float)
    for place, now, previous in zip(places, sizes, [sizes[0], *sizes]):
        left.barh(place, now, 0.6, color=COLOURS[0])
        taken = {"left": now, "color": "white", "edgecolor": MUTED, "hatch": "////"}
        left.barh(place, max(previous - now, 0), 0.6, **taken)
        text = figures.byte_text(now) + (f"  ÷ {sizes[0] / now:.3g}" if place else "")
        left.text(max(previous, now) + 0.012 * max(sizes), place, text, va="center", fontsize=9.5)
    left.set(xlim=(0, 1.3 * max(sizes)), xlabel=AXIS["bytes"])
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.xaxis.set_major_formatter(EngFormatter("B"))
    values, spans = stages[quality].to_numpy(float), _spans(stages, quality)
    right.errorbar(values, places, xerr=spans, fmt="o", color=COLOURS[1], elinewidth=1.2)
    right.axvline(values[origin], **figures.REFERENCE)
    look = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for row, value in enumerate(values):
        change = f"  ({100 * (value / values[origin] - 1):+.1f} %)" if row != origin else ""
        right.annotate(f"{value:.4g}{change}", (value, places[row]), bbox=box, **look)
    right.set(xlabel=AXIS.get(quality, quality))
    right.margins(x=0.25)
    return figure


@styled
def pareto(frame: pd.DataFrame, *, quality=None, by="notebook", label="ratio", ax=None) -> Axes:
    """Bytes against quality, a point a run: what no other run dominates filled, others open.

    frame: as from `read_results`; runs on another corpus are only counted. quality: column of the
    vertical axis (default: `quality_column`). by: column that sets marker and colour. label: column
    that is written beside undominated runs. Raises ValueError without a size and a quality.
    """
    quality = quality or quality_column(frame)
    kept = frame[frame[["bytes", quality]].notna().all(axis=1)]
    kept = kept[kept["comparable"].astype(bool)] if "comparable" in kept else kept
    if not len(kept):
        raise ValueError(f"No run has both bytes and {quality}: run a notebook that writes them.")
    rising = [quality] if quality == "accuracy" else []
    best = pareto_front(kept, ["bytes"] if rising else ["bytes", quality], rising)
    ax, front = new_axes(ax, (7.2, 4.6)), kept[best].sort_values("bytes")
    ax.set(xlabel=AXIS["bytes"], ylabel=AXIS.get(quality, quality))
    step = {"where": "post", "color": "#BDBDBD", "linewidth": 1.1, "zorder": 1}
    ax.step(front["bytes"], front[quality], **step)
    spread = kept[quality].max() / max(kept[quality].min(), 1e-9)
    for order, (name, group) in enumerate(kept.groupby(by)):
        (colour, marker, _), on = figures.look(order), best[group.index]
        for rows, fill, faint in ((group[~on], "white", 0.6), (group[on], colour, 1)):
            look = {"fmt": marker, "color": colour, "markerfacecolor": fill, "elinewidth": 1.2}
            look |= {"zorder": 1 + 2 * faint, "alpha": faint}
            spans = _spans(rows, quality)
            ax.errorbar(rows["bytes"], rows[quality], np.where(spans > 0, spans, np.nan), **look)
        ax.plot([], [], marker, color=colour, label=name)
    if len(front) < len(kept):
        ax.plot([], [], "o", color=MUTED, markerfacecolor="white", label="open: dominated")
    ax.margins(0.08)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2, handletextpad=0.3)
    for scale in ["x"] + ["y"] * bool(spread > 2 and not rising):  # else a few squash the rest
        figures.log_scale(ax, scale)
    if len(frame) > len(kept):
        ax.set_title(f"other corpora, or no figures: {len(frame) - len(kept)}", fontsize=9.5)
    texts = [f"÷ {v:.3g}" if label == "ratio" else str(v) for v in front.get(label, [])]
    whiskers = zip(kept["bytes"], kept[quality], *_spans(kept, quality))
    avoid = [(x, y + d) for x, y, down, up in whiskers for d in (-down, -down / 2, 0, up / 2, up)]
    figures.label_points(ax, list(zip(front["bytes"], front[quality], texts)), avoid)
    return ax


def _spans(rows: pd.DataFrame, quality: str) -> np.ndarray:
    """(2, rows): how far the interval of the column `quality` reaches down and up; 0: not known."""
    prefix = "bits_per_byte_" if quality == "bits_per_byte" else ""
    names = [quality, f"{prefix}low", f"{prefix}high"]
    value, low, high = rows.reindex(columns=names).to_numpy(float).T
    return np.nan_to_num(np.abs([value - low, high - value]))


@styled
def heat_map(
    frame: pd.DataFrame, label: str, *, format: str = ".3g", top: float | None = None, ax=None
) -> Axes:
    """The values of a table as colours and numbers; `label` says of what, NaN stays empty. Colours
    end at `top`, if given, so that a few large values do not make all others alike."""
    values = frame.to_numpy(float)
    ax = new_axes(ax, (2.2 + 0.62 * values.shape[1], 1.4 + 0.36 * values.shape[0]))
    image = ax.imshow(values, cmap="cividis", aspect="auto", vmax=top)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            look = {"ha": "center", "va": "center", "fontsize": 9}
            look["color"] = "white" if image.norm(value) < 0.55 else "black"
            ax.text(column, row, f"{value:{format}}", **look)
    ax.set_xticks(range(values.shape[1]), frame.columns)
    ax.set_yticks(range(values.shape[0]), frame.index)
    ax.set(xlabel=frame.columns.name or "", ylabel=frame.index.name or "")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ends = "neither" if top is None else "max"
    ax.figure.colorbar(image, ax=ax, label=label, extend=ends).outline.set_visible(False)
    return ax


@styled
def bars(values, xlabel, *, intervals=None, highlight=None, format=".3g", ax=None) -> Axes:
    """Labelled bars, name -> value, from the top.

    intervals: name -> (low, high), if known. highlight: name of the one bar in colour.
    """
    (ax, places), intervals = row_axes(ax, values), intervals or {}
    colours = [COLOURS[0] if highlight in (None, name) else "#B9B9B9" for name in values]
    ax.barh(places, list(values.values()), 0.64, color=colours)
    ends = [max(value, *intervals.get(name, (value,))) for name, value in values.items()]
    for place, (name, value), end in zip(places, values.items(), ends):
        if name in intervals:
            ax.plot(intervals[name], (place, place), color=figures.INK, linewidth=1.2, marker="|")
        text = f"{value:{format}}"
        ax.text(end + 0.012 * max(ends), place, text, va="center", fontsize=9.5)
    ax.set(xlabel=xlabel, xlim=(0, 1.12 * max(ends)))
    if "bytes" in xlabel:
        ax.xaxis.set_major_formatter(EngFormatter("B"))
    return ax


@styled
def intervals(
    rows: Mapping[str, Sequence[float]], xlabel: str, *, references=(), format="", ax=None
) -> Axes:
    """A forest plot: name -> (value, low, high) from the top, with dashed lines at `references`;
    with a `format`, values are written too."""
    ax, places = row_axes(ax, rows)
    for place, (value, low, high) in zip(places, rows.values()):
        ax.plot((low, high), (place, place), color=COLOURS[0], linewidth=2)
        ax.plot(value, place, "o", color=COLOURS[0])
        if format:
            text, end = f"{value:{format}}", {"xytext": (8, 0), "textcoords": "offset points"}
            ax.annotate(text, (max(value, high), place), **end, va="center", fontsize=9.5)
    for reference in references:
        ax.axvline(reference, **figures.REFERENCE)
    ax.set(xlabel=xlabel)
    ax.margins(x=0.1)
    return ax


def dominated_by(frame: pd.DataFrame, minimize=("bytes", "perplexity"), maximize=()) -> pd.Series:
    """For each row the index label of one that dominates it (no worse in any column and better in
    one), of several the best in the last column, or None. Rows with a missing value neither
    dominate nor are dominated. Raises ValueError for a column that is absent."""
    absent = [column for column in (*minimize, *maximize) if column not in frame]
    if absent:
        raise ValueError(f"There is no column {absent[0]!r} to compare, only {[*frame]}.")
    costs = np.hstack([frame[[*minimize]].to_numpy(float), -frame[[*maximize]].to_numpy(float)])
    names = []
    for cost in costs:
        better = np.flatnonzero((costs <= cost).all(axis=1) & (costs < cost).any(axis=1))
        names.append(frame.index[better[costs[better, -1].argmin()]] if len(better) else None)
    return pd.Series(names, index=frame.index, dtype=object)


def pareto_front(frame: pd.DataFrame, minimize=("bytes", "perplexity"), maximize=()) -> pd.Series:
    """True for the complete rows that no other row dominates (see `dominated_by`)."""
    complete = frame[[*minimize, *maximize]].notna().all(axis=1)
    return complete & dominated_by(frame, minimize, maximize).isna()
