"""Pruning: weights, channels, neurons and experts, as masks or as a new, smaller dense model."""

from kit.core.calibration import input_norms
from kit.core.weights import copy_model
from kit.pruning.criteria import register_criterion
from kit.pruning.experts import (
    ProgressivePruningScheduler,
    PrunedMoELayer,
    expert_scores,
    prune_unused_experts,
    reduce_experts,
    track_experts,
)
from kit.pruning.layers import prune_layers
from kit.pruning.magnitude import MagnitudePruner, rewind
from kit.pruning.mask import Mask, get_mask, set_mask
from kit.pruning.sparsegpt import prune_sparsegpt, sparsegpt
from kit.pruning.structured import prune_bk_channels, prune_channels, prune_hidden_units

__all__ = [
    "MagnitudePruner", "Mask", "ProgressivePruningScheduler", "PrunedMoELayer", "copy_model",
    "expert_scores", "get_mask", "input_norms", "prune_bk_channels", "prune_channels",
    "prune_hidden_units", "prune_layers", "prune_sparsegpt", "prune_unused_experts",
    "reduce_experts", "register_criterion", "rewind", "set_mask", "sparsegpt", "track_experts",
]  # fmt: skip
