import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from notebooks.reference.ab import assign, bootstrap_interval, cohens_d, compare, non_inferiority
from notebooks.reference.thompson import Log, ThompsonSampler

UNITS = range(6000)


def samples(seed=0, n=80, m=50, shift=0.3):
    rng = np.random.default_rng(seed)
    return rng.normal(2 + shift, 1.0, n), rng.normal(2, 2.0, m)


def test_assignment_is_uniform_and_follows_weights():
    counts = Counter(assign(unit, ["a", "b", "c"]) for unit in UNITS)
    assert stats.chisquare(list(counts.values())).pvalue > 0.001
    weights = {"a": 0.7, "b": 0.2, "c": 0.1, "off": 0.0}
    counts = Counter(assign(f"user-{unit}", weights) for unit in UNITS)
    expected = [len(UNITS) * weights[arm] for arm in "abc"]
    assert (
        "off" not in counts
        and stats.chisquare([counts[arm] for arm in "abc"], expected).pvalue > 0.001
    )


def test_assignment_moves_only_units_of_the_arm_that_changed():
    before = {unit: assign(unit, {"a": 1, "b": 1}) for unit in UNITS}
    joined = {unit: assign(unit, {"b": 1, "new": 1, "a": 1}) for unit in UNITS}
    moved = [unit for unit in UNITS if joined[unit] != before[unit]]
    assert {joined[unit] for unit in moved} == {"new"} and len(moved) / len(UNITS) == pytest.approx(
        1 / 3, abs=0.02
    )
    heavier = {unit: assign(unit, {"a": 1, "b": 2}) for unit in UNITS}
    assert {heavier[unit] for unit in UNITS if heavier[unit] != before[unit]} == {"b"}
    scaled = {unit: assign(unit, {"a": 10, "b": 10}) for unit in UNITS}
    assert scaled == before


def test_assignment_is_pinned_and_salts_are_independent():
    assert [assign(unit, "ab") for unit in range(8)] == list("aabbbbba")
    table = np.zeros((2, 2))
    for unit in UNITS:
        table[int(assign(unit, "ab") == "a"), int(assign(unit, "ab", salt="next") == "a")] += 1
    assert stats.chi2_contingency(table).pvalue > 0.001


@pytest.mark.parametrize("arms", [[], {"a": 0}, {"a": -1, "b": 1}, {"a": float("nan")}])
def test_assignment_refuses_bad_arms(arms):
    with pytest.raises(ValueError, match="arm"):
        assign(1, arms)


@given(st.integers(0, 10_000), st.integers(3, 60), st.booleans())
def test_t_tests_and_effect_size_agree_with_scipy(seed, n, paired):
    a, b = samples(seed, n, n if paired else n + 7)
    result = compare(a, b, paired=paired)
    reference = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    assert result.p == pytest.approx(reference.pvalue)
    pooled = stats.ttest_ind(a, b, equal_var=True).statistic * np.sqrt(1 / len(a) + 1 / len(b))
    d = reference.statistic / np.sqrt(n) if paired else pooled
    low, high = reference.confidence_interval(0.95)
    assert result.interval == pytest.approx((low, high)) and result.d == pytest.approx(d)


def test_bootstrap_interval_is_near_the_exact_one_and_covers_the_truth():
    a, b = samples(n=400, m=300)
    interval = compare(a, b, paired=False).interval
    assert bootstrap_interval(a, b, paired=False) == pytest.approx(interval, abs=0.04)
    covered = 0
    for seed in range(100):
        a, b = samples(seed, 40, 40)
        low, high = bootstrap_interval(a, b, paired=True, seed=seed)
        covered += low <= 0.3 <= high
    assert 88 <= covered <= 99


def test_pairs_stay_together_in_the_bootstrap():
    a = np.random.default_rng(0).normal(0, 5, 200)
    low, high = bootstrap_interval(a + 1, a, paired=True)
    assert low == pytest.approx(1) and high == pytest.approx(1)
    low, high = bootstrap_interval(a + 1, a, paired=False)
    assert high - low > 1


