"""Thompson sampling: the best of several arms with few evaluations."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from kit.lab.ab.assignment import Log


class ThompsonSampler:
    """Spends evaluations where they matter (Thompson 1933): draw each arm's mean from its posterior, play
    the best.

    kind="beta": values in [0, 1] (correct or wrong), Beta(1, 1) prior, higher is better. kind="gaussian":
    losses of unknown mean and variance, lower is better, Student-t posterior after two values of each
    arm; the variance of all arms together counts as one more value of each. `top_two` is the probability
    of playing the best of the *other* arms instead (Russo 2016): surer which arm is best, for a little
    more regret. With a `log`, earlier records are replayed, and a restarted sampler goes on exactly as it
    would have.
    """

    def __init__(
        self,
        arms: Sequence[str],
        kind: str = "beta",
        top_two: float = 0.0,
        seed: int = 0,
        log: Log | None = None,
    ):
        if kind not in ("beta", "gaussian"):
            raise ValueError(f"kind {kind!r} is unknown; give 'beta' for accuracies or 'gaussian' for losses")
        if len(set(arms)) != len(arms) or len(arms) < 2:
            raise ValueError(f"arms {list(arms)} must be at least two different names")
        self.arms, self.kind, self.top_two, self.seed = list(arms), kind, top_two, seed
        self.values = {arm: [] for arm in arms}
        self._moments = np.zeros((3, len(arms)))  # count, mean, sum of squared deviations
        for record in log.records() if log else ():
            self._observe(record["arm"], record["value"])
        self._log = log

    def choose(self) -> str:
        """Arm to evaluate next: a function of the seed and the values seen so far."""
        rng = np.random.default_rng((self.seed, int(self._moments[0].sum())))
        first = int(np.argmax(self._draw(rng, 1)[0]))
        if rng.random() >= self.top_two:
            return self.arms[first]
        draws = self._draw(rng, 1)[0]
        draws[first] = -np.inf
        return self.arms[int(np.argmax(draws))]

    def update(self, arm: str, value: float):
        """Takes one evaluation of `arm`. Raises ValueError for an unknown arm or a value outside the
        kind's range.
        """
        self._observe(arm, float(value))
        if self._log:
            self._log.append(arm=arm, value=float(value))

    def _observe(self, arm: str, value: float):
        if arm not in self.values:
            raise ValueError(f"arm {arm!r} is not one of {self.arms}")
        if not np.isfinite(value) or (self.kind == "beta" and not 0 <= value <= 1):
            raise ValueError(
                f"value {value} of arm {arm!r} must be {'in [0, 1]' if self.kind == 'beta' else 'finite'}"
            )
        self.values[arm].append(value)
        count, mean, squares = self._moments[:, self.arms.index(arm)]
        delta = value - mean
        mean += delta / (count + 1)
        self._moments[:, self.arms.index(arm)] = count + 1, mean, squares + delta * (value - mean)

    def _draw(self, rng, n: int) -> np.ndarray:
        """n draws of every arm's goodness, (n, arms): arms with too few values for a posterior come first."""
        count, mean, squares = self._moments
        if self.kind == "beta":
            return rng.beta(1 + count * mean, 1 + count * (1 - mean), (n, len(self.arms)))
        if (count < 2).any():
            return np.tile(np.where(count < 2, np.inf, -mean), (n, 1))
        pooled = squares.sum() / (count - 1).sum()
        error = np.sqrt((squares + pooled) / count**2)
        return -(mean + error * rng.standard_t(count, (n, len(self.arms))))

    def draws(self, n: int) -> np.ndarray:
        """n posterior draws of every arm's mean, (n, arms), in the unit of the values."""
        sign = 1 if self.kind == "beta" else -1
        return sign * self._draw(np.random.default_rng(self.seed), n)

    def probability_best(self, draws: int = 20_000) -> dict[str, float]:
        """Posterior probability of each arm to be the best one (Monte Carlo)."""
        best = np.argmax(self._draw(np.random.default_rng(self.seed), draws), axis=1)
        return {arm: float((best == i).mean()) for i, arm in enumerate(self.arms)}

    def summary(self) -> pd.DataFrame:
        """One row an arm: evaluations, mean, probability of being the best."""
        count, mean, _ = self._moments
        return pd.DataFrame(
            {"evaluations": count.astype(int), "mean": mean, "P(best)": self.probability_best()},
            index=self.arms,
        )

    def find_best(self, evaluate: Callable[[str], float], budget: int, confidence: float = 0.99) -> str:
        """Evaluates chosen arms, `evaluate(arm) -> value`, until P(best) of one reaches `confidence` or
        `budget` values are in; returns the arm most likely the best. Looking often makes luck count: at
        0.99 the right arm came out in about 96 % of simulated runs with arms 5 points of accuracy apart.
        """
        while self._moments[0].sum() < budget:
            arm = self.choose()
            self.update(arm, evaluate(arm))
            if self._moments[0].sum() % 10 == 0 and max(self.probability_best(2000).values()) >= confidence:
                break
        best = self.probability_best()
        return max(best, key=best.get)
