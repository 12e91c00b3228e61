"""Bytes as a budget: sensitivity, allocation, training under a rate."""

from kit.budget.allocation import allocate
from kit.budget.rate import RateLoss, RateSettings, row_sensitivity, set_rate_formats
from kit.budget.rounding import RoundingSettings, SampledLoss, round_to_budget
from kit.budget.sensitivity import plan_for_budget, scan, sparsities_for_budget

__all__ = [
    "RateLoss", "RateSettings", "RoundingSettings", "SampledLoss", "allocate",
    "plan_for_budget", "round_to_budget", "row_sensitivity", "scan",
    "set_rate_formats", "sparsities_for_budget",
]  # fmt: skip