@pytest.mark.parametrize("paired", [True, False])
def test_values_without_spread_are_refused(paired):
    for a, b in (([2.0, 2.0, 2.0], [3.0, 3.0, 3.0]), ([2.0, 2.0], [2.0, 2.0])):
        with pytest.raises(ValueError, match="without any spread"):
            compare(a, b, paired=paired)
    assert cohens_d([1.0, 1.0], [2.0, 2.0], paired=paired) == -np.inf
    assert cohens_d([1.0, 1.0], [1.0, 1.0], paired=paired) == 0


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_identical_outcomes_leave_what_so_few_units_could_hide(value, paired):
    outcomes = np.full(180, value)
    result = compare(outcomes, outcomes, paired=paired)
    two_sided = 1 - 0.025 ** (1 / 180)  # a rate of which 180 units show nothing in 2.5 % of cases
    assert result.interval == pytest.approx((-two_sided, two_sided))
    assert (result.difference, result.p, result.d) == (0, 1, 0)
    test = non_inferiority(outcomes, outcomes, margin=0.02, paired=paired, higher_is_better=True)
    assert test.passed and test.p == pytest.approx(0.98**180)
    assert test.worst == pytest.approx(1 - 0.05 ** (1 / 180)) == pytest.approx(0.0165, abs=1e-4)


def test_margins_that_the_data_cannot_support_are_refused():
    with pytest.raises(ValueError, match=r"180 values cannot support a margin of 1.00%: .*1.65%"):
        non_inferiority(np.ones(180), np.ones(180), margin=0.01, paired=True)
    assert non_inferiority(np.ones(300), np.ones(300), margin=0.01, paired=True).passed


def outcomes(lost, gained, both, neither):
    """Paired values 0 and 1: right in the baseline only, the candidate only, both, none."""
    counts = [lost, gained, both, neither]
    return np.repeat([0.0, 1, 1, 0], counts), np.repeat([1.0, 0, 1, 0], counts)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", [10, 20])
def test_limits_of_proportions_cover_the_truth_as_often_as_they_say(n, paired):
    """Over all outcomes of n units, each with its exact probability."""
    limit = np.full((n + 1, n + 1), np.nan)
    for lost, gained in np.ndindex(n + 1, n + 1):
        if not paired:  # errors of one arm and of the other
            a, b = (np.arange(n) >= errors for errors in (lost, gained))
        elif lost + gained <= n:
            a, b = outcomes(lost, gained, n - lost - gained, 0)
        else:
            continue
        limit[lost, gained] = compare(b, a, paired=paired, level=0.9).interval[1]
    k, j = np.indices(limit.shape)
    for p, q in [(0.01, 0), (0.05, 0.02), (0.2, 0.1), (0.5, 0.3), (0.1, 0.6)]:
        if paired:
            chance = stats.multinomial.pmf(np.stack([k, j, n - k - j], -1), n, [p, q, 1 - p - q])
        else:
            chance = stats.binom.pmf(k, n, p) * stats.binom.pmf(j, n, q)
        assert chance[limit >= p - q].sum() >= 0.94


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 150))
def test_proportions_agree_with_the_exact_test_of_mcnemar(lost, gained, both):
    a, b = outcomes(lost, gained, both + 4, 2)
    result = compare(a, b, paired=True)
    p = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert result.p == pytest.approx(p, abs=0.16) and (result.p < 0.02 or p > 0.001)
    assert result.difference == pytest.approx((gained - lost) / len(a))
    assert result.interval[0] < result.difference < result.interval[1]
    swapped = compare(b, a, paired=True)
    assert swapped.interval == pytest.approx((-result.interval[1], -result.interval[0]))


