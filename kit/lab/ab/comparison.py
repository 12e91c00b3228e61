"""Tests of one arm against another: difference, effect size, intervals, non-inferiority."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats


@dataclass(frozen=True)
class Comparison:
    """Mean of a minus mean of b, with its uncertainty. `interval`: Student t; `bootstrap`: percentile."""

    test: str  # "paired" or "Welch"
    n: tuple[int, int]
    difference: float
    interval: tuple[float, float]
    bootstrap: tuple[float, float]
    statistic: float
    df: float
    p: float  # two-sided
    d: float  # Cohen's d
    level: float

    def __str__(self):
        low, high = self.interval
        return (
            f"{self.test} t-test, n = {self.n[0]} and {self.n[1]}: difference {self.difference:+.4g} "
            f"[{low:+.4g}, {high:+.4g}] at {self.level:.0%}, p = {self.p:.2g}, d = {self.d:+.2f}"
        )


def compare(a, b, *, paired: bool, level: float = 0.95, seed: int = 0) -> Comparison:
    """Tests whether the values a (n,) and b (m,) have different means.

    paired=True: both arms saw the same units in the same order (t-test of the differences); False:
    Welch's t-test. Raises ValueError for fewer than two values, values that are not finite, or paired
    samples of unequal length.
    """
    a, b = _samples(a, b, paired)
    difference, error, df = _difference(a, b, paired)
    half = error * stats.t.ppf((1 + level) / 2, df)
    t = _ratio(difference, error)
    return Comparison(
        "paired" if paired else "Welch",
        (len(a), len(b)),
        difference,
        (difference - half, difference + half),
        bootstrap_interval(a, b, paired=paired, level=level, seed=seed),
        t,
        df,
        float(2 * stats.t.sf(abs(t), df)),
        cohens_d(a, b, paired=paired),
        level,
    )


def _samples(a, b, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (a, b))
    for x in (a, b):
        if len(x) < 2:
            raise ValueError(f"an arm has {len(x)} value(s); a comparison needs at least 2")
        if not np.isfinite(x).all():
            raise ValueError(
                f"{(~np.isfinite(x)).sum()} of {len(x)} values are not finite; remove or repair them first"
            )
    if paired and len(a) != len(b):
        raise ValueError(
            f"paired samples have {len(a)} and {len(b)} values; give one of each per unit, or paired=False"
        )
    return a, b


def _difference(a, b, paired: bool) -> tuple[float, float, float]:
    """Mean difference, its standard error and degrees of freedom (Welch-Satterthwaite if not paired)."""
    if paired:
        return float((a - b).mean()), float((a - b).std(ddof=1) / np.sqrt(len(a))), len(a) - 1.0
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if va + vb else len(a) + len(b) - 2.0
    return float(a.mean() - b.mean()), float(np.sqrt(va + vb)), float(df)


def _ratio(difference: float, spread: float) -> float:
    """difference / spread where no spread means certainty: 0 for equal arms, else infinite."""
    if spread:
        return difference / spread
    return float(np.copysign(np.inf, difference)) if difference else 0.0


def cohens_d(a, b, *, paired: bool) -> float:
    """Difference of means in standard deviations: pooled (Cohen 1988), or of the differences (d_z) if
    paired.
    """
    a, b = _samples(a, b, paired)
    if paired:
        return _ratio(float((a - b).mean()), float((a - b).std(ddof=1)))
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return _ratio(float(a.mean() - b.mean()), float(np.sqrt(pooled)))


def bootstrap_interval(a, b, *, paired: bool, level=0.95, resamples=9999, seed=0) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(a) - mean(b); pairs are drawn together if paired (Efron 1979)."""
    a, b = _samples(a, b, paired)
    data, statistic = (
        ((a - b,), np.mean) if paired else ((a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis))
    )
    batch = max(1, 10_000_000 // max(len(a), len(b)))
    result = stats.bootstrap(
        data,
        statistic,
        vectorized=True,
        confidence_level=level,
        n_resamples=resamples,
        method="percentile",
        batch=batch,
        rng=np.random.default_rng(seed),
    )
    return tuple(float(x) for x in result.confidence_interval)


@dataclass(frozen=True)
class NonInferiority:
    """Is the candidate at most `margin` worse than the baseline? `worst`: the smallest margin that would
    still pass.
    """

    change: float  # relative change of the mean in the direction of worse: +0.01 is 1 % worse
    worst: float
    margin: float
    p: float
    level: float
    passed: bool

    def __str__(self):
        verdict = (
            f"not worse than {self.margin:.2%}"
            if self.passed
            else f"worse than {self.margin:.2%} is not excluded"
        )
        measured = f"{self.change:+.3%} measured, below {self.worst:+.3%} at {self.level:.0%}"
        return f"{verdict}: {measured}, p = {self.p:.2g}"


def non_inferiority(
    candidate,
    baseline,
    *,
    margin: float = 0.01,
    paired: bool,
    higher_is_better: bool = False,
    level: float = 0.95,
) -> NonInferiority:
    """One-sided test that the candidate's mean is not worse than the baseline's by `margin` (a fraction
    of it).

    H0: mean(candidate) >= (1 + margin) mean(baseline) for losses, <= (1 - margin) for accuracies; a
    t-test of candidate - (1 ± margin) baseline, so that the baseline's own uncertainty counts (Sasabuchi
    1988). Same errors as `compare`; ValueError also if margin < 0 or the baseline's mean is not positive
    (a relative margin means nothing).
    """
    c, b = _samples(candidate, baseline, paired)
    if margin < 0 or b.mean() <= 0:
        raise ValueError(f"margin {margin} of a baseline with mean {b.mean():.4g}: both must be positive")
    sign = -1.0 if higher_is_better else 1.0

    def p_value(m):
        difference, error, df = _difference(c, (1 + sign * m) * b, paired)
        return float(stats.t.cdf(_ratio(sign * difference, error), df)) if difference or error else 0.5

    alpha, change = 1 - level, float(sign * (c.mean() / b.mean() - 1)) + 0.0  # never a negative zero
    worst, step = change, 1e-9 + abs(change)
    while p_value(change + step) > alpha and step < 1e3:
        step *= 2
    if p_value(change + step) <= alpha < p_value(change):
        worst = float(optimize.brentq(lambda m: p_value(m) - alpha, change, change + step, xtol=1e-12))
    p = p_value(margin)
    return NonInferiority(change, worst, margin, p, level, p < alpha)
