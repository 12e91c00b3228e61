"""The distillation objective as a loss for the one training loop."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from kit.distillation.features import FeatureLoss, capture, feature_pairs
from kit.distillation.fused import Output, linear_distillation
from kit.distillation.losses import DIVERGENCES, hard_loss, soft_loss

Schedule = Callable[[float], float]


def linear(start: float, end: float) -> Schedule:
    """A schedule for `temperature` or `alpha`: from `start` to `end` over the run."""
    return lambda progress: start + (end - start) * progress


class DistillationTrainer:
    """loss = alpha * T^2 KL(teacher || student) + (1 - alpha) * cross-entropy + feature_weight * features.

    An instance is a `loss(model, batch)` for `kit.training.train`; `fit` calls that with what belongs to it. Language
    models (`.hidden` and `.output`) take the fused loss, which never holds all logits; any other model is called and
    its logits (..., V) compared. Several teachers: the mean of their probabilities; features come from the first.

    Features are the BK-core's g (`features.BK_FEATURE`, real and imaginary part) of the layers that
    `features.layer_mapping` pairs; `features` names other pairs (student's, teacher's), `()` none. Without such
    layers in both models the term is off. Hooks live for one forward pass.

    temperature and alpha are numbers or schedules of the progress in [0, 1]. `kind` is one of losses.DIVERGENCES,
    `feature_loss` one of losses.FEATURE_LOSSES. A teacher receives no gradients and must be in evaluation mode.
    """

    def __init__(
        self, teacher: nn.Module | Sequence[nn.Module], student: nn.Module, temperature: float | Schedule = 2.0,
        alpha: float | Schedule = 0.7, feature_weight: float = 0.1, *, kind: str = "forward",
        features: Sequence[tuple[str, str]] | None = None, feature_loss: str = "mse", balance_weight: float = 0.01,
    ):  # fmt: skip
        """Raises ValueError for settings outside their range, names that match nothing, unequal vocabularies."""
        self.teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        self.student, self.temperature, self.alpha, self.kind = student, temperature, alpha, kind
        self.feature_weight, self.balance_weight, self.progress = feature_weight, balance_weight, 0.0
        self.parts: dict[str, float] = {}
        self._check()
        pairs = feature_pairs(student, self.teachers[0]) if features is None else tuple(features)
        self.features = FeatureLoss(pairs, feature_loss) if pairs and feature_weight else None
        self._check_names(pairs)

    def fit(self, loader, config, **arguments):
        """`kit.training.train` of the student with this loss; `arguments` are passed on."""
        from kit.training import train

        self.prepare(loader)
        hooks = (*arguments.pop("hooks", ()), self.step)
        return train(self.student, loader, config, loss=self, hooks=hooks, extra_parameters=self.parameters(),
                     **arguments)  # fmt: skip

    def prepare(self, loader) -> None:
        """Learn the features' widths from one example of `loader`, so that `parameters` is complete."""
        if self.features is not None and self.features.projections is None:
            inputs = loader.dataset[0][0][None] if hasattr(loader, "dataset") else next(iter(loader))[0]
            inputs = inputs.to(next(self.student.parameters()).device)
            training = self.student.training
            with torch.no_grad():
                outputs = [self._forward(model.eval(), inputs, side) for side, model in self._sides()]
            self.student.train(training)
            self.features.prepare(*(features for _, features in outputs))

    def parameters(self) -> list[nn.Parameter]:
        """Of the learned projections: the `extra_parameters` of the training loop."""
        return [] if self.features is None else list(self.features.parameters())

    def step(self, step: int, steps: int, model: nn.Module) -> None:
        """Hook of the training loop: moves the schedules."""
        self.progress = step / steps

    def __call__(self, model: nn.Module, batch) -> torch.Tensor:
        inputs, targets = batch[0], batch[1]
        temperature, alpha = self._now("temperature"), self._now("alpha")
        if any(module.training for teacher in self.teachers for module in teacher.modules()):
            raise ValueError("a teacher is in training mode, where dropout would blur its targets: "
                             "call teacher.eval() first")  # fmt: skip
        outputs, own = self._forward(model, inputs, 0)
        with torch.no_grad():
            soft = [self._forward(teacher, inputs, 1 if i == 0 else None) for i, teacher in enumerate(self.teachers)]
        loss = self._logit_loss(outputs, [logits for logits, _ in soft], targets, temperature, alpha)
        if self.features is not None:
            features = self.features(own, soft[0][1])
            self.parts["features"] = features.detach()
            loss = loss + self.feature_weight * features
        if hasattr(model, "auxiliary_loss"):
            loss = loss + self.balance_weight * model.auxiliary_loss()
        return loss

    def _sides(self):
        return (0, self.student), (1, self.teachers[0])

    def _forward(self, model, inputs, side):
        """The model's `Output` or logits, and the features of that side of the pairs (None: none)."""
        names = [] if self.features is None or side is None else [pair[side] for pair in self.features.pairs]
        with capture(model, names) if names else nullcontext({}) as features:
            logits = Output(model.hidden(inputs), *model.output()) if self._fused else model(inputs)
        return logits, features

    def _logit_loss(self, own, soft, targets, temperature, alpha):
        if self._fused:
            loss = linear_distillation(own, targets, soft, temperature=temperature, alpha=alpha, kind=self.kind)
            self.parts.update(soft=loss.soft, hard=loss.hard)
            return loss.total
        if own.shape[-1] != soft[0].shape[-1]:
            raise ValueError(f"the student has {own.shape[-1]} classes, the teacher {soft[0].shape[-1]}: "
                             f"soft targets need the same ones")  # fmt: skip
        keep = targets != -100
        divergence = soft_loss(own, soft, temperature, self.kind)[keep].mean()
        hard = hard_loss(own, targets)[keep].mean()
        self.parts.update(soft=divergence.detach(), hard=hard.detach())
        return alpha * divergence + (1 - alpha) * hard

    def _now(self, name: str) -> float:
        value = getattr(self, name)
        return _checked(name, value(self.progress)) if callable(value) else value

    def _check(self) -> None:
        for name in ("temperature", "alpha"):
            value = getattr(self, name)
            _checked(name, value(0.0) if callable(value) else value)
        if not self.feature_weight >= 0:
            raise ValueError(f"feature_weight is {self.feature_weight}: it must be 0 (off) or positive")
        if self.kind not in DIVERGENCES:
            raise ValueError(f"divergence {self.kind!r} is unknown: choose one of {', '.join(DIVERGENCES)}")
        if not self.teachers:
            raise ValueError("there is no teacher: give a module, or a list of at least one")
        self._fused = all(hasattr(model, "output") and hasattr(model, "hidden")
                          for model in (self.student, *self.teachers))  # fmt: skip
        if self._fused:
            self._check_vocabularies()

    def _check_vocabularies(self) -> None:
        with torch.no_grad():
            own, *others = (len(model.output()[0]) for model in (self.student, *self.teachers))
        for other in others:
            if other != own:
                raise ValueError(f"the student has a vocabulary of {own}, the teacher of {other}: "
                                 f"soft targets need the same tokenizer")  # fmt: skip

    def _check_names(self, pairs) -> None:
        for side, model in self._sides():
            with capture(model, [pair[side] for pair in pairs]):
                pass


def _checked(name: str, value: float) -> float:
    if name == "temperature" and not (0 < value < float("inf")):
        raise ValueError(f"temperature is {value}: it must be positive (1 leaves the distributions as they are)")
    if name == "alpha" and not 0 <= value <= 1:
        raise ValueError(f"alpha is {value}: it must lie in [0, 1] (0: labels only, 1: teacher only)")
    return value
