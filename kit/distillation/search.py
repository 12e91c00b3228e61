"""Search for students: what file size buys which perplexity, and the best student for a number of bytes."""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pandas as pd
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from torch import nn

from kit import artifact
from kit.distillation.trainer import DistillationTrainer
from kit.models import ResNetBK, ResNetBKConfig, parameter_count
from kit.core.weights import bake
from kit.quantization import Format, quantize_weights
from kit.training import TrainConfig

RUNGS = (0.25, 0.5)  # fractions of the steps after which hopeless trials stop
RIVALS = 4  # trials no larger than this one that must have passed a rung before it may stop there
REJECTED = "rejected"  # user attribute of a trial that was not trained: too large, or done before
WIDTHS = range(8, 130, 2)
GROWTH = 1.02  # of a file in training, over `expected_bytes`; seen: up to 1.01


def resnet_bk_space(vocab_size: int, budget: int, bits: tuple = (8, 4, 3, 2)) -> Callable[[optuna.Trial], nn.Module]:
    """A search space of ResNetBK students, tied, under fake quantization: depth, experts, rank, bits and bytes.

    The width follows: the largest whose file has the share `fill` of the budget, so that none is wasted.
    """

    def build(trial: optuna.Trial) -> nn.Module:
        layers, experts = trial.suggest_int("layers", 1, 4), trial.suggest_categorical("experts", [1, 2, 4])
        rank, format = trial.suggest_categorical("rank", [1.0, 0.5, 0.25]), trial.suggest_categorical("bits", list(bits))
        target = trial.suggest_categorical("fill", [1.0, 0.75, 0.5]) * budget / GROWTH

        def student(width: int) -> nn.Module:
            config = ResNetBKConfig(vocab_size, width, layers, experts, 2 * width, max(4, 3 * width // 4), tied=True,
                                    embedding_rank=None if rank == 1 else max(1, round(rank * width)))  # fmt: skip
            return quantize_weights(ResNetBK(config), Format(format))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fitting = bisect_right(WIDTHS, target, key=lambda width: expected_bytes(student(width)))
        return student(WIDTHS[max(0, fitting - 1)])

    return build


@torch.no_grad()
def expected_bytes(model: nn.Module) -> int:
    """Bytes of the file that an untrained model will have when it is trained: as saved now, with random numbers for
    the constants that its biases and norms start from, which would cost nothing."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter))
    return artifact.nbytes(model)


class StudentSearch:
    """Two objectives, bytes of the artifact and validation perplexity, by Optuna's multi-objective TPE.

    Trials live in `folder/journal.log`, which any number of processes (and later calls) may share, and their
    students in `folder/trial_<n>.kit`. Optuna prunes only single objectives; here a trial stops at a rung when at
    least half of the trials that are no larger, and had as many steps, are better there: such a trial cannot be on
    the Pareto front unless learning curves cross. With a `budget`, students whose `expected_bytes` exceed it are
    rejected before training, at no cost, and so are proposals made before. A `TeacherCache` as the teacher serves all
    trials from one pass. With few trials, `descend` first: the sampler has no model of the space before some dozens.

    space(trial) builds an untrained student, with any masks and quantizers; validate(model) is a loss in nats;
    config is the training of one trial; settings are those of `DistillationTrainer`.
    """

    def __init__(
        self, teacher, loader, validate: Callable[[nn.Module], float], config: TrainConfig, folder: str | Path,
        space: Callable[[optuna.Trial], nn.Module], *, budget: int | None = None, **settings,
    ):  # fmt: skip
        self.teacher, self.loader, self.validate, self.config = teacher, loader, validate, config
        self.folder, self.space, self.budget, self.settings = Path(folder), space, budget, settings
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(self.folder / "journal.log")))
        self.study = optuna.create_study(storage=storage, study_name="students", load_if_exists=True,
                                         directions=["minimize", "minimize"])  # fmt: skip

    def run(self, trials: int) -> pd.DataFrame:
        """Train until `trials` students of all processes are done or stopped early; returns `table()`.

        Raises ValueError when nearly everything the space gives is over the budget, or was given before.
        """
        while len(self._trained()) < trials:
            number = len(self.study.get_trials(deepcopy=False))
            if number > 20 * (trials + 1):
                raise ValueError(f"{number - len(self._trained())} of {number} students were over the budget of "
                                 f"{self.budget:,} bytes, or alike: raise it, or change the search space")  # fmt: skip
            self.study.sampler = optuna.samplers.TPESampler(seed=1000 * self.config.seed + number, n_startup_trials=6)
            self.study.optimize(self._objective, n_trials=1)
        return self.table()

    def descend(self, start: dict, changes: Sequence[dict], trials: int) -> pd.DataFrame:
        """Coordinate descent within the `budget`: from the settings `start` on, the best student so far with the first of
        `changes` that was not tried on it, until none is left or `trials` students are done; returns `table()`."""
        settings, tried = start, []
        while settings is not None and len(self._trained()) < trials:
            tried.append(settings)
            self.study.enqueue_trial(settings)
            self.study.optimize(self._objective, n_trials=1)
            best = self._fitting(self.budget or math.inf)[0].params
            settings = next((best | change for change in changes if best | change not in tried), None)
        return self.table()

    def table(self) -> pd.DataFrame:
        """One row a trained trial: trial, state, bytes, perplexity, parameters, steps, on_front, and its settings."""
        front = {trial.number for trial in self.study.best_trials}
        rows = []
        for trial in self._trained():
            nbytes, perplexity = trial.values or (trial.user_attrs["expected_bytes"], math.nan)
            rows.append({"trial": trial.number, "state": trial.state.name.lower(), "bytes": int(nbytes),
                         "perplexity": perplexity, "parameters": trial.user_attrs["parameters"],
                         "steps": trial.user_attrs["steps"], "on_front": trial.number in front, **trial.params})  # fmt: skip
        return pd.DataFrame(rows)

    def front(self) -> pd.DataFrame:
        """The Pareto front, smallest first."""
        table = self.table()
        return table[table["on_front"]].sort_values("bytes").reset_index(drop=True) if len(table) else table

    def best(self, budget: int) -> tuple[nn.Module, pd.Series]:
        """The student of lowest validation perplexity within `budget` bytes, loaded from its file, and its row.

        Students that are not kit models are loaded into what `space` builds for their settings.
        Raises ValueError when none is small enough.
        """
        trial, row = self._fitting(budget)
        fresh = bake(self.space(optuna.trial.FixedTrial(trial.params)))
        return artifact.load(self._file(trial.number), fresh), row

    def _fitting(self, budget: float) -> tuple[optuna.trial.FrozenTrial, pd.Series]:
        """The trial of lowest perplexity within `budget` bytes, and its row."""
        front = self.front()
        fitting = front[front["bytes"] <= budget] if len(front) else front
        if not len(fitting):
            smallest = f"the smallest has {front['bytes'].min():,}" if len(front) else "none is finished"
            raise ValueError(f"no student fits {budget:,} bytes ({smallest}): search longer, or raise the budget")
        row = fitting.iloc[-1]
        return self.study.get_trials(deepcopy=False)[row["trial"]], row

    def _trained(self) -> list[optuna.trial.FrozenTrial]:
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return [trial for trial in done if REJECTED not in trial.user_attrs]

    def _file(self, number: int) -> Path:
        return self.folder / f"trial_{number}.kit"

    def _objective(self, trial: optuna.Trial) -> tuple[int, float]:
        torch.manual_seed(self.config.seed)
        student = self.space(trial)
        nbytes = expected_bytes(student)
        trial.set_user_attr("expected_bytes", nbytes)
        trial.set_user_attr("parameters", parameter_count(student))
        seen = any(other.params == trial.params for other in self._trained())
        if seen or (self.budget and nbytes > self.budget):
            trial.set_user_attr(REJECTED, True)
            raise optuna.TrialPruned
        trainer = DistillationTrainer(self.teacher, student, **self.settings)
        trainer.fit(self.loader, self.config, hooks=[_Stopper(self, trial, nbytes)], log=False)
        trial.set_user_attr("steps", self.config.steps)
        return artifact.save(student, self._file(trial.number)), math.exp(self.validate(student))


class _Stopper:
    """Hook of the training loop: at each rung records the validation loss and ends a hopeless trial."""

    def __init__(self, search: StudentSearch, trial: optuna.Trial, nbytes: int):
        self.search, self.trial, self.nbytes = search, trial, nbytes

    def __call__(self, step: int, steps: int, model: nn.Module) -> None:
        for rung in RUNGS:
            if step == max(1, round(rung * steps)) and step < steps:
                self._judge(f"loss_at_{rung}", step, self.search.validate(model))

    def _judge(self, name: str, step: int, loss: float) -> None:
        self.trial.set_user_attr(name, loss)
        self.trial.set_user_attr("steps", step)
        rivals = [other.user_attrs[name] for other in self.search.study.get_trials(deepcopy=False)
                  if name in other.user_attrs and other.number != self.trial.number
                  and other.user_attrs["expected_bytes"] <= self.nbytes]  # fmt: skip
        if len(rivals) >= RIVALS and 2 * sum(rival < loss for rival in rivals) >= len(rivals):
            raise optuna.TrialPruned

