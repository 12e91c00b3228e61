"""A/B tests between compressed candidates: who gets which model, and is a difference real.

Values are one number per unit (a request, a window of text, an image): a loss, or 1 for correct and
0 for wrong. Paired arms saw the same units in the same order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from scipy import optimize, stats


def assign(unit, arms: Sequence[str] | Mapping[str, float], salt: str = "") -> str:
    """The arm that `unit` belongs to: always the same one, on any machine, without a table.

    Weighted rendezvous hashing (Thaler & Ravishankar 1998, Schindelhauer & Schomaker 2005): an arm
    scores -ln(u) / weight, u uniform from a hash of (salt, arm, unit), and the smallest score wins.
    When an arm joins, leaves or changes weight, only units that move to or from it move. Another
    `salt` is another experiment. Raises ValueError unless weights are finite, none negative and one
    positive.
    """
    weights = dict(arms) if isinstance(arms, Mapping) else dict.fromkeys(arms, 1.0)
    if not any(weights.values()) or not all(0 <= weight < math.inf for weight in weights.values()):
        raise ValueError(f"arms are {weights}: give finite weights >= 0, one of them positive")

    def score(arm: str) -> float:
        text = "".join(f"{len(part)}:{part}" for part in map(str, (salt, arm, unit)))
        bits = int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 11
        return -math.log((bits + 0.5) / 2**53) / weights[arm]

    return min((arm for arm in weights if weights[arm]), key=score)


@dataclass(frozen=True)
class Comparison:
    """Mean of a minus mean of b, by this test. p is two-sided, d Cohen's."""

    test: str
    difference: float
    interval: tuple[float, float]
    p: float
    d: float
    level: float

    def __str__(self):
        low, high = self.interval
        found = f"difference {self.difference:+.4g} [{low:+.4g}, {high:+.4g}] at {self.level:.0%}"
        return f"{self.test}: {found}, p = {self.p:.2g}, d = {self.d:+.2f}"


def compare(a, b, *, paired: bool, level: float = 0.95) -> Comparison:
    """Whether the values a (n,) and b (m,) have different means: by Student's t-test of the
    differences if paired, by Welch's if not, and by `_Shares` where all values are 0 or 1.

    Raises ValueError for fewer than two values, values that are not finite, a pair without partner,
    and values other than 0 and 1 that have no spread, of which nothing can be tested.
    """
    a, b = _samples(a, b, paired)
    if _is_binary(a, b):
        more, less = _Shares.of(a, b, paired), _Shares.of(b, a, paired)
        test, p = "proportions", 2 * min(more.p(0.0), less.p(0.0))
        interval = -less.upper((1 - level) / 2), more.upper((1 - level) / 2)
    else:
        result = _t_test(a, b, paired)
        test, p, interval = "t-test", float(result.pvalue), (*result.confidence_interval(level),)
    test = f"{'paired' if paired else 'unpaired'} {test}, n = {len(a)} and {len(b)}"
    d = cohens_d(a, b, paired=paired)
    return Comparison(test, float(a.mean() - b.mean()), interval, p, d, level)


def _samples(a, b, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(x, dtype=float).ravel() for x in (a, b))
    if min(len(a), len(b)) < 2 or (paired and len(a) != len(b)):
        need = "as many of each, or paired=False" if paired else "each"
        raise ValueError(f"the arms have {len(a)} and {len(b)} values: give at least 2, {need}")
    if not np.isfinite([*a, *b]).all():
        raise ValueError("an arm has values that are not finite: repair or remove them")
    return a, b


def _is_binary(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.isin([*a, *b], (0, 1)).all())


def _t_test(a: np.ndarray, b: np.ndarray, paired: bool, alternative: str = "two-sided"):
    if not (np.ptp(a - b) if paired else np.ptp(a) + np.ptp(b)):
        raise ValueError(f"{len(a)} values without any spread cannot be tested: give other units")
    if paired:
        return stats.ttest_rel(a, b, alternative=alternative)
    return stats.ttest_ind(a, b, equal_var=False, alternative=alternative)


