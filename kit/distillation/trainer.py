"""The distillation objective as a loss for the one training loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from kit.distillation.cache import TeacherCache
from kit.distillation.features import FeatureLoss, capture, feature_pairs
from kit.distillation.fused import Output, SparseTarget, linear_distillation
from kit.distillation.divergences import DIVERGENCES, hard_loss, soft_loss, sparse_divergence
from kit.training.losses import AUXILIARY_WEIGHT, VocabularySample
from kit.training import TrainConfig, TrainResult, train

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Linear:
    """A schedule for `temperature` or `alpha`: from `start` to `end` over the run."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


class DistillationTrainer:
    """loss = alpha * T^2 KL(teacher || student) + (1 - alpha) * cross-entropy + feature_weight * features.

    An instance is a `loss(model, batch)` for `kit.training.train`; `fit` calls that with what belongs to it. Language
    models (`.hidden` and `.output`) take the fused loss, which never holds all logits; any other model is called and
    its logits (..., V) compared. Several teachers: the mean of their probabilities; features come from the first.
    A `TeacherCache` in place of the teacher: batches come from `cache.wrap(loader)`, and there are no features.

    Features are the BK-core's g (`features.BK_FEATURE`, real and imaginary part) of the layers that
    `features.layer_mapping` pairs; `features` names other pairs (student's, teacher's), `()` none. Without such
    layers in both models the term is off. Hooks live for one forward pass.

    temperature and alpha are numbers or schedules of the progress in [0, 1]. `kind` is one of losses.DIVERGENCES,
    `feature_loss` one of losses.FEATURE_LOSSES. A teacher receives no gradients and must be in evaluation mode.
    With a `sample` both models are compared on part of a large vocabulary, at temperature 1.
    `parts` holds the last batch's soft, hard and feature loss.
    """

    def __init__(
        self, teacher: nn.Module | Sequence[nn.Module] | TeacherCache, student: nn.Module,
        temperature: float | Schedule = 2.0, alpha: float | Schedule = 0.7, feature_weight: float = 0.1, *,
        kind: str = "forward", features: Sequence[tuple[str, str]] | None = None, feature_loss: str = "mse",
        sample: VocabularySample | None = None,
    ):  # fmt: skip
        """Raises ValueError for settings outside their range, names that match nothing, unequal vocabularies."""
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        self.teachers = [] if self.cache else [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        self.student, self.temperature, self.alpha, self.kind = student, temperature, alpha, kind
        self.feature_weight, self.sample, self.parts = feature_weight, sample, {}
        self.progress = nn.Parameter(torch.zeros(()), requires_grad=False)  # a parameter, so that checkpoints hold it
        self.fused = all(hasattr(model, "output") and hasattr(model, "hidden") for model in (student, *self.teachers))
        self._check()
        if features is None:
            features = feature_pairs(student, self.teachers[0]) if self.teachers else ()
        self.features = FeatureLoss(features, feature_loss) if features and feature_weight else None
        self._check_names(features)

    def fit(self, loader, config: TrainConfig, **arguments) -> TrainResult:
        """`kit.training.train` of the student with this loss; `arguments` are passed on."""
        self.prepare(loader)
        hooks = (*arguments.pop("hooks", ()), self.step)
        return train(self.student, loader, config, loss=self, hooks=hooks, extra_parameters=self.parameters(),
                     **arguments)  # fmt: skip

    def prepare(self, loader) -> None:
        """Start of a run: schedules at 0, and the features' widths learned from one example of `loader`, so that
        `parameters` is complete."""
        self.progress.zero_()
        if self.features is None or self.features.projections is not None:
            return
        inputs = loader.dataset[0][0][None] if hasattr(loader, "dataset") else next(iter(loader))[0]
        inputs = inputs.to(next(self.student.parameters()).device)
        training = self.student.training
        with torch.no_grad():
            own, other = (self._forward(model.eval(), inputs, side)[1] for side, model in self._sides())
        self.student.train(training)
        self.features.prepare(own, other)

    def parameters(self) -> list[nn.Parameter]:
        """Learned projections and the schedules' position: the `extra_parameters` of the training loop."""
        return [self.progress, *(self.features.parameters() if self.features else ())]

    def step(self, step: int, steps: int, model: nn.Module) -> None:
        """Hook of the training loop: moves the schedules."""
        self.progress.fill_(step / steps)

    def __call__(self, model: nn.Module, batch) -> torch.Tensor:
        inputs, targets = batch[0], batch[-1]
        if any(module.training for teacher in self.teachers for module in teacher.modules()):
            raise ValueError("a teacher is in training mode, where dropout would blur its targets: "
                             "call teacher.eval() first")  # fmt: skip
        output, own = self._forward(model, inputs, 0)
        with torch.no_grad():
            passes = [self._forward(teacher, inputs, None if i else 1) for i, teacher in enumerate(self.teachers)]
        loss = self._logit_loss(output, self._soft(batch, passes), targets)
        if self.features is not None:
            features = self.features(own, passes[0][1])
            self.parts["features"] = features.detach()
            loss = loss + self.feature_weight * features
        if hasattr(model, "auxiliary_loss"):
            loss = loss + AUXILIARY_WEIGHT * model.auxiliary_loss()
        return loss

    def _forward(self, model, inputs, side):
        """The model's `Output` or logits, and the features of that side of the pairs (None: none)."""
        names = [] if self.features is None or side is None else [pair[side] for pair in self.features.pairs]
        with capture(model, names) as features, parametrize.cached():  # a tied table is needed twice
            output = Output(model.hidden(inputs), *model.output()) if self.fused else model(inputs)
        return output, features

    def _soft(self, batch, passes):
        if self.cache is None:
            return [output for output, _ in passes]
        if len(batch) != 4:
            raise ValueError(f"a batch has {len(batch)} parts and no cached targets: train on cache.wrap(loader)")
        return SparseTarget(*batch[1:3])

    def _logit_loss(self, own, soft, targets):
        temperature, alpha = self._now("temperature"), self._now("alpha")
        if self.fused and self.sample is not None:
            own, soft, targets = self._sampled(own, soft, targets)
        if self.fused:
            loss = linear_distillation(own, targets, soft, temperature=temperature, alpha=alpha, kind=self.kind)
            self.parts.update(soft=loss.soft, hard=loss.hard)
            return loss.total
        keep = targets != -100
        hard = hard_loss(own, targets)[keep].mean()
        if isinstance(soft, SparseTarget):
            divergence = temperature**2 * sparse_divergence(F.log_softmax(own / temperature, -1), *soft)
        else:
            _same_classes(own.shape[-1], *(logits.shape[-1] for logits in soft))
            divergence = soft_loss(own, soft, temperature, self.kind)
        divergence = divergence[keep].mean()
        self.parts.update(soft=divergence.detach(), hard=hard.detach())
        return alpha * divergence + (1 - alpha) * hard

    def _sampled(self, own: Output, soft: Sequence[Output], targets: torch.Tensor):
        tokens, log_counts = self.sample.draw(targets, len(own.weight))
        own, *soft = (Output(x.hidden, *self.sample.restrict(x[1:], tokens, log_counts)) for x in (own, *soft))
        return own, soft, torch.where(targets < 0, targets, torch.searchsorted(tokens, targets.contiguous()))

    def _now(self, name: str) -> float:
        value = getattr(self, name)
        return _checked(name, value(self.progress.item())) if callable(value) else value

    def _sides(self):
        return tuple(enumerate((self.student, *self.teachers[:1])))

    def _check(self) -> None:
        _checked("temperature", self._now("temperature")), _checked("alpha", self._now("alpha"))
        if not self.feature_weight >= 0:
            raise ValueError(f"feature_weight is {self.feature_weight}: it must be 0 (off) or positive")
        if self.kind not in DIVERGENCES:
            raise ValueError(f"divergence {self.kind!r} is unknown: choose one of {', '.join(DIVERGENCES)}")
        if not self.teachers and self.cache is None:
            raise ValueError("there is no teacher: give a module, a list of at least one, or a TeacherCache")
        if self.sample and (self.cache or not self.fused or self.temperature != 1):
            raise ValueError(f"a sample of the vocabulary needs language models, no cache, and temperature 1 "
                             f"(it is {self.temperature})")  # fmt: skip
        if self.cache and self.temperature != self.cache.temperature:
            raise ValueError(f"temperature is {self.temperature}, the cached targets were made at "
                             f"{self.cache.temperature}: use that, or build another cache")  # fmt: skip
        if self.fused:
            with torch.no_grad():
                own, *others = (len(model.output()[0]) for model in (self.student, *self.teachers))
            _same_classes(own, *others, *([self.cache.vocabulary] if self.cache else ()))

    def _check_names(self, pairs) -> None:
        for side, model in self._sides():
            with capture(model, [pair[side] for pair in pairs]):
                pass


def _same_classes(own: int, *others: int) -> None:
    for other in others:
        if other != own:
            raise ValueError(f"the student has {own} classes, the teacher {other}: soft targets need the same "
                             f"vocabulary on both sides")  # fmt: skip


def _checked(name: str, value: float) -> float:
    if name == "temperature" and not (0 < value < float("inf")):
        raise ValueError(f"temperature is {value}: it must be positive (1 leaves the distributions as they are)")
    if name == "alpha" and not 0 <= value <= 1:
        raise ValueError(f"alpha is {value}: it must lie in [0, 1] (0: labels only, 1: teacher only)")
    return value
