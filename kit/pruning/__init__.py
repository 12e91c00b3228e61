"""Pruning: weights, channels, neurons and experts, in place as masks or as a new, smaller dense model."""

from kit.core.calibration import input_norms
from kit.pruning.experts import (PrunedMoELayer, expert_scores, prune_unused_experts, reduce_experts,
                                 track_experts)
from kit.pruning.magnitude import MagnitudePruner, rewind
from kit.pruning.mask import Mask, copy_model, get_mask, remove_masks, set_mask
from kit.pruning.progressive import ProgressivePruningScheduler
from kit.pruning.sparsegpt import prune_sparsegpt, sparsegpt
from kit.pruning.structured import prune_bk_channels, prune_channels, prune_hidden_units

__all__ = ["MagnitudePruner", "Mask", "ProgressivePruningScheduler", "PrunedMoELayer", "copy_model",
           "expert_scores", "get_mask", "input_norms", "prune_bk_channels", "prune_channels",
           "prune_hidden_units",
           "prune_sparsegpt", "prune_unused_experts", "reduce_experts", "remove_masks", "rewind",
           "set_mask", "sparsegpt", "track_experts"]
