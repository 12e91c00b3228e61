"""The byte budget: exact knapsack, measured bytes, files within the budget."""

import itertools

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kit import artifact
from kit.budget.allocation import allocate
from kit.budget.sensitivity import plan_for_budget, scan
from kit.models import build_model
from kit.quantization import Format, quantize_weights

options_of = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.tuples(st.integers(0, 30), st.floats(-1, 9)), min_size=1, max_size=4),
    min_size=1,
)


def best_of_all(options, budget):
    return min(
        (
            sum(loss for _, loss in picks)
            for picks in itertools.product(*options.values())
            if sum(size for size, _ in picks) <= budget
        ),
        default=None,
    )


@given(options_of, st.integers(0, 120))
def test_equals_brute_force(options, budget):
    best = best_of_all(options, budget)
    if best is None:
        with pytest.raises(ValueError, match=f"a budget of {budget} bytes is too small"):
            allocate(options, budget)
        return
    chosen = allocate(options, budget)
    picks = [options[name][position] for name, position in chosen.items()]
    assert list(chosen) == list(options) and sum(size for size, _ in picks) <= budget
    assert sum(loss for _, loss in picks) == pytest.approx(best, abs=1e-9)


@given(options_of, st.integers(0, 120))
def test_slices_keep_the_budget_and_come_close(options, budget):
    best = best_of_all(options, budget - 12 * len(options))
    if best is None:
        return
    picks = [
        options[name][position] for name, position in allocate(options, budget, cells=10).items()
    ]
    assert sum(size for size, _ in picks) <= budget
    assert sum(loss for _, loss in picks) <= best + 1e-9


def test_a_name_without_options_is_an_error():
    with pytest.raises(ValueError, match="'a' has no option"):
        allocate({"a": []}, 10)


FORMATS = {"8": Format(8), "4": Format(4, range="mse"), "2": Format(2, range="mse")}


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model(
        "ResNetBK",
        {"vocab_size": 80, "d_model": 16, "layers": 1, "d_ff": 24, "channels": 8, "experts": 2},
    )
    tokens = torch.randint(0, 80, (4, 33))
    batches = [(tokens[:, :-1], tokens[:, 1:])]
    cache = tmp_path_factory.mktemp("scan")
    return model, batches, scan(model, batches, FORMATS, cache=cache), cache


def test_scan_measures_each_tensor_alone_and_is_cached(scanned, monkeypatch):
    model, batches, table, cache = scanned
    assert len(table) == 3 * 9 and set(table["format"]) == set(FORMATS)
    assert (table.groupby("format")["bytes"].sum()[["2", "4", "8"]].diff().dropna() > 0).all()
    assert (
        table[table.format == "2"]["increase"].abs().sum()
        > table[table.format == "8"]["increase"].abs().sum()
    )
    row = table[(table.tensor == "head.weight") & (table.format == "4")].iloc[0]
    from kit.training.evaluation import evaluate

    alone = quantize_weights(artifact_copy(model), {"head.weight": FORMATS["4"]})
    assert evaluate(alone, batches).loss == pytest.approx(row["loss"], abs=1e-7)
    monkeypatch.setattr("kit.budget.sensitivity.evaluate", lambda *_: pytest.fail("scanned again"))
    pd.testing.assert_frame_equal(scan(model, batches, FORMATS, cache=cache), table)


def artifact_copy(model):
    from kit.core.weights import materialize

    return materialize(model)


@pytest.mark.parametrize("share", [0.16, 0.2, 0.3])
def test_the_file_is_within_the_budget_to_the_byte(scanned, tmp_path, share):
    model, _, table, _ = scanned
    budget = int(artifact.float32_bytes(model) * share)
    plan = plan_for_budget(model, table, FORMATS, budget)
    size = artifact.save(quantize_weights(artifact_copy(model), plan), tmp_path / "a")
    assert size <= budget
    increase = table.set_index(["tensor", "format"])["increase"]
    label = {format: name for name, format in FORMATS.items()}
    planned = sum(increase[name, label[plan[name]]] for name in set(table.tensor))
    for name, format in FORMATS.items():
        uniform = {**plan, **{tensor: format for tensor in set(table.tensor)}}
        if artifact.save(quantize_weights(artifact_copy(model), uniform), tmp_path / "b") <= budget:
            assert planned <= increase[:, name].sum() + 1e-9


def test_a_byte_less_than_a_plan_takes_is_another_plan(scanned):
    model, _, table, _ = scanned
    size = artifact.float32_bytes(model) // 5
    for _ in range(6):  # sums of scanned bytes leave headers out: the first choice is often over
        plan = plan_for_budget(model, table, FORMATS, size - 1)
        assert (now := artifact.nbytes(quantize_weights(artifact_copy(model), plan))) < size
        size = now


def test_the_budget_is_kept_for_what_is_saved(scanned, tmp_path):
    from kit.quantization.gptq import gptq

    model, batches, table, _ = scanned
    budget = artifact.float32_bytes(model) // 5
    plan = plan_for_budget(model, table, FORMATS, budget, lambda m, plan: gptq(m, plan, batches))
    assert artifact.save(gptq(artifact_copy(model), plan, batches), tmp_path / "a") <= budget


def test_an_impossible_budget_is_an_error(scanned):
    model, _, table, _ = scanned
    with pytest.raises(ValueError, match="bytes"):
        plan_for_budget(model, table, FORMATS, 500)
