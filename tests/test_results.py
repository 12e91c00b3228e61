import json
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kit.core import store
from kit.lab.records import environment, quality_column, read_results, read_stages, write_result
from notebooks.reference import tracking
from notebooks.reference.plots import dominated_by, pareto_front


def record(**more):
    return {
        "notebook": "05",
        "parameters": {"steps": 3, "vocab_size": 512},
        "seed": 0,
        "corpus": {"name": "docs", "sha256": "aa"},
        **more,
    }


def test_what_is_written_is_read_with_nested_keys_dotted(tmp_path):
    written = record(bytes=np.int64(7), perplexity=np.float32(2.5), extra={"x": [1, 2]})
    write_result(tmp_path / "a", written)
    frame = read_results(tmp_path)
    row = frame.iloc[0]
    assert tuple(row[["bytes", "perplexity", "parameters.steps", "corpus.sha256"]]) == (
        7,
        2.5,
        3,
        "aa",
    )
    assert row["extra.x"] == [1, 2] and row["run"] == str(tmp_path / "a")
    assert row["versions.numpy"] == np.__version__


def test_environment_names_the_machine():
    facts = environment()
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "kit", "scikit-learn", "papermill"} <= set(facts["versions"])
    assert facts["threads"] == torch.get_num_threads() and facts["cores"] >= 1 and facts["cpu"]


def test_values_that_json_lacks_are_converted(tmp_path):
    @dataclass(frozen=True)
    class Settings:
        lr: float

    path = write_result(
        tmp_path,
        record(
            nan=math.nan,
            array=np.arange(3),
            where=Path("x/y"),
            settings=Settings(0.5),
            versions={"torch": "1"},
        ),
    )
    read = json.loads(path.read_text())
    assert read["nan"] is None and read["array"] == [0, 1, 2] and read["where"] == "x/y"
    assert read["settings"] == {"lr": 0.5} and read["versions"] == {"torch": "1"}


def test_a_failed_write_leaves_the_old_record_alone(tmp_path, monkeypatch):
    path = write_result(tmp_path, record(bytes=1))
    before = path.read_bytes()
    with pytest.raises(TypeError, match="object has no JSON form"):
        write_result(tmp_path, record(bytes=object()))
    monkeypatch.setattr(store.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_result(tmp_path, record(bytes=2))
    assert path.read_bytes() == before and len(read_results(tmp_path)) == 1


@pytest.mark.parametrize(
    "broken, says",
    [
        ({"notebook": "05", "parameters": {}}, "missing required field `seed`"),
        (record(corpus={"name": "docs"}), r"missing required field `sha256` - at `\$.corpus`"),
        (record(stages=[{"bytes": 3}]), r"missing required field `name` - at `\$.stages"),
    ],
)
def test_incomplete_records_are_refused(tmp_path, broken, says):
    with pytest.raises(ValueError, match=says):
        write_result(tmp_path, broken)
    assert not list(tmp_path.iterdir())


def test_damaged_records_name_the_file(tmp_path):
    for text in ('{"notebook": ', "[1]"):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(ValueError, match="result.json"):
            read_results(tmp_path)


def test_folders_patterns_and_lists_find_each_run_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a-1", "runs/a-2", "runs/deep/b-1"):
        write_result(name, record())
    assert list(read_results()["run"]) == ["runs/a-1", "runs/a-2", "runs/deep/b-1"]
    assert list(read_results("runs/a-*")["run"]) == ["runs/a-1", "runs/a-2"]
    assert len(read_results(["runs", "runs/a-1", Path("runs/a-1/result.json")])) == 3


def test_no_runs_give_an_empty_frame_that_can_be_worked_with(tmp_path):
    frame = read_results(tmp_path / "none")
    assert len(frame) == 0 and len(read_stages(tmp_path)) == 0
    assert pareto_front(frame).sum() == 0 and quality_column(frame) == "perplexity"


def test_runs_on_another_corpus_are_flagged(tmp_path):
    for name, sha256 in (("a", "aa"), ("b", "aa"), ("c", "bb")):
        stages = [{"name": "dense", "bytes": 9}]
        write_result(
            tmp_path / name, record(corpus={"name": "docs", "sha256": sha256}, stages=stages)
        )
    assert list(read_results(tmp_path)["comparable"]) == [True, True, False]
    assert list(read_stages(tmp_path)["comparable"]) == [True, True, False]


def test_stages_are_rows_in_their_order(tmp_path):
    sizes = {"dense": 8, "qat": 2, "prune": 1}
    stages = [{"name": name, "bytes": size, "note": "n"} for name, size in sizes.items()]
    write_result(tmp_path, record(stages=stages))
    frame = read_stages(tmp_path)
    rows = list(zip(frame["order"], frame["name"], frame["bytes"]))
    assert rows == [(0, "dense", 8), (1, "qat", 2), (2, "prune", 1)]
    assert set(frame["note"]) == {"n"} and set(frame["corpus.name"]) == {"docs"}


def test_interval_in_bits_per_byte_is_that_of_the_likelihood(tmp_path):
    tokens, text_bytes = 1000, 4100

    def bits(perplexity):
        return tokens * math.log(perplexity) / math.log(2) / text_bytes

    write_result(tmp_path, record(perplexity=50.0, low=48.0, high=53.0, bits_per_byte=bits(50.0)))
    row = read_results(tmp_path).iloc[0]
    assert row["bits_per_byte_low"] == pytest.approx(bits(48.0))
    assert row["bits_per_byte_high"] == pytest.approx(bits(53.0))


def test_quality_is_what_the_runs_share(tmp_path):
    write_result(tmp_path / "a", record(perplexity=9.0, bits_per_byte=1.0))
    assert quality_column(read_results(tmp_path)) == "perplexity"
    write_result(
        tmp_path / "b", record(perplexity=9.0, bits_per_byte=1.0, parameters={"vocab_size": 4})
    )
    assert quality_column(read_results(tmp_path)) == "bits_per_byte"
    write_result(tmp_path / "c" / "d", record(accuracy=0.9))
    assert quality_column(read_results(tmp_path / "c")) == "accuracy"


points = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=9)


