"""Fewer and fewer experts, with training between, so that each step is small enough to recover from."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kit.training.checkpoint import copy_into, read_checkpoint, write_checkpoint
from kit.distillation import DistillationTrainer
from kit.training.losses import next_token_loss
from kit.pruning.experts import PrunedMoELayer, check_reduction, keep_experts, reduce_in_place, track_experts
from kit.pruning.mask import copy_model
from kit.pruning.shapes import modules_of, refresh_config, resizing
from kit.training import TrainConfig, train


class ProgressivePruningScheduler:
    """Takes a model's experts down in stages, 8 -> 4 -> 2 (-> 1), retraining after each.

    Args:
        model: its mixtures of experts become PrunedMoELayers; it is changed in place.
        stages: experts a layer after each stage, falling.
        batches: what the experts are judged on: a few (inputs, targets) of the training split.
        criterion: "usage", "reap", "random" or "merge" (`kit.pruning.reduce_experts`).
        distill: retrain towards the unpruned model's predictions as well
            (`kit.distillation.DistillationTrainer` with its defaults), not on `loss` alone.
        loss: loss(model, batch) when not distilling.
        seed: of the random criterion.

    Raises:
        ValueError: stages that do not fall or end below top_k, an unknown criterion, no experts. The model is
            untouched then.
    """

    def __init__(self, model: nn.Module, stages: Sequence[int] = (4, 2), *, batches: Sequence,
                 criterion: str = "usage", distill: bool = True, loss: Callable = next_token_loss,
                 seed: int = 0) -> None:
        self.stages = tuple(stages)
        if not self.stages or any(a <= b for a, b in zip(self.stages, self.stages[1:])):
            raise ValueError(f"stages {self.stages} must fall, such as (4, 2)")
        check_reduction(model, self.stages[-1], criterion)
        self.teacher = copy_model(model).eval().requires_grad_(False) if distill else None
        self.model = track_experts(model)
        self.batches, self.criterion, self.loss, self.seed = list(batches), criterion, loss, seed

    @property
    def layers(self) -> dict[str, PrunedMoELayer]:
        return modules_of(self.model, PrunedMoELayer, "*")

    @property
    def history(self) -> pd.DataFrame:
        """One row an expert and pruning: stage, layer, expert (original position), share of tokens, kept."""
        rows = [{"stage": stage, "layer": name, "expert": expert, "share": share,
                 "kept": expert in entry["kept"]}
                for name, layer in self.layers.items() for stage, entry in enumerate(layer.history)
                for expert, share in zip(entry["origin"], entry["share"])]
        return pd.DataFrame(rows)

    def run(self, loader, config: TrainConfig, *, validate: Callable[[nn.Module], float] | None = None,
            folder: Path | None = None, log: bool = True) -> nn.Module:
        """All stages, each a pruning and `config.steps` steps of training; returns the model.

        With a `folder`, each finished stage is kept there and training is checkpointed: called again after a
        kill, with a new scheduler over the same unpruned model, it goes on and ends with the same numbers.

        Raises:
            ValueError: the folder holds stages of other settings.
        """
        folder = None if folder is None else Path(folder)
        for stage, count in enumerate(self.stages):
            done = folder / f"stage{stage}.safetensors" if folder else None
            if done and done.exists():
                self._restore(done, stage)
                continue
            reduce_in_place(self.model, count, self.batches, self.criterion, seed=self.seed)
            checkpoint = folder / f"training{stage}.safetensors" if folder else None
            self._retrain(loader, dataclasses.replace(config, seed=config.seed + stage), validate=validate,
                          checkpoint=checkpoint, log=log)
            if done:
                write_checkpoint(done, self._tensors(), self._header(stage))
                checkpoint.unlink(missing_ok=True)
        return self.model

    def _retrain(self, loader, config: TrainConfig, **arguments) -> None:
        if self.teacher is None:
            train(self.model, loader, config, loss=self.loss, **arguments)
        else:
            DistillationTrainer(self.teacher, self.model).fit(loader, config, **arguments)

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _header(self, stage: int) -> dict:
        settings = {"stages": list(self.stages[:stage + 1]), "criterion": self.criterion, "seed": self.seed,
                    "distill": self.teacher is not None}
        return {"settings": settings, "history": {name: layer.history for name, layer in self.layers.items()}}

    def _restore(self, path: Path, stage: int) -> None:
        tensors, header = read_checkpoint(path)
        settings = self._header(stage)["settings"]
        if header["settings"] != settings:
            raise ValueError(f"{path} was written with {header['settings']}, not {settings}: "
                             "use another folder")
        with resizing(self.model):
            for name, layer in self.layers.items():
                layer.history = header["history"][name]
                layer.origin = layer.history[-1]["kept"] if layer.history else layer.origin
                keep_experts(layer, torch.arange(len(layer.origin), device=layer.usage.device))
        refresh_config(self.model)
        copy_into(self._tensors(), tensors, str(path))
