"""Training: the one loop, losses, evaluation, checkpoints."""

from kit.training.loop import TrainConfig, TrainResult, learning_rate, steps_in, train

__all__ = ["TrainConfig", "TrainResult", "learning_rate", "steps_in", "train"]
