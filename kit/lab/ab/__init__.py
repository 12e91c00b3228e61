"""A/B tests between compressed candidates: who gets which model, is a difference real, which arm is best
soonest.

Values are one number per unit (a request, a window of text, an image): a loss, a squared error, a
correct/wrong.
"""

from kit.lab.ab.assignment import Log, assign
from kit.lab.ab.comparison import (
    Comparison,
    NonInferiority,
    bootstrap_interval,
    cohens_d,
    compare,
    non_inferiority,
)
from kit.lab.ab.plots import plot_comparisons, plot_sampler
from kit.lab.ab.thompson import ThompsonSampler

__all__ = [
    "Comparison",
    "Log",
    "NonInferiority",
    "ThompsonSampler",
    "assign",
    "bootstrap_interval",
    "cohens_d",
    "compare",
    "non_inferiority",
    "plot_comparisons",
    "plot_sampler",
]
