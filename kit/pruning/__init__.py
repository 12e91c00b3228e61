"""Pruning: weights, channels, neurons and experts, in place as masks or as a new, smaller dense model."""

from kit.pruning.calibration import input_norms
from kit.pruning.magnitude import MagnitudePruner, rewind
from kit.pruning.mask import Mask, get_mask, remove_masks, set_mask
from kit.pruning.sparsegpt import prune_sparsegpt, sparsegpt

__all__ = ["MagnitudePruner", "Mask", "get_mask", "input_norms", "prune_sparsegpt", "remove_masks", "rewind",
           "set_mask", "sparsegpt"]
