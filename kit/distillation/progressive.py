"""Distillation in a cascade: each student becomes the next one's teacher."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from kit import artifact
from kit.core.protocols import device_of
from kit.core.store import digest, read_json, write_json
from kit.core.weights import materialize
from kit.distillation.students import student_like
from kit.distillation.trainer import DistillationTrainer
from kit.models import parameter_count
from kit.training import TrainConfig


class ProgressiveDistillation:
    """A cascade of ever smaller students (teacher assistants: Mirzadeh et al. 2020).

    sizes: parameters of each student, largest first. One size is the direct jump, two are one
        teacher assistant. make_student: (teacher, size) -> student; by default shaped by
        `config_for_parameters`. settings: of `DistillationTrainer`.
    """

    def __init__(
        self, teacher: nn.Module, sizes: Sequence[int] = (1_000_000, 250_000, 83_000), *,
        make_student: Callable[[nn.Module, int], nn.Module] = student_like, **settings,
    ):  # fmt: skip
        """Raises ValueError when the sizes do not fall, or are not smaller than the teacher."""
        self.teacher, self.sizes, self.make_student = teacher, tuple(sizes), make_student
        self.settings, chain = settings, (parameter_count(teacher), *sizes)
        if not sizes or any(later >= former for former, later in zip(chain, chain[1:])):
            what = f"sizes {list(sizes)} must fall"
            raise ValueError(f"{what}, from below the teacher's {chain[0]:,} parameters")

    def run(
        self, loader, config: TrainConfig, folder: str | Path, validate=None, log=False, hooks=()
    ):
        """Trains every stage, `config.steps` shared evenly; returns (last student, a dict a stage).

        A stage leaves `stage_<i>_<size>.kit` and `.json` in `folder`; a second call takes finished
        stages from there and continues a killed one where it was, with the same result. The dicts
        hold size, parameters, bytes, validation (of the best state), tokens, seconds, path and
        history. Raises ValueError for stages of other settings.
        """
        folder, teacher, records = Path(folder), self.teacher, []
        config = dataclasses.replace(config, steps=max(1, config.steps // len(self.sizes)))
        for i, size in enumerate(self.sizes):
            file = folder / f"stage_{i + 1}_{size}.kit"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                student = self.make_student(teacher, size).to(device_of(teacher))
            settings = {name: repr(value) for name, value in self.settings.items()}
            key, done = digest(teacher, str(student), config, settings), file.with_suffix(".json")
            if not done.exists():
                training = {"config": config, "validate": validate, "log": log, "hooks": hooks}
                record = self._train(teacher, student, loader, file, training)
                write_json(done, record | {"size": size, "key": key})
                file.with_suffix(".ckpt").unlink(missing_ok=True)
            record = read_json(done)
            if record.pop("key", None) != key:
                what = f"{done} was made by another teacher or other settings"
                raise ValueError(f"{what}: choose another folder, or delete it")
            teacher = artifact.load(file, materialize(student)).eval()
            records.append(record)
        return teacher, records

    def _train(self, teacher, student, loader, file: Path, training: dict) -> dict:
        start, checkpoint = time.perf_counter(), file.with_suffix(".ckpt")
        trainer = DistillationTrainer(teacher.eval(), student, **self.settings)
        result = trainer.fit(loader, checkpoint=checkpoint, **training)
        record = {"parameters": parameter_count(student), "bytes": artifact.save(student, file)}
        record |= {"validation": result.best_validation, "tokens": result.tokens}
        seconds = time.perf_counter() - start
        return record | {"seconds": seconds, "path": str(file), "history": result.history}
