"""Search for students: what file size buys which perplexity, and the best student for a number of
bytes."""

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
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from torch import nn

from kit import artifact
from kit.core.weights import materialize
from kit.distillation.trainer import DistillationTrainer
from kit.models import ResNetBK, ResNetBKConfig, parameter_count
from kit.quantization import Format, quantize_weights
from kit.training import TrainConfig

RUNGS = (0.25, 0.5)  # fractions of the steps after which hopeless trials stop
RIVALS = 4  # trials no larger than this one that must have passed a rung before it may stop there
REJECTED = "rejected"  # user attribute of a trial that was not trained: too large, or done before
WIDTHS = range(8, 130, 2)
GROWTH = 1.02  # of a file in training, over `expected_bytes`; seen: up to 1.01


def resnet_bk_space(vocab_size: int, budget: int, bits: tuple = (8, 4, 3, 2)) -> Callable:
    """A search space of ResNetBK students, tied, under fake quantization: layers, experts, rank,
    bits and `fill`, the share of the budget that the file fills by the width that follows."""

    def build(trial: optuna.Trial) -> nn.Module:
        layers = trial.suggest_int("layers", 1, 4)
        experts = trial.suggest_categorical("experts", [1, 2, 4])
        share = trial.suggest_categorical("rank", [1.0, 0.5, 0.25])
        format = Format(trial.suggest_categorical("bits", list(bits)))
        target = trial.suggest_categorical("fill", [1.0, 0.75, 0.5]) * budget / GROWTH

        def student(width: int) -> nn.Module:
            rank = None if share == 1 else max(1, round(share * width))
            shape = layers, experts, 2 * width, max(4, 3 * width // 4)
            config = ResNetBKConfig(vocab_size, width, *shape, tied=True, embedding_rank=rank)
            return quantize_weights(ResNetBK(config), format)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fitting = bisect_right(WIDTHS, target, key=lambda width: expected_bytes(student(width)))
        return student(WIDTHS[max(0, fitting - 1)])

    return build


@torch.no_grad()
def expected_bytes(model: nn.Module) -> int:
    """Bytes of the file that an untrained model will have when it is trained: as saved now, with
    random numbers for the constants that its biases and norms start from, which would cost
    nothing."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            wave = torch.linspace(-1, 1, parameter.numel()).sin()
            parameter.copy_(wave.view_as(parameter))
    return artifact.nbytes(model)


class StudentSearch:
    """Two objectives, bytes of the file and validation perplexity, by Optuna's multi-objective TPE.

    Trials live in `folder/journal.log`, which any number of processes (and later calls) may share,
    and their students in `folder/trial_<n>.kit`. Optuna prunes only single objectives; here a trial
    stops at a rung when at least half of the trials that are no larger, and had as many steps, are
    better there. With a `budget`, students whose `expected_bytes` exceed it are rejected untrained,
    and so are proposals made before. A `TeacherCache` as the teacher serves all trials from one
    pass. With few trials, `descend` first: the sampler has no model of the space before some
    dozens.

    space(trial) builds an untrained student, with any masks and quantizers; validate(model) is a
    loss in nats; config is the training of one trial; settings are those of `DistillationTrainer`.
    """

    def __init__(
        self,
        teacher,
        loader,
        validate: Callable[[nn.Module], float],
        config: TrainConfig,
        folder: str | Path,
        space: Callable[[optuna.Trial], nn.Module],
        *,
        budget: int | None = None,
        **settings,
    ):
        self.teacher, self.loader, self.validate, self.config = teacher, loader, validate, config
        self.folder, self.space, self.settings = Path(folder), space, settings
        self.budget = math.inf if budget is None else budget
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = JournalStorage(JournalFileBackend(str(self.folder / "journal.log")))
        shared = {"storage": journal, "study_name": "students", "load_if_exists": True}
        self.study = optuna.create_study(**shared, directions=["minimize", "minimize"])

    def run(self, trials: int) -> pd.DataFrame:
        """Trains until `trials` students of all processes are done or stopped early; returns
        `table()`.

        Raises ValueError when nearly everything the space gives is over the budget, or was given
        before.
        """
        while (trained := len(self._trained())) < trials:
            number = len(self._trials())
            if number > 20 * (trials + 1):
                what = f"{number - trained} of {number} students were over the budget"
                what = f"{what} of {self.budget:,} bytes, or alike"
                raise ValueError(f"{what}: raise it, or change the search space")
            seed = 1000 * self.config.seed + number
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=6)
            self.study.optimize(self._objective, n_trials=1)
        return self.table()

    def descend(self, start: dict, changes: Sequence[dict], trials: int) -> pd.DataFrame:
        """Coordinate descent: from the settings `start` on, the best student so far within the
        budget with the first of `changes` that was not tried on it, until none is left or `trials`
        students are done; returns `table()`."""
        settings, tried = start, []
        while settings is not None and len(self._trained()) < trials:
            tried.append(settings)
            self.study.enqueue_trial(settings)
            self.study.optimize(self._objective, n_trials=1)
            best = self._trials()[self._fitting(self.budget)["trial"]].params
            further = [best | change for change in changes if best | change not in tried]
            settings = further[0] if further else None
        return self.table()

    def table(self) -> pd.DataFrame:
        """One row a trained trial: trial, state, bytes, perplexity, parameters, steps, on_front,
        and its settings."""
        front = {trial.number for trial in self.study.best_trials}
        rows = []
        for trial in self._trained():
            found = trial.user_attrs
            nbytes, perplexity = trial.values or (found["expected_bytes"], math.nan)
            row = {"trial": trial.number, "state": trial.state.name.lower(), "bytes": int(nbytes)}
            row |= {"perplexity": perplexity} | {key: found[key] for key in ("parameters", "steps")}
            rows.append(row | {"on_front": trial.number in front} | trial.params)
        return pd.DataFrame(rows)

    def front(self) -> pd.DataFrame:
        """The Pareto front, smallest first."""
        table = self.table()
        if not len(table):
            return table
        return table[table["on_front"]].sort_values("bytes").reset_index(drop=True)

    def best(self, budget: int) -> tuple[nn.Module, pd.Series]:
        """The student of lowest validation perplexity within `budget` bytes, from its file, and
        its row. Raises ValueError when none is small enough."""
        row = self._fitting(budget)
        trial = self._trials()[row["trial"]]
        fresh = materialize(self.space(FixedTrial(trial.params)))
        return artifact.load(self._file(trial.number), fresh), row

    def _fitting(self, budget: float) -> pd.Series:
        """The row of lowest perplexity within `budget` bytes."""
        front = self.front()
        fitting = front[front["bytes"] <= budget] if len(front) else front
        if not len(fitting):
            smallest = (
                f"the smallest has {front['bytes'].min():,}" if len(front) else "none is done"
            )
            what = f"no student fits {budget:,} bytes ({smallest})"
            raise ValueError(f"{what}: search longer, or raise the budget")
        return fitting.iloc[-1]

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _trained(self) -> list[FrozenTrial]:
        done = self._trials(TrialState.COMPLETE, TrialState.PRUNED)
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
        if seen or nbytes > self.budget:
            trial.set_user_attr(REJECTED, True)
            raise optuna.TrialPruned

        def stop_if_hopeless(step: int, steps: int, model: nn.Module) -> None:
            for rung in RUNGS:
                if step == max(1, round(rung * steps)) and step < steps:
                    trial.set_user_attr("steps", step)
                    self._judge(trial, f"loss_at_{rung}", self.validate(model))

        trainer = DistillationTrainer(self.teacher, student, **self.settings)
        trainer.fit(self.loader, self.config, hooks=[stop_if_hopeless], log=False)
        trial.set_user_attr("steps", self.config.steps)
        return artifact.save(student, self._file(trial.number)), math.exp(self.validate(student))

    def _judge(self, trial: optuna.Trial, rung: str, loss: float) -> None:
        """Ends a trial that at least half of its rivals at this rung are ahead of."""
        trial.set_user_attr(rung, loss)
        limit = trial.user_attrs["expected_bytes"]
        others = [t.user_attrs for t in self._trials() if t.number != trial.number]
        rivals = [o[rung] for o in others if rung in o and o["expected_bytes"] <= limit]
        if len(rivals) >= RIVALS and 2 * sum(rival < loss for rival in rivals) >= len(rivals):
            raise optuna.TrialPruned
