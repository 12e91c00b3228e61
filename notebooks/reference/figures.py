"""The look of every figure: style, palette, and labels that stand beside what they name."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter
from scipy.optimize import isotonic_regression

# Okabe and Ito (2008), "Color universal design", without the yellow that is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))
MUTED, GREY, INK = "#9A9A9A", "#6A6A6A", "#333333"
REFERENCE = {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (4, 3)), "zorder": 1}
STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "white"),
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("font.size", "axes.labelsize"), 10.5),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9.5),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    **{"axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.edgecolor": "#777777"},
    **{"axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True},
    **{"lines.linewidth": 1.8, "lines.markersize": 5.5, "errorbar.capsize": 2.5, "figure.dpi": 100},
}
SIDES = ((6, 5), (-6, -5), (6, -5), (-6, 5), (0, 9), (0, -9), (9, 0), (-9, 0))  # points, best first


def look(order: int) -> tuple:
    """Colour, marker and dashes of the curve or group with this number: no two share all three."""
    turn = order // len(COLOURS)
    at = order % len(COLOURS), (order + turn) % len(MARKERS), (order + 2 * turn) % len(DASHES)
    return COLOURS[at[0]], MARKERS[at[1]], DASHES[at[2]]


def styled(function: Callable) -> Callable:
    """Draws under `STYLE` and leaves matplotlib's own settings as they were."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return wrapper


def new_axes(ax: Axes | None, size: tuple[float, float] = (6.8, 3.9)) -> Axes:
    """`ax`, or the axes of a new figure of `size` inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def row_axes(ax: Axes | None, names: Iterable[str]) -> tuple[Axes, np.ndarray]:
    """Axes with a named row for each of `names`, from the top, and the heights of the rows."""
    names = list(names)
    ax, places = new_axes(ax, (6.8, 0.9 + 0.4 * len(names))), -np.arange(len(names))
    ax.set(yticks=places, yticklabels=names, ylim=(places[-1] - 0.6, 0.7))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return ax, places


def save(drawing: Axes | Figure, path: str | Path) -> Path:
    """Writes the figure as PNG, or what the suffix says, at 150 dots an inch."""
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


def log_scale(ax: Axes, which: str) -> None:
    """Makes the "x" or "y" axis logarithmic, with ticks that read 60, 80, 100, or 2 kB, 5 kB."""
    axis = getattr(ax, f"{which}axis")
    ax.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    if high < 1.1 * low:
        low, high = low / 1.5, high * 1.5
        ax.set(**{f"{which}lim": (low, high)})
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 5 * low else (1, 2, 5) if high < 100 * low else (1,)
    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(EngFormatter("B") if "bytes" in axis.get_label_text() else plain)
    axis.set_minor_formatter(NullFormatter())


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Positions nearest to `wanted` (least squares), in the same order and at least `gap` apart."""
    order, steps = np.argsort(wanted, kind="stable"), gap * np.arange(len(wanted))
    placed = np.empty(len(wanted))
    placed[order] = isotonic_regression(wanted[order] - steps).x + steps
    return placed


def label_line_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes each (x, y, text, colour) right of the axes at the height of y, or near it."""
    heights = ax.transAxes.inverted().transform(ax.transData.transform([end[:2] for end in ends]))
    gap = 13 / (72 * ax.figure.get_size_inches()[1] * ax.get_position().height)
    leader = {"arrowstyle": "-", "lw": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2}
    look = {"textcoords": "axes fraction", "va": "center", "annotation_clip": False}
    for (x, y, text, colour), height in zip(ends, spread(heights[:, 1], gap)):
        look |= {"color": colour, "arrowprops": {**leader, "color": colour, "relpos": (0, 0.5)}}
        ax.annotate(text, (x, y), (1.03, height), fontsize=9.5, **look)


def label_points(ax: Axes, points: list[tuple[float, float, str]], avoid: Iterable = ()) -> None:
    """Writes each (x, y, text) beside its point, on the side where it meets least of the other
    points, the labels, and the further (x, y) to `avoid`."""
    ax.figure.draw_without_rendering()  # settles the layout, on which extents depend
    taken = [_around(ax, x, y) for x, y in [*avoid, *(point[:2] for point in points)]]
    look = {"textcoords": "offset points", "fontsize": 9, "zorder": 2.5, "annotation_clip": False}
    look["path_effects"] = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    for x, y, text in points:
        notes = [ax.annotate(text, (x, y), side, **look, **_aligned(*side)) for side in SIDES]
        extents = [note.get_window_extent() for note in notes]
        right, left = ax.figure.bbox.x1, ax.bbox.x0
        outside = [9 * (extent.x1 > right or extent.x0 < left) for extent in extents]
        meets = [sum(map(extent.overlaps, taken)) for extent in extents]
        best = int(np.argmin(np.add(meets, outside)))
        taken.append(extents[best])
        for note in notes[:best] + notes[best + 1 :]:
            note.remove()


def _aligned(dx: int, dy: int) -> dict[str, str]:
    """Alignment of a text at this offset from its point: away from it."""
    across, up = ("center", "left", "right"), ("center", "bottom", "top")
    return {"ha": across[np.sign(dx)], "va": up[np.sign(dy)]}


def _around(ax: Axes, x: float, y: float):
    """Four points (of 1/72 inch) around a place, in display coordinates."""
    return mpl.transforms.Bbox([ax.transData.transform((x, y))] * 2).padded(4)
