"""Distillation in a cascade: each student becomes the next one's teacher."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from kit.distillation.students import student_like
from kit.distillation.trainer import DistillationTrainer
from kit.models import parameter_count
from kit.core.weights import bake
from kit.core.store import write_json
from kit.training import TrainConfig


class ProgressiveDistillation:
    """A cascade of ever smaller students (teacher assistants: Mirzadeh et al. 2020).

    sizes: parameters of each student, largest first. One size is the direct jump, two are one teacher assistant.
    make_student(teacher, size): builds a student; by default a ResNetBK shaped by `config_for_parameters`.
    settings: of `DistillationTrainer` (temperature, alpha, feature_weight, ...).
    """

    def __init__(
        self, teacher: nn.Module, sizes: Sequence[int] = (1_000_000, 250_000, 83_000), *,
        make_student: Callable[[nn.Module, int], nn.Module] = student_like, **settings,
    ):  # fmt: skip
        """Raises ValueError when the sizes do not fall, or are not smaller than the teacher."""
        self.teacher, self.sizes, self.make_student, self.settings = teacher, tuple(sizes), make_student, settings
        chain = (parameter_count(teacher), *self.sizes)
        if not sizes or any(later >= former for former, later in zip(chain, chain[1:], strict=False)):
            raise ValueError(f"sizes {list(sizes)} must fall, from below the teacher's {chain[0]:,} parameters")

    def run(self, loader, config: TrainConfig, folder: str | Path, validate=None, log: bool = False, hooks=()):
        """Train every stage, `config.steps` in all, shared evenly; returns (last student, a dict for each stage).

        A stage leaves `stage_<i>_<size>.kit` and `.json` in `folder`; a second call takes finished stages from
        there and continues a killed one where it was, with the same result. The dicts hold size, parameters, bytes,
        validation (of the best state), tokens, seconds and path. Raises ValueError when the folder holds stages of
        another teacher or other settings.
        """
        from kit import artifact  # here, because kit.artifact imports kit.pruning, which imports this package

        folder, teacher, records = Path(folder), self.teacher, []
        folder.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(config, steps=max(1, config.steps // len(self.sizes)))
        for i, size in enumerate(self.sizes):
            name = folder / f"stage_{i + 1}_{size}"
            student = self._new_student(teacher, size, config.seed)
            settings = self._fingerprint(teacher, student, config)
            if not name.with_suffix(".json").exists():
                self._train(teacher, student, loader, config, name, settings, validate, log, hooks)
            record = json.loads(name.with_suffix(".json").read_text())
            if record.pop("settings") != settings:
                raise ValueError(f"{name}.json was made by another teacher or other settings: "
                                 f"choose another folder, or delete it")  # fmt: skip
            teacher = artifact.load(name.with_suffix(".kit"), bake(student)).eval()
            records.append(record)
        return teacher, records

    def _new_student(self, teacher, size, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_student(teacher, size).to(next(teacher.parameters()).device)

    def _fingerprint(self, teacher, student, config) -> dict:
        """Compared as text, so that anything with a repr may be a setting."""
        checksum = sum(p.detach().double().abs().sum().item() for p in teacher.parameters())
        shapes = {name: list(p.shape) for name, p in student.named_parameters()}
        return {"teacher": checksum, "student": shapes, "training": dataclasses.asdict(config),
                "distillation": {key: repr(value) for key, value in sorted(self.settings.items())}}  # fmt: skip

    def _train(self, teacher, student, loader, config, name, settings, validate, log, hooks) -> None:
        from kit import artifact

        start, checkpoint = time.perf_counter(), name.with_suffix(".ckpt")
        result = DistillationTrainer(teacher.eval(), student, **self.settings).fit(
            loader, config, validate=validate, checkpoint=checkpoint, log=log, hooks=hooks)  # fmt: skip
        path = name.with_suffix(".kit")
        nbytes = artifact.save(student, path)
        write_json(name.with_suffix(".json"), {
            "size": int(name.name.split("_")[-1]), "parameters": parameter_count(student), "bytes": nbytes,
            "validation": result.best_validation, "tokens": result.tokens, "seconds": time.perf_counter() - start,
            "path": str(path), "history": result.history, "settings": settings,
        })  # fmt: skip
        checkpoint.unlink(missing_ok=True)