def test_non_inferiority_of_proportions_takes_errors_as_it_takes_hits():
    a, b = outcomes(3, 2, 190, 5)
    hits = non_inferiority(a, b, margin=0.05, paired=True, higher_is_better=True)
    errors = non_inferiority(1 - a, 1 - b, margin=0.05, paired=True)
    assert hits == errors and hits.change == pytest.approx(1 / 200)
    at_worst = non_inferiority(a, b, margin=hits.worst, paired=True, higher_is_better=True)
    assert at_worst.p == pytest.approx(0.05, abs=1e-6)
    assert not non_inferiority(a, b, margin=0.02, paired=True, higher_is_better=True).passed
    assert non_inferiority(1 - a, 1 - a, margin=0.5, paired=False).p < 1e-12


@pytest.mark.parametrize(
    "a, b, message",
    [
        ([1], [1, 2], "at least 2"),
        ([1, np.nan], [1, 2], "finite"),
        ([1, 2, 3], [1, 2], "paired=False"),
    ],
)
def test_comparison_refuses_bad_samples(a, b, message):
    with pytest.raises(ValueError, match=message):
        compare(a, b, paired=True)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_non_inferiority_is_a_t_test_against_the_scaled_baseline(paired, higher_is_better):
    rng = np.random.default_rng(3)
    baseline = rng.normal(5, 0.2, 60)
    candidate = baseline * (0.995 if higher_is_better else 1.005) + rng.normal(0, 0.02, 60)
    result = non_inferiority(
        candidate, baseline, margin=0.02, paired=paired, higher_is_better=higher_is_better
    )
    limit = baseline * (0.98 if higher_is_better else 1.02)
    test, side = (
        (stats.ttest_rel if paired else stats.ttest_ind),
        ("greater" if higher_is_better else "less"),
    )
    expected = test(
        candidate, limit, alternative=side, **({} if paired else {"equal_var": False})
    ).pvalue
    assert result.p == pytest.approx(expected) and result.passed == (expected < 0.05)
    assert result.change == pytest.approx(0.005, abs=0.002)
    at_worst = non_inferiority(
        candidate, baseline, margin=result.worst, paired=paired, higher_is_better=higher_is_better
    )
    assert at_worst.p == pytest.approx(0.05, abs=1e-6)


def test_non_inferiority_keeps_its_error_rate_at_the_margin():
    rng = np.random.default_rng(0)
    passed = 0
    for _ in range(400):
        baseline = rng.normal(3, 0.3, 50)
        candidate = 1.01 * baseline + rng.normal(0, 0.1, 50)
        passed += non_inferiority(candidate, baseline, margin=0.01, paired=True).passed
    assert 8 <= passed <= 34  # 5 % of 400, within three standard deviations


def test_non_inferiority_of_equal_arms_and_bad_margins():
    same = non_inferiority([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], paired=True)
    assert same.change == 0 and same.passed and "not worse than 1.00%" in str(same)
    for margin in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="margin"):
            non_inferiority([1.0, 2.0], [1.0, 2.0], margin=margin, paired=True)
    with pytest.raises(ValueError, match="mean"):
        non_inferiority([1.0, 2.0], [-1.0, -2.0], paired=True)


def simulate(kind, means, seed, budget):
    """(right arm found, regret) of plain Thompson sampling for `budget` evaluations."""
    rng = np.random.default_rng((seed, 1))
    sampler = ThompsonSampler([str(mean) for mean in means], kind, seed=seed)
    for _ in range(budget):
        arm = sampler.choose()
        sampler.update(
            arm, rng.random() < float(arm) if kind == "beta" else rng.normal(float(arm), 0.5)
        )
    best = max(means) if kind == "beta" else min(means)
    regret = sum(abs(best - mean) * len(sampler.values[str(mean)]) for mean in means)
    return float(sampler.summary(2000)["P(best)"].idxmax()) == best, regret


@pytest.mark.parametrize("kind, means", [("beta", (0.6, 0.9, 0.75)), ("gaussian", (1.4, 0.8, 1.1))])
def test_thompson_sampling_finds_the_best_arm_with_less_regret_than_uniform_allocation(kind, means):
    budget = 250
    results = np.array([simulate(kind, means, seed, budget) for seed in range(200)])
    best = max(means) if kind == "beta" else min(means)
    uniform = budget * np.mean([abs(best - mean) for mean in means])
    assert results[:, 0].mean() >= 0.95
    assert results[:, 1].mean() < 0.35 * uniform


