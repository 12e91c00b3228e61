"""The one training loop: of language models, classifiers, students and teachers, under masks and
quantizers. It knows none of them: losses, hooks and steps of the weights are passed in."""

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kit.core.protocols import call_of, tensors_of, tree_map
from kit.core.settings import Count, Meta, NotNegative, Positive, Seed, Share, checked, settings
from kit.core.weights import is_finite
from kit.training import checkpoint as files
from kit.training import parallel
from kit.training.losses import IGNORED, next_token_loss
from kit.training.report import Report

SAVED = files.NUMBERS.keys() - {"position", "config"}  # of a run
SAVE_SECONDS = 120  # between two checkpoints, when evaluations are further apart


@settings
class TrainConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, cosine decay and clipping.

    `warmup` is a fraction of the steps, `final_lr` of `lr`, `clip` the gradient's largest norm;
    parameters with one axis (biases, norms) are not decayed. `eval_every` defaults to a tenth of
    the steps; training stops after `patience` evaluations without improvement. With `precision`
    "bfloat16" or "float16" the loss is computed under autocast, with float16's gradients scaled.
    `accumulate` computes each batch in so many parts, one after another, in less memory.
    """

    steps: Count
    lr: Positive = 3e-3
    weight_decay: NotNegative = 0.01
    warmup: Share = 0.05
    final_lr: Share = 0.05
    clip: Annotated[float, Meta(gt=0)] = 1.0
    eval_every: Count | None = None
    patience: Count | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    accumulate: Count = 1
    seed: Seed = 0


@dataclass(frozen=True)
class TrainResult:
    history: list[dict]  # step, loss (mean since the last), lr, seconds; validation if evaluated
    tokens: int  # targets trained on (labels, for a classifier)
    seconds: float  # of training; validation and checkpoints not counted
    best_validation: float | None
    best_step: int  # whose state the model is left with


def steps_in(loader: Iterable, epochs: float) -> int:
    """Steps of so many epochs > 0, at least one. ValueError for a loader without a length."""
    try:
        return max(1, round(checked("epochs", epochs, Positive) * len(loader)))
    except TypeError:
        what = f"a {type(loader).__name__} has no length"
        advice = "give a DataLoader of a sized data set, or a list of batches"
        raise ValueError(f"{what}: {advice}") from None


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0 .. steps - 1: linear warm-up to lr, then a cosine to final_lr * lr."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = min(1, (step - warm) / max(1, config.steps - 1 - warm))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def train(
    model: nn.Module, loader: Iterable, config: TrainConfig, *,
    loss: Callable[[nn.Module, object], Tensor] = next_token_loss,
    validate: Callable[[nn.Module], float] | None = None, hooks: Iterable[Callable] = (),
    checkpoint: str | Path | None = None, log: bool = True,
    extra_parameters: Iterable[nn.Parameter] = (),
) -> TrainResult:  # fmt: skip
    """Trains `model` in place on the batches of `loader` (repeated), on the model's device.

    Submodules in evaluation mode stay so (frozen batch norms), unless the whole model is. Draws
    from torch's, NumPy's and random's global generators, seeded by the config; their states and
    all modes come back at the end, also of a run that fails.

    Processes that met in `parallel.join` share out each batch. Means over targets, or over rows
    with equally many, come out as in one process, but for rounding; what a loss draws or divides
    by, and the balance of experts, are each part's own.

    Args:
        loss: (model, batch) -> scalar; a batch is any that `call_of` understands.
        validate: (model) -> number, lower is better. The best state is restored at the end;
            infinity is for states that must not be chosen, as while a mask still grows.
        hooks: (step, steps, model) after each optimizer step, counted from 1. One that returns True
            has replaced parameters: the optimizer takes them over, the best state is forgotten.
        checkpoint: file written at every evaluation. Called again after a kill with the same
            arguments and tensors (masks and quantizers are on before), the run ends bit for bit as
            without it.
        extra_parameters: trained too, such as projections of a distillation loss.

    Raises ValueError for nothing to train, a loss not finite, an unfit checkpoint, norms of parts.
    """
    outside, hooks = files.rng_state(), list(hooks)
    run = _Run(model, loader, config, extra_parameters)
    if config.patience and validate is None:
        raise ValueError(f"patience is {config.patience}, which needs validation: pass validate=.")
    if checkpoint and Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint is the folder {checkpoint}: give the path of a file.")
    if checkpoint:
        files.check_storable(run.tensors())
    steps, report, saved = config.steps, Report(log), time.perf_counter()
    every, record_every = config.eval_every or max(1, steps // 10), max(1, steps // 100)
    try:
        if checkpoint and parallel.agreed(Path(checkpoint).exists()):
            run.restore(Path(checkpoint))
        else:
            torch.manual_seed(config.seed)
            np.random.seed(config.seed % 2**32)
            random.seed(config.seed)
        checkpoint = None if parallel.rank() else checkpoint
        parallel.spread(run.tensors().values())
        while not run.finished:
            before = checkpoint and run.place()
            try:
                value = run.gradients(loss)
            except Exception as error:
                if checkpoint and run.step and all(map(is_finite, run.tensors().values())):
                    run.go_back(before)
                    run.save(Path(checkpoint))  # else the last one stays, which can be read
                if isinstance(error, (ValueError, MemoryError, torch.OutOfMemoryError)):
                    raise
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                advice = "look for inputs or labels out of range, or of another type or shape"
                where = f"Step {run.step + 1} of {steps} fails"
                raise ValueError(f"{where} ({what}): {advice}.") from error
            run.advance(value, hooks)
            milestone = run.step % every == 0 or run.step == steps
            if milestone or run.step % record_every == 0:
                run.record(validate if milestone else None)
                report(run)
            if checkpoint and (milestone or time.perf_counter() - saved > SAVE_SECONDS):
                run.save(Path(checkpoint))
                saved = time.perf_counter()
        run.take_best()
    finally:
        run.restore_modes()
        files.set_rng_state(outside)
    best_step = run.best_step or run.step
    return TrainResult(run.history, run.tokens, run.seconds, run.best_validation, best_step)


class _Run:
    """Everything a checkpoint holds, and the steps that change it."""

    def __init__(self, model, loader, config, extra_parameters):
        self.model, self.config, self.batches = model, config, files.Batches(loader)
        self.extra = {f"extra.{i}": p for i, p in enumerate(extra_parameters)}
        self.modes = {module: module.training for module in model.modules()}
        self.frozen = [m for m, training in self.modes.items() if model.training and not training]
        self.step = self.tokens = self.stale = self.best_step = self.loss_steps = 0
        self.seconds, self.loss_sum, self.best_validation = 0.0, 0.0, None
        self.history, self.best, self.optimizer = [], {}, None
        self.parts = parallel.processes() * config.accumulate
        norms = (m for m in self.modes if isinstance(m, nn.modules.batchnorm._BatchNorm))
        if self.parts > 1 and any(norm not in self.frozen for norm in norms):
            advice = "freeze them by eval(), or use one process and accumulate=1."
            raise ValueError(f"Batch norms would see a batch in {self.parts} parts: {advice}")
        self.build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps or self.stale >= (self.config.patience or math.inf)

    def parameters(self) -> dict[str, nn.Parameter]:
        named = dict(self.model.named_parameters()) | self.extra
        return {name: p for name, p in named.items() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """What a state is made of: parameters and all buffers."""
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers()) | self.extra

    def build_optimizer(self) -> None:
        """A new AdamW over the present parameters; those it had before keep their moments."""
        parameters = list(self.parameters().values())
        if not parameters:
            raise ValueError("The model has no trainable parameters: set requires_grad on some.")
        self.device = parameters[0].device
        old = self.optimizer.state if self.optimizer else {}
        matrices = [p for p in parameters if p.ndim > 1], self.config.weight_decay
        vectors = [p for p in parameters if p.ndim <= 1], 0.0
        groups = [{"params": ps, "weight_decay": w} for ps, w in (matrices, vectors) if ps]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, fused=fused or None)
        kept = {p: old[p] for p in parameters if p in old and old[p]["exp_avg"].shape == p.shape}
        self.optimizer.state.update(kept)

    def gradients(self, loss) -> float:
        """Gradients of the loss on the next batch, and its value."""
        self.started, batch = time.perf_counter(), self.batches.next()
        self.targets = _count_targets(batch, self.model)
        self.model.train()
        for module in self.frozen:
            module.training = False
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        value = self._backward(loss, batch, parameters)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        falls = self.scaler.get_scale() > 1  # the scale, where a gradient is not finite
        self._check(value := value.item(), 0.0 if falls else norm.item())
        return value

    def place(self) -> tuple:
        """What `gradients` changes of a checkpoint: generators, place in the data, buffers."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return files.rng_state(), self.batches.epoch_rng, self.batches.position, buffers

    def go_back(self, place: tuple) -> None:
        generators, self.batches.epoch_rng, self.batches.position, buffers = place
        files.set_rng_state(generators)
        files.copy_into(dict(self.model.named_buffers()), buffers, "The last step")

    def advance(self, value: float, hooks) -> None:
        """One optimizer step with the gradients that are there."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + self.targets
        self.batches.position += 1
        self.loss_sum, self.loss_steps = self.loss_sum + value, self.loss_steps + 1
        if any([hook(self.step, self.config.steps, self.model) is True for hook in hooks]):
            self.build_optimizer()
            self.best, self.best_validation, self.best_step, self.stale = {}, None, 0, 0
        self.seconds += time.perf_counter() - self.started

    def _backward(self, loss, batch, parameters: list) -> Tensor:
        """Leaves the gradients of the whole batch in the parameters; returns its loss."""
        counts = [b for b in self.model.buffers() if b.dtype == torch.int64]  # uses of experts
        before, several = [b.clone() for b in counts], self.parts > 1
        start = math.nan if several and not self.targets else 0.0
        total = torch.full((), start, device=self.device)
        first = parallel.rank() * self.config.accumulate
        half = getattr(torch, self.config.precision)
        for part in range(first, first + self.config.accumulate):
            rows = parallel.share(batch, part, self.parts) if several else batch
            weight = _count_targets(rows, self.model) / max(self.targets, 1) if several else 1.0
            if not weight:
                continue
            if several:  # each draws its own, and the generators of all processes stay in step
                state, step = files.rng_state(), 1_000_003 * self.config.seed + self.step
                torch.manual_seed((step * self.parts + part) % 2**63)
            rows = tree_map(lambda t: t.to(self.device, non_blocking=True), rows)
            try:
                with torch.autocast(self.device.type, half, enabled=half != torch.float32):
                    now = loss(self.model, rows)
                if not isinstance(now, Tensor) or now.numel() != 1:
                    said = getattr(now, "shape", type(now).__name__)
                    raise ValueError(f"The loss is a {said}; it must be a tensor of one number.")
                self.scaler.scale(now * weight).backward()
                total = total + now.detach().sum() * weight
            finally:
                if several:
                    files.set_rng_state(state)
        for p in parameters:
            if p.grad is not None and p.grad.is_sparse:  # AdamW moves every entry
                p.grad = p.grad.to_dense()
        if parallel.processes() > 1:
            parallel.add_up([some := torch.tensor([float(p.grad is not None) for p in parameters])])
            used = [p for p, given in zip(parameters, some.tolist()) if given]
            for p in used:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            added = [b - old for b, old in zip(counts, before)]
            parallel.add_up([total := total.float(), *(p.grad for p in used), *added])
            for b, old, more in zip(counts, before, added):
                b.copy_(old + more)
        return total

    def _check(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"The gradient (loss {loss:.4g})"
            what = what if math.isfinite(loss) else f"The loss ({loss})"
            rate = self.optimizer.param_groups[0]["lr"]
            where = f"at step {self.step + 1} of {self.config.steps} (lr {rate:.2e})"
            advice = "lower lr, lengthen warmup, or look for NaN in the weights and inputs."
            raise ValueError(f"{what} is not finite {where}: {advice}")

    def record(self, validate) -> None:
        """Appends to the history; with `validate`, evaluates and keeps the best state so far."""
        entry = {"step": self.step, "loss": self.loss_sum / self.loss_steps}
        entry |= {"seconds": self.seconds, "lr": self.optimizer.param_groups[0]["lr"]}
        self.loss_sum, self.loss_steps = 0.0, 0
        if validate is not None:
            state = files.rng_state()
            value = entry["validation"] = parallel.agreed(float(validate(self.model)))
            files.set_rng_state(state)  # evaluating changes nothing about the training that follows
            if math.isnan(value):
                advice = "lower lr, check the data."
                raise ValueError(f"The validation loss is NaN at step {self.step}: {advice}")
            if value < (math.inf if self.best_validation is None else self.best_validation):
                self.best = {name: t.detach().clone() for name, t in self.tensors().items()}
                self.best_validation, self.best_step, self.stale = value, self.step, 0
            elif self.best:
                self.stale += 1
        self.history.append(entry)

    def take_best(self) -> None:
        if self.best and self.best_step != self.step:
            files.copy_into(self.tensors(), self.best, "The best state")

    def restore_modes(self) -> None:
        self.model.train(self.modes[self.model])
        for module, training in self.modes.items():
            module.training = training

    def save(self, path: Path) -> None:
        states = {name: self.optimizer.state[p] for name, p in self.parameters().items()}
        moments = {f"{name}/{key}": t for name, state in states.items() for key, t in state.items()}
        groups = {"model": self.tensors(), "best": self.best, "optimizer": moments}
        groups |= {"rng.now": files.rng_state(), "rng.epoch": self.batches.epoch_rng}
        scaler = self.scaler.state_dict().items()
        groups["scaler"] = {key: torch.tensor(value) for key, value in scaler}
        rest = {"position": self.batches.position, "config": asdict(self.config)}
        state = {name: getattr(self, name) for name in SAVED}
        files.write_checkpoint(path, groups, files.State(**state, **rest))

    def restore(self, path: Path) -> None:
        groups, state = parallel.agreed(parallel.rank() or files.read_checkpoint(path))
        what = f"The checkpoint {path}"
        for name, ours in asdict(self.config).items():
            if (theirs := state.config.get(name, ours)) != ours and name != "accumulate":
                difference = f"was written with {name}={theirs!r:.100}, not {ours!r}"
                advice = "use the same settings, or delete it to start anew."
                raise ValueError(f"{what} {difference}: {advice}")
        if not state.position <= state.step <= self.config.steps:
            place = f"at batch {state.position} and step {state.step} of {self.config.steps}"
            raise ValueError(f"{what} is {place}: delete it to train from the start.")
        files.check_fit(self.tensors(), groups["model"], what)
        if groups["best"]:
            files.check_fit(self.tensors(), groups["best"], what)
        self._load_moments(groups["optimizer"], what)
        files.copy_into(self.tensors(), groups["model"], what)
        vars(self).update({name: getattr(state, name) for name in SAVED}, best=groups["best"])
        self.batches.resume(groups["rng.epoch"], state.position)
        scaler = groups["scaler"].items() if "scaler" in groups else ()
        self.scaler.load_state_dict({key: value.item() for key, value in scaler})
        files.set_rng_state(groups["rng.now"])

    def _load_moments(self, moments: dict[str, Tensor], what: str) -> None:
        """AdamW's steps and moments; absent for a parameter that has had no gradient yet."""
        expected = {}
        for name, p in self.parameters().items():
            like = {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
            like = {f"{name}/{key}": tensor for key, tensor in like.items()}
            if found := {key: moments[key].to(p.device) for key in like if key in moments}:
                expected |= like
                self.optimizer.state[p] = {key.split("/")[-1]: t for key, t in found.items()}
        files.check_fit(expected, moments, what)


def _count_targets(batch, model: nn.Module) -> int:
    """Targets that count, or examples where there are none."""
    if targets := tensors_of(call_of(batch, model).targets):
        return sum(len(t) if t.is_floating_point() else int((t != IGNORED).sum()) for t in targets)
    return len(tensors_of(batch)[0])
