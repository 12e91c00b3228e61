"""The look of every figure: style, palette, and labels that stand beside what they name."""

import functools
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito (2008), "Color universal design", without the yellow that is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))
MUTED, GREY, INK = "#9A9A9A", "#6A6A6A", "#333333"
STYLE = {
    "figure.dpi": 100, "figure.facecolor": "white", "axes.facecolor": "white", "font.size": 10.5,
    "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.labelsize": 10.5, "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5, "legend.fontsize": 9.5, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#777777", "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8,
    "axes.axisbelow": True, "lines.linewidth": 1.8, "lines.markersize": 5.5, "errorbar.capsize": 2.5,
}
_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]
_SIDES = ((6, 5, "left", "bottom"), (-6, -5, "right", "top"), (6, -5, "left", "top"),
          (-6, 5, "right", "bottom"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
          (9, 0, "left", "center"), (-9, 0, "right", "center"))


def styled(function):
    """Draw under `STYLE` and leave matplotlib's own settings as they were."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)
    return wrapper


def new_axes(ax: Axes | None, size: tuple[float, float] = (6.8, 3.9)) -> Axes:
    """`ax`, or the axes of a new figure of `size` inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def save(drawing: Axes | Figure, path: str | Path) -> Path:
    """Write the figure as PNG, or what the suffix says, at 150 dots an inch."""
    path, figure = Path(path), drawing if isinstance(drawing, Figure) else drawing.figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def byte_text(count: float) -> str:
    """Three digits and a decimal unit: 1234567 -> "1.23 MB"."""
    power = 0
    while count >= 999.5 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {('', 'k', 'M', 'G', 'T')[power]}B"


def as_array(values) -> np.ndarray:
    """A 1-D float64 array of a tensor (any device and dtype), array or list."""
    values = values.detach().cpu().float().numpy() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=float).ravel()


def plain_log(axis, unit: str = "") -> None:
    """Ticks of a log axis that read 60, 80, 100, 200 rather than powers."""
    low, high = axis.get_view_interval()
    if high < 1.1 * low:
        low, high = low / 1.5, high * 1.5
        axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 5 * low else (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(EngFormatter(unit) if unit else FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def label_line_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each (x, y, text, colour) right of the axes at the height of y, or apart from its neighbours."""
    points = ax.transAxes.inverted().transform(ax.transData.transform([(x, y) for x, y, *_ in ends]))
    gap = 13 / (72 * ax.figure.get_size_inches()[1] * ax.get_position().height)
    for (x, y, text, colour), height in zip(ends, spread(points[:, 1], gap)):
        leader = dict(arrowstyle="-", color=colour, lw=0.7, alpha=0.6, shrinkA=1, shrinkB=2, relpos=(0, 0.5))
        ax.annotate(text, (x, y), (1.03, height), textcoords="axes fraction", va="center", color=colour,
                    fontsize=9.5, annotation_clip=False, arrowprops=leader)


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Positions nearest to `wanted` (least squares), in the same order and at least `gap` apart.

    Isotonic regression of ``wanted - gap * rank`` by pooling adjacent violators.
    """
    order = np.argsort(wanted, kind="stable")
    pools = []
    for rank, value in enumerate(wanted[order]):
        total, size = value - rank * gap, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / size:
            below, count = pools.pop()
            total, size = total + below, size + count
        pools.append((total, size))
    placed = np.empty(len(wanted))
    placed[order] = np.repeat([t / n for t, n in pools], [n for _, n in pools]) + gap * np.arange(len(wanted))
    return placed


def label_points(ax: Axes, points: list[tuple[float, float, str]],
                 avoid: Iterable[tuple[float, float]] = ()) -> None:
    """Write each (x, y, text) beside its point, on the side where it meets least.

    Args:
        avoid: further (x, y) that labels keep clear of.
    """
    ax.figure.draw_without_rendering()  # settles the layout, on which extents depend
    taken = [_around(ax, x, y) for x, y in [*avoid, *((x, y) for x, y, _ in points)]]
    for x, y, text in points:
        look = dict(textcoords="offset points", fontsize=9, annotation_clip=False, path_effects=_HALO)
        notes = [ax.annotate(text, (x, y), (dx, dy), ha=across, va=up, zorder=2.5, **look)
                 for dx, dy, across, up in _SIDES]
        extents = [note.get_window_extent() for note in notes]
        meets = [sum(extent.overlaps(box) for box in taken)
                 + 9 * (extent.x1 > ax.figure.bbox.x1 or extent.x0 < ax.bbox.x0) for extent in extents]
        best = int(np.argmin(meets))
        taken.append(extents[best])
        for note in notes[:best] + notes[best + 1:]:
            note.remove()


def _around(ax: Axes, x: float, y: float, radius: float = 4.0):
    across, up = ax.transData.transform((x, y))
    return mpl.transforms.Bbox.from_extents(across - radius, up - radius, across + radius, up + radius)


def interval_of(rows, quality: str) -> np.ndarray:
    """Distances (2, rows) from the column `quality` down to low and up to high, 0 where none are known."""
    prefix = "bits_per_byte_" if quality == "bits_per_byte" else ""
    if prefix + "low" not in rows or prefix + "high" not in rows:
        return np.zeros((2, len(rows)))
    value, low, high = (rows[name].to_numpy(float) for name in (quality, prefix + "low", prefix + "high"))
    return np.nan_to_num(np.abs(np.stack([value - low, high - value])))
