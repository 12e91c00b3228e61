import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from notebooks.reference import figures, plots

mpl.use("Agg")
STAGES = [
    {"name": "dense", "bytes": 4e6, "perplexity": 60.0, "low": 59.0, "high": 61.0},
    {"name": "QAT", "bytes": 1e6, "perplexity": 62.0, "low": 61.0, "high": 63.5},
    {"name": "pruning", "bytes": 4e5, "perplexity": 66.0, "low": 65.0, "high": 67.5},
]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def runs(count=12, seed=0):
    rng = np.random.default_rng(seed)
    ratio = np.exp(rng.uniform(1, 5, count))
    perplexity = 60 + ratio * rng.uniform(0.05, 0.2, count)
    notebook = np.where(np.arange(count) % 2, "02_qat", "05_full_pipeline")
    return pd.DataFrame(
        {
            "notebook": notebook,
            "ratio": ratio,
            "bytes": 4e6 / ratio,
            "perplexity": perplexity,
            "low": perplexity - 1,
            "high": perplexity + 1.5,
            "bits_per_byte": perplexity / 40,
            "accuracy": np.nan,
            "comparable": True,
        }
    )


def texts(ax):
    return [text.get_text() for text in ax.texts]


DRAWINGS = {
    "lines": lambda: plots.lines(
        {"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 4], [4, 3], [6, 5])},
        "tokens",
        "ms",
        logx=True,
        logy=True,
        references={"dense": 3.5},
    ),
    "lines of one point": lambda: plots.lines(
        {"a": ([2.0], [3.0])}, "tokens", "ms", logx=True, logy=True
    ),
    "lines of a frame": lambda: plots.lines(
        pd.DataFrame({"a": [1, np.nan, 2], "b": [2, 3, 4]}), "bits", "x"
    ),
    "weight_histogram": lambda: plots.weight_histogram(
        torch.randn(30, 40), torch.linspace(-3, 3, 15)
    ),
    "stage_waterfall": lambda: plots.stage_waterfall(STAGES),
    "one stage of a classifier": lambda: plots.stage_waterfall(
        [{"name": "a", "bytes": 9, "accuracy": 0.9}]
    ),
    "pareto": lambda: plots.pareto(runs()),
    "pareto of one run": lambda: plots.pareto(runs(1)),
    "heat_map": lambda: plots.heat_map(pd.DataFrame([[1, np.nan], [3, 4]]), "degradation (%)"),
    "bars": lambda: plots.bars({"a": 3.0, "b": 1.0}, "ms", intervals={"a": (2, 4)}, highlight="b"),
    "intervals": lambda: plots.intervals(
        {"a": (0, -1, 2), "b": (1, 1, 1)}, "difference", references=[0, 3]
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_is_drawn_without_warnings_or_traces(name, tmp_path, recwarn):
    before = dict(mpl.rcParams)
    drawing = DRAWINGS[name]()
    path = plots.save(drawing, tmp_path / "figures" / "figure.png")
    figure = drawing.figure if isinstance(drawing, Axes) else drawing
    for ax in figure.axes[:1]:
        assert ax.get_xlabel() or name.startswith("heat_map")
    assert path.stat().st_size > 3000 and dict(mpl.rcParams) == before
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_text_lies_on_another(name):
    drawing = DRAWINGS[name]()
    figure = drawing.figure if isinstance(drawing, Axes) else drawing
    figure.draw_without_rendering()
    for ax in figure.axes:
        extents = [text.get_window_extent() for text in ax.texts if text.get_text()]
        overlaps = [(a, b) for i, a in enumerate(extents) for b in extents[:i] if a.overlaps(b)]
        assert not overlaps


def test_figures_given_axes_draw_into_them():
    _, ax = plt.subplots()
    assert plots.lines({"a": ([1], [2])}, "x", "y", ax=ax) is ax and len(plt.get_fignums()) == 1
    assert plots.bars({"a": 1.0}, "x", ax=ax) is ax and plots.pareto(runs(), ax=ax) is ax


def test_lines_draw_the_values_and_the_references():
    ax = plots.lines(
        {"LSTM": ([10, 20, 30], [60, 50, 45])}, "step", "x", references={"bigram": 103}
    )
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(10, 60), (20, 50), (30, 45)])
    assert ax.lines[1].get_ydata()[0] == 103 and set(texts(ax)) == {"LSTM", "bigram"}


def test_intervals_stand_in_their_rows_from_the_top():
    ax = plots.intervals({"int8": (0.5, 0.1, 0.9), "int4": (-1, -2, 0)}, "x", references=(0.2,))
    first, point, second, _, reference = ax.lines
    assert first.get_xydata().tolist() == [[0.1, 0], [0.9, 0]] and point.get_xdata() == 0.5
    assert second.get_ydata().tolist() == [-1, -1] and list(reference.get_xdata()) == [0.2, 0.2]
    low, high = ax.get_ylim()
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "int8",
        "int4",
    ] and low < -1 < 0 < high