@dataclass(frozen=True)
class _Shares:
    """A difference of proportions: `more` of n values raise it, `less` of m lower it. Of pairs
    these are the ones that differ, one way and the other."""

    more: int
    n: int
    less: int
    m: int
    paired: bool

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray, paired: bool) -> "_Shares":
        more, less = (a > b, a < b) if paired else (a, b)
        return cls(int(more.sum()), len(a), int(less.sum()), len(b), paired)

    def upper(self, alpha: float) -> float:
        """One-sided upper limit at 1 - alpha: the exact limits of both shares (Clopper & Pearson
        1934), put together as variances are (Zou & Donner 2008), with the correlation of pairs."""
        more, less = self.more / self.n, self.less / self.m
        up = stats.beta.isf(alpha, self.more + 1, self.n - self.more) - more if more < 1 else 0.0
        down = less - stats.beta.ppf(alpha, self.less, self.m - self.less + 1) if less else 0.0
        odds = more * less / ((1 - more) * (1 - less)) if self.paired and more * less else 0.0
        return float(more - less + math.sqrt(up**2 + 2 * math.sqrt(odds) * up * down + down**2))

    def p(self, margin: float) -> float:
        """The alpha whose upper limit is `margin`; 0.5 at most, 0 below 1e-16."""
        if self.upper(0.5) >= margin:
            return 0.5
        if self.upper(1e-16) <= margin:
            return 0.0
        log = optimize.brentq(
            lambda x: self.upper(math.exp(x)) - margin, math.log(1e-16), math.log(0.5)
        )
        return math.exp(log)


def cohens_d(a, b, *, paired: bool) -> float:
    """Difference of means in standard deviations: pooled (Cohen 1988), or of the differences."""
    a, b = _samples(a, b, paired)
    n, m, difference = len(a), len(b), float(a.mean() - b.mean())
    pooled = ((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / (n + m - 2)
    spread = float((a - b).std(ddof=1) if paired else np.sqrt(pooled))
    if spread:
        return difference / spread
    return math.copysign(math.inf, difference) if difference else 0.0


def bootstrap_interval(a, b, *, paired: bool, level=0.95, seed=0) -> tuple[float, float]:
    """Percentile bootstrap of mean(a) - mean(b), in which pairs stay together (Efron 1979)."""
    a, b = _samples(a, b, paired)
    options = {"confidence_level": level, "method": "percentile", "rng": seed, "batch": 100}
    result = stats.bootstrap((a, b), _difference, paired=paired, **options)
    return tuple(map(float, result.confidence_interval))


def _difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return a.mean(axis) - b.mean(axis)


@dataclass(frozen=True)
class NonInferiority:
    """Whether the candidate is worse by less than `margin`. change: of the mean, above 0 if worse;
    worst: the smallest margin that would pass; p: one-sided."""

    change: float
    worst: float
    margin: float
    p: float
    level: float

    @property
    def passed(self) -> bool:
        return self.p < 1 - self.level

    def __str__(self):
        verdict = "not worse than {:.2%}" if self.passed else "worse than {:.2%} is not excluded"
        found = f"{self.change:+.3%} measured, below {self.worst:+.3%} at {self.level:.0%}"
        return f"{verdict.format(self.margin)}: {found}, p = {self.p:.2g}"


def non_inferiority(
    candidate, baseline, *, margin=0.01, paired: bool, higher_is_better=False, level=0.95
) -> NonInferiority:
    """Tests H0: the candidate's mean is worse than the baseline's by `margin` or more.

    Where all values are 0 or 1, by `_Shares`: the margin is a difference (0.01: one unit in 100).
    For others it is a share of the baseline's mean, by a t-test of candidate - (1 ± margin)
    baseline, so that the baseline's own uncertainty counts (Sasabuchi 1988).
    Raises ValueError as `compare` does, for a baseline whose mean is not positive, and for a margin
    outside 0 to 1 or so small that as many values 0 and 1 could not support it, whatever they are.
    """
    c, b = _samples(candidate, baseline, paired)
    sign, binary = -1.0 if higher_is_better else 1.0, _is_binary(c, b)
    if not 0 <= margin <= 1 or not (binary or b.mean() > 0):
        raise ValueError(f"margin {margin} of a mean of {b.mean():.4g}: give 0 to 1 of one above 0")
    if binary:
        worse = _Shares.of(*((1 - c, 1 - b) if higher_is_better else (c, b)), paired)
        least = _Shares(0, worse.n, 0, worse.m, paired).upper(1 - level)
        if margin <= least:
            need = f"give one above {least:.2%}, or more values"
            raise ValueError(f"{len(c)} values cannot support a margin of {margin:.2%}: {need}")
        change = worse.more / worse.n - worse.less / worse.m
        return NonInferiority(change, worse.upper(1 - level), margin, worse.p(margin), level)

    def test(margin: float):
        return _t_test(
            c, (1 + sign * margin) * b, paired, "greater" if higher_is_better else "less"
        )

    def limit(margin: float) -> float:
        """How much worse than a baseline that is worse by `margin` the candidate may be."""
        low, high = test(margin).confidence_interval(level)
        return -low if higher_is_better else high

    change = float(sign * (c.mean() / b.mean() - 1))
    worst, least = change, change + 1e-9
    if limit(least) > 0:
        worst = optimize.brentq(limit, least, 1e3) if limit(1e3) < 0 else math.inf
    return NonInferiority(change, worst, margin, float(test(margin).pvalue), level)