@given(points)
def test_dominance_is_that_of_its_definition(rows):
    names = [f"run {i}" for i in range(len(rows))]
    frame = pd.DataFrame(rows, columns=["bytes", "perplexity", "accuracy"], index=names)
    named, front = (
        dominated_by(frame, maximize=["accuracy"]),
        pareto_front(frame, maximize=["accuracy"]),
    )

    def dominates(a, b):
        no_worse = a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2]
        return no_worse and a != b

    for i, row in enumerate(rows):
        assert front.iloc[i] == (not any(dominates(other, row) for other in rows))
        assert front.iloc[i] == (named.iloc[i] is None)
        if named.iloc[i] is not None:
            assert dominates(rows[int(named.iloc[i].split()[1])], row)


def test_missing_values_neither_dominate_nor_stand_on_the_front():
    frame = pd.DataFrame({"bytes": [1, 2, 3.0], "perplexity": [np.nan, 5, 6]})
    assert list(pareto_front(frame)) == [False, True, False]
    assert list(dominated_by(frame)) == [None, None, 1]
    with pytest.raises(ValueError, match="no column 'seconds'"):
        dominated_by(frame, ["seconds"])


def test_a_record_names_its_commit_and_goes_to_a_tracker(tmp_path, monkeypatch):
    told = {}

    class Writer:
        def __init__(self, place):
            assert place == str(tmp_path / "tensorboard")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def add_text(self, name, text):
            told[name] = json.loads(text)

        def add_scalar(self, name, value, step):
            told[name, step] = value

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setenv("KIT_COMMIT", "abc")
    curves = {"qat": [{"step": 3, "loss": 2.0, "validation": None}]}
    record = {"notebook": "n", "parameters": {"lr": 0.1}, "seed": 0, "bytes": 5, "curves": curves}
    found = json.loads(tracking.write_result(tmp_path, record, "tensorboard").read_text())
    assert found["commit"] == "abc" and found["duration"] > 0 and found["date"] > "2020"
    assert told == {"parameters": {"lr": 0.1}, ("bytes", 0): 5, ("qat/loss", 3): 2.0}
