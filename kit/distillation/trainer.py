"""The distillation objective as a loss for the one training loop."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kit.core.protocols import Call, LanguageModel, adapt, call_of, device_of, evaluating
from kit.core.settings import NotNegative, Positive, Share, checked, settings
from kit.distillation.cache import TeacherCache, check_evaluating
from kit.distillation.divergences import divergence_of
from kit.distillation.features import FeatureLoss, capture, feature_pairs
from kit.distillation.objective import Output, check_classes, linear_distillation, output_of
from kit.training import TrainConfig, TrainResult, train
from kit.training.losses import AUXILIARY_WEIGHT, VocabularySample, labelled

Schedule = Callable[[float], float]


@settings
class LinearSchedule:
    """A schedule for `temperature` or `alpha`: from `start` to `end` over the run."""

    start: NotNegative
    end: NotNegative

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


class DistillationTrainer:
    """alpha * T^2 KL(teacher || student) + (1 - alpha) * cross-entropy + feature_weight * features.

    An instance is a `loss(model, batch)` for `kit.training.train`; `fit` calls that with what
    belongs to it. A `LanguageModel`'s logits are never all in memory; those of any other model
    (..., V) are compared as it returns them. A teacher must be in evaluation mode; of several, the
    mean of the probabilities counts, and the features of the first. With a `TeacherCache` instead,
    batches come from `cache.wrap(loader)`, and there are no features.

    temperature, alpha: numbers, or schedules of the progress in [0, 1].
    kind, feature_loss: names in `divergences.DIVERGENCES` and `FEATURE_LOSSES`.
    features: pairs of submodule names (student's, teacher's); by default the BK-core's reflection
        coefficients of the layers that `features.layer_mapping` pairs.
    sample: compares language models on part of a large vocabulary, at temperature 1.

    `parts` holds the last batch's soft, hard and feature loss.
    """

    def __init__(
        self, teacher: nn.Module | Sequence[nn.Module] | TeacherCache, student: nn.Module,
        temperature: float | Schedule = 2.0, alpha: float | Schedule = 0.7,
        feature_weight: float = 0.1, *, kind: str = "forward",
        features: Sequence[tuple[str, str]] | None = None, feature_loss: str = "mse",
        sample: VocabularySample | None = None,
    ):  # fmt: skip
        """Raises ValueError for settings out of range, unknown names, unequal vocabularies."""
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        several = [] if self.cache else teacher if isinstance(teacher, Sequence) else [teacher]
        self.teachers, student = [adapt(model) for model in several], adapt(student)
        self.student, self.temperature, self.alpha, self.kind = student, temperature, alpha, kind
        self.feature_weight, self.sample, self.parts = feature_weight, sample, {}
        # A parameter, so that checkpoints hold it.
        self.progress = nn.Parameter(torch.zeros(()), requires_grad=False)
        self._check()
        if features is None:
            features = feature_pairs(student, self.teachers[0]) if self.teachers else ()
        self.features = FeatureLoss(features, feature_loss) if features and feature_weight else None
        for side, model in enumerate((student, *self.teachers[:1])):
            with capture(model, [pair[side] for pair in features]):
                pass

    def fit(self, loader, config: TrainConfig, **arguments) -> TrainResult:
        """`kit.training.train` of the student with this loss; `arguments` are passed on."""
        self.prepare(loader)
        arguments["hooks"] = (*arguments.get("hooks", ()), self.step)
        extra = self.parameters()
        return train(self.student, loader, config, loss=self, extra_parameters=extra, **arguments)

    def prepare(self, loader) -> None:
        """Start of a run: schedules at 0, features' widths from one batch."""
        self.progress.zero_()
        if self.features is None or self.features.projections is not None:
            return
        call = call_of(next(iter(loader)), self.student).to(device_of(self.student))
        with evaluating(self.student, self.teachers[0]):
            (_, own), (_, taught) = self._passes(self.student, call)[:2]
        self.features.prepare(own, taught)

    def parameters(self) -> list[nn.Parameter]:
        """Learned projections and the schedules' position: the training's `extra_parameters`."""
        return [self.progress, *(self.features.parameters() if self.features else ())]

    def step(self, step: int, steps: int, model: nn.Module) -> None:
        """Hook of the training loop: moves the schedules."""
        self.progress.fill_(step / steps)

    def __call__(self, model: nn.Module, batch) -> Tensor:
        call = labelled(batch, model := adapt(model))
        check_evaluating(self.teachers)
        (output, own), *taught = self._passes(model, call)
        loss = self._logit_loss(output, call, [output for output, _ in taught])
        if self.features is not None:
            features = self.features(own, taught[0][1])
            self.parts["features"] = features.detach()
            loss = loss + self.feature_weight * features
        if isinstance(model, LanguageModel):
            loss = loss + AUXILIARY_WEIGHT * model.auxiliary_loss()
        return loss

    def _passes(self, student: nn.Module, call: Call) -> list[tuple[Output, dict[str, Tensor]]]:
        """Outputs of student and teachers, each with its features: of the student and the first."""
        names = list(zip(*self.features.pairs)) if self.features else []
        names += [()] * (1 + len(self.teachers) - len(names))
        passes = []
        for model, wanted in zip((student, *self.teachers), names):
            grad = torch.is_grad_enabled() and not passes  # for the student alone
            with torch.set_grad_enabled(grad), capture(model, wanted) as features:
                with parametrize.cached():  # a tied table is needed twice
                    passes.append((output_of(model, call), features))
        return passes

    def _logit_loss(self, own: Output, call: Call, soft) -> Tensor:
        targets = call.targets
        if self.cache is not None:
            soft = getattr(call, "soft", None)
            if soft is None:
                raise ValueError("a batch has no cached targets: train on cache.wrap(loader)")
        if self.sample is not None:
            layers = [output[1:] for output in (own, *soft)]
            targets, *layers = self.sample.restrict(targets, *layers)
            own, *soft = (Output(x.hidden, *cut) for x, cut in zip((own, *soft), layers))
        settings = {"temperature": self._now("temperature"), "alpha": self._now("alpha")}
        loss = linear_distillation(own, targets, soft, kind=self.kind, **settings)
        self.parts.update(soft=loss.soft, hard=loss.hard)
        return loss.total

    def _now(self, name: str) -> float:
        value = getattr(self, name)
        value = value(self.progress.item()) if callable(value) else value
        return checked(name, value, Positive if name == "temperature" else Share)

    def _check(self) -> None:
        temperature, models = self._now("temperature"), (self.student, *self.teachers)
        language = [model for model in models if isinstance(model, LanguageModel)]
        self._now("alpha")
        divergence_of(self.kind)
        checked("feature_weight", self.feature_weight, NotNegative)
        if not self.teachers and self.cache is None:
            raise ValueError("there is no teacher: give a module, some in a list, or a cache")
        if self.sample and (self.cache or len(language) < len(models) or self.temperature != 1):
            what = f"language models, no cache, and temperature 1 (it is {self.temperature})"
            raise ValueError(f"a sample of the vocabulary needs {what}")
        if self.cache and self.temperature != self.cache.temperature:
            made = f"the cached targets were made at {self.cache.temperature}"
            raise ValueError(f"temperature is {temperature}, {made}: use that, or build another")
        if isinstance(self.student, LanguageModel):
            with torch.no_grad():
                classes = [len(model.output()[0]) for model in language]
            check_classes(*classes, *([self.cache.vocabulary] if self.cache else ()))