def test_find_best_stops_when_one_arm_is_likely_enough():
    rng = np.random.default_rng(0)
    sampler = ThompsonSampler(["good", "bad"], "gaussian")
    best = sampler.find_best(
        lambda arm: rng.normal({"good": 1.0, "bad": 1.5}[arm], 0.5), budget=1000
    )
    assert best == "good" and 10 <= sum(map(len, sampler.values.values())) < 500
    assert sampler.summary().loc["good", "P(best)"] >= 0.98
    assert sampler.find_best(lambda arm: pytest.fail("the budget is spent"), budget=1) == "good"


def test_gaussian_posterior_is_the_student_t_interval_of_many_values():
    sampler = ThompsonSampler(["a", "b"], "gaussian")
    rng = np.random.default_rng(1)
    for value in rng.normal(3, 2, 300):
        sampler.update("a", value)
        sampler.update("b", value + 50)
    interval = stats.ttest_1samp(sampler.values["a"], 0).confidence_interval(0.95)
    low, high = sampler.summary(100_000).loc["a", ["low", "high"]]
    assert (low, high) == pytest.approx(tuple(interval), abs=0.01)


def test_summary_is_that_of_the_beta_posterior():
    sampler = ThompsonSampler(["a", "b"])
    for value in (1, 1, 0, 1):
        sampler.update("a", value)
    row = sampler.summary(200_000).loc["a"]
    assert (row["evaluations"], row["mean"]) == (4, 0.75)
    assert (row["low"], row["high"]) == pytest.approx(stats.beta(4, 2).interval(0.95), abs=0.005)
    exact = stats.beta(4, 2).expect(stats.uniform.cdf)  # the other arm is uniform
    assert row["P(best)"] == pytest.approx(exact, abs=0.01)


def test_sampler_continues_from_its_log_as_if_uninterrupted(tmp_path):
    def play(sampler, steps):
        for _ in range(steps):
            arm = sampler.choose()
            sampler.update(arm, float((len(sampler.values[arm]) * 7 + len(arm)) % 3 > 0))

    whole = ThompsonSampler(["x", "yy"], log=Log(tmp_path / "whole.jsonl"))
    play(whole, 30)
    play(ThompsonSampler(["x", "yy"], log=Log(tmp_path / "parts.jsonl")), 11)
    with open(tmp_path / "parts.jsonl", "a") as file:
        file.write('{"arm": "x", "val')  # killed while writing
    restarted = ThompsonSampler(["x", "yy"], log=Log(tmp_path / "parts.jsonl"))
    play(restarted, 19)
    assert restarted.values == whole.values
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    "kind, arm, value", [("beta", "c", 1.0), ("beta", "a", 1.5), ("gaussian", "a", float("nan"))]
)
def test_sampler_refuses_bad_observations(kind, arm, value):
    sampler = ThompsonSampler(["a", "b"], kind)
    with pytest.raises(ValueError, match="arm"):
        sampler.update(arm, value)
    assert sampler.values == {"a": [], "b": []}


def test_sampler_refuses_bad_settings():
    with pytest.raises(ValueError, match="different names"):
        ThompsonSampler(["a", "a"])
    with pytest.raises(ValueError, match="'beta'"):
        ThompsonSampler(["a", "b"], "poisson")


def test_log_appends_reads_back_and_names_a_damaged_line(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = Log(path)
    log.append(unit=1, arm="int8", value=0.25)
    Log(path).append(unit="ü\n", arm="pruned", value=None)
    assert log.records() == [
        {"unit": 1, "arm": "int8", "value": 0.25},
        {"unit": "ü\n", "arm": "pruned", "value": None},
    ]
    path.write_text("not json\n" + json.dumps({"a": 1}) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        log.records()
    with pytest.raises(ValueError):
        log.append(value=float("nan"))