def test_pareto_colours_the_front_and_leaves_other_corpora_out():
    frame = runs(5).assign(
        bytes=[5.0, 4, 3, 2, 4.5],
        perplexity=[1.0, 2, 3, 4, 3.5],
        ratio=[1, 2, 3, 4, 1.5],
        notebook="05",
        comparable=[True, True, False, True, True],
    )
    ax = plots.pareto(frame)
    dominated, front = ax.containers
    assert list(dominated[0].get_xdata()) == [4.5] and list(front[0].get_xdata()) == [5, 4, 2]
    assert sorted(texts(ax)) == ["÷ 1", "÷ 2", "÷ 4"] and "figures: 1" in ax.get_title(loc="left")
    with pytest.raises(ValueError, match="No run has both bytes and perplexity"):
        plots.pareto(frame.assign(bytes=np.nan))


def test_accuracy_is_better_when_higher():
    frame = runs(2).assign(
        bytes=[1.0, 2.0], accuracy=[0.9, 0.8], perplexity=np.nan, notebook="digits"
    )
    dominated, front = plots.pareto(frame).containers
    assert list(front[0].get_xdata()) == [1.0] and list(dominated[0].get_xdata()) == [2.0]


def test_waterfall_states_ratio_and_cost_against_the_first_stage_or_another():
    left, right = plots.stage_waterfall(STAGES).axes
    assert texts(left) == ["4 MB", "1 MB  ÷ 4", "400 kB  ÷ 10"]
    assert texts(right) == ["60", "62  (+3.3 %)", "66  (+10.0 %)"]
    assert texts(plots.stage_waterfall(STAGES, origin=1).axes[1]) == [
        "60  (-3.2 %)",
        "62",
        "66  (+6.5 %)",
    ]


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (999_999, "1 MB"),
        (4.2e9, "4.2 GB"),
    ],
)
def test_bytes_are_written_with_three_digits(count, text):
    assert figures.byte_text(count) == text


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.floats(0.01, 0.3))
def test_labels_keep_their_distance_and_move_as_little_as_possible(wanted, gap):
    wanted = np.array(wanted)
    placed = figures.spread(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(placed[order]) >= gap - 1e-9).all()
    steps, rng = gap * np.arange(len(wanted)), np.random.default_rng(0)
    for _ in range(20):  # no admissible placement nearby is closer to what was wanted
        moved = placed[order] - steps + rng.normal(0, 0.05, len(wanted))
        other = np.maximum.accumulate(moved) + steps
        assert ((placed - wanted) ** 2).sum() <= ((other - wanted[order]) ** 2).sum() + 1e-9


def test_a_curve_without_a_name_has_no_label():
    assert plots.lines({"": ([1, 2, 3], [3, 2, 1])}, "step", "loss").texts[:] == []
    assert [
        text.get_text() for text in plots.lines({"a": ([1, 2], [2, 1])}, "step", "loss").texts
    ] == ["a"]
