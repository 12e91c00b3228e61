"""The one training loop: language models, classifiers, distillation (its loss passed in), quantization-aware
training and masks (parametrizations of the model, hooks). It knows nothing of any of them."""

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kit.training.checkpoint import Batches, copy_into, read_checkpoint, rng_state, set_rng_state, write_checkpoint
from kit.training.losses import next_token_loss
from kit.core.measurement import oversubscribed

LOG_SECONDS = 20  # between two lines of the log
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
SAVE_SECONDS = 120  # between two checkpoints, when evaluations are further apart


@dataclass(frozen=True)
class TrainConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, cosine decay and clipping of the gradient's norm.

    `warmup` is a fraction of the steps, `final_lr` a fraction of `lr`; parameters with one axis (biases,
    norms) are not decayed. `eval_every` defaults to a tenth of the steps; training stops after `patience`
    evaluations without improvement. `precision` "bfloat16" computes the loss under autocast.
    """

    steps: int
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    final_lr: float = 0.05
    clip: float = 1.0
    eval_every: int | None = None
    patience: int | None = None
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self):
        for name, good, expected in [
            ("steps", self.steps >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or above"),
            ("clip", self.clip > 0, "above 0"),
            ("warmup", 0 <= self.warmup <= 1, "a fraction of the steps, 0 to 1"),
            ("final_lr", 0 <= self.final_lr <= 1, "a fraction of lr, 0 to 1"),
            ("eval_every", self.eval_every is None or self.eval_every >= 1, "None or at least 1"),
            ("patience", self.patience is None or self.patience >= 1, "None or at least 1"),
            ("precision", self.precision in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        ]:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {expected}.")


@dataclass(frozen=True)
class TrainResult:
    history: list[dict]  # step, loss (mean since the last entry), lr, seconds, and validation where evaluated
    tokens: int  # targets trained on (images, for a classifier)
    seconds: float  # of training; validation and checkpoints not counted
    best_validation: float | None
    best_step: int  # whose state the model is left with


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0 .. steps - 1: linear warm-up to lr, then a cosine down to final_lr * lr."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = min(1, (step - warm) / max(1, config.steps - 1 - warm))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: nn.Module,
    loader: Iterable,
    config: TrainConfig,
    *,
    loss: Callable[[nn.Module, object], Tensor] = next_token_loss,
    validate: Callable[[nn.Module], float] | None = None,
    hooks: Iterable[Callable] = (),
    checkpoint: Path | None = None,
    log: bool = True,
    extra_parameters: Iterable[nn.Parameter] = (),
) -> TrainResult:
    """Trains `model` in place on the batches of `loader` (repeated), on the device the model is on.

    loss(model, batch) is a scalar; a batch is a tensor, tuple or dict of tensors, the targets last.
    validate(model) is a number, lower is better; the best state is restored at the end (return math.inf for
    states that must not be chosen, as while a mask still grows). hook(step, steps, model) runs after each
    optimizer step (step counts from 1); one that returns True has replaced parameters: the optimizer takes
    them over and the best state so far is forgotten. extra_parameters are trained too (projections of a
    distillation loss).

    `checkpoint` is written at every evaluation; called again with the same arguments after a kill, the run
    continues from it and ends with the same numbers, bit for bit, as without the kill. The model then needs
    the same tensors as when it was written: register masks and quantizers before, not in a hook. Seeds
    torch, numpy and random.

    Raises ValueError when nothing can be trained, the loss is not finite, or the checkpoint does not fit.
    """
    run, hooks = _Run(model, loader, config, extra_parameters), list(hooks)
    if config.patience and validate is None:
        raise ValueError(f"patience is {config.patience} but there is nothing to validate: pass validate=.")
    if checkpoint and Path(checkpoint).exists():
        run.restore(Path(checkpoint))
    else:
        torch.manual_seed(config.seed), np.random.seed(config.seed % 2**32), random.seed(config.seed)
    every, record_every = config.eval_every or max(1, config.steps // 10), max(1, config.steps // 100)
    report, was_training, saved = _Report(config, log), model.training, time.perf_counter()
    while not run.finished:
        run.advance(loss, hooks)
        milestone = run.step % every == 0 or run.step == config.steps
        if milestone or run.step % record_every == 0:
            run.record(validate if milestone else None)
            report(run)
        if checkpoint and (milestone or time.perf_counter() - saved > SAVE_SECONDS):
            run.save(Path(checkpoint))
            saved = time.perf_counter()
    run.restore_best()
    model.train(was_training)
    return TrainResult(run.history, run.tokens, run.seconds, run.best_validation, run.best_step or run.step)


class _Run:
    """Everything a checkpoint holds, and the steps that change it."""

    HEADER = "step tokens stale best_step best_validation seconds loss_sum loss_steps history".split()

    def __init__(self, model, loader, config, extra_parameters):
        self.model, self.config, self.batches = model, config, Batches(loader)
        self.extra = {f"extra.{i}": p for i, p in enumerate(extra_parameters)}
        self.step = self.tokens = self.stale = self.best_step = 0
        self.seconds, self.loss_sum, self.loss_steps = 0.0, 0.0, 0
        self.history, self.best, self.best_validation = [], {}, None
        self.optimizer = None
        self.build_optimizer()

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
        """A new AdamW over the present parameters; those that were there before keep their moments."""
        parameters = list(self.parameters().values())
        if not parameters:
            raise ValueError("The model has no trainable parameters: set requires_grad on those to train.")
        self.device = parameters[0].device
        old = self.optimizer.state if self.optimizer else {}
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        groups = [(matrices, self.config.weight_decay), (vectors, 0.0)]
        groups = [{"params": ps, "weight_decay": decay} for ps, decay in groups if ps]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, fused=fused or None)
        for p in parameters:
            if p in old and old[p]["exp_avg"].shape == p.shape:
                self.optimizer.state[p] = old[p]

    def advance(self, loss, hooks) -> None:
        """One optimizer step on the next batch."""
        start = time.perf_counter()
        batch = self.batches.next()
        tokens, batch = _count_targets(batch), _to_device(batch, self.device)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss_now = loss(self.model, batch)
        loss_now.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        value = loss_now.item()
        self._check(value, norm.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.loss_sum, self.loss_steps = self.loss_sum + value, self.loss_steps + 1
        if any([hook(self.step, self.config.steps, self.model) is True for hook in hooks]):
            self.build_optimizer()
            self.best, self.best_validation, self.best_step, self.stale = {}, None, 0, 0
        self.seconds += time.perf_counter() - start

    def _check(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"The gradient (loss {loss:.4g})" if math.isfinite(loss) else f"The loss ({loss})"
            rate = self.optimizer.param_groups[0]["lr"]
            raise ValueError(
                f"{what} is not finite at step {self.step + 1} of {self.config.steps} (lr {rate:.2e}): "
                "lower lr, lengthen warmup, or look for NaN in the weights and inputs."
            )

    def record(self, validate) -> None:
        """Appends to the history; with `validate`, evaluates and keeps the state if it is the best so far."""
        entry = {"step": self.step, "loss": self.loss_sum / self.loss_steps, "seconds": self.seconds}
        entry["lr"] = self.optimizer.param_groups[0]["lr"]
        self.loss_sum, self.loss_steps = 0.0, 0
        if validate is not None:
            state = rng_state()
            value = entry["validation"] = float(validate(self.model))
            set_rng_state(state)  # evaluating changes nothing about the training that follows
            if math.isnan(value):
                raise ValueError(f"The validation loss is NaN at step {self.step}: lower lr, check the data.")
            if value < (math.inf if self.best_validation is None else self.best_validation):
                self.best = {name: t.detach().clone() for name, t in self.tensors().items()}
                self.best_validation, self.best_step, self.stale = value, self.step, 0
            elif self.best:
                self.stale += 1
        self.history.append(entry)

    def restore_best(self) -> None:
        if self.best and self.best_step != self.step:
            copy_into(self.tensors(), self.best, "The best state")

    def save(self, path: Path) -> None:
        states = {name: self.optimizer.state[p] for name, p in self.parameters().items()}
        moments = {f"{name}/{key}": t for name, state in states.items() for key, t in state.items()}
        groups = {"model": self.tensors(), "best": self.best, "optimizer": moments}
        groups |= {"rng.now": rng_state(), "rng.epoch": self.batches.epoch_rng}
        header = {key: getattr(self, key) for key in self.HEADER}
        header |= {"position": self.batches.position, "config": asdict(self.config)}
        tensors = {f"{group}/{name}": t for group, ts in groups.items() for name, t in ts.items()}
        write_checkpoint(path, tensors, header)

    def restore(self, path: Path) -> None:
        tensors, header = read_checkpoint(path)
        for name, ours in asdict(self.config).items():
            theirs = header["config"].get(name, ours)
            if theirs != ours:
                what = f"The checkpoint {path} was written with {name}={theirs!r}, not {ours!r}"
                raise ValueError(f"{what}: use the same settings, or delete it to start anew.")
        groups: dict[str, dict] = {g: {} for g in ("model", "best", "rng.now", "rng.epoch", "optimizer")}
        for name, tensor in tensors.items():
            group, key = name.split("/", 1)
            groups[group][key] = tensor
        copy_into(self.tensors(), groups["model"], f"The checkpoint {path}")
        self._load_moments(groups["optimizer"])
        vars(self).update({key: header[key] for key in self.HEADER}, best=groups["best"])
        self.batches.resume(groups["rng.epoch"], header["position"])
        set_rng_state(groups["rng.now"])

    def _load_moments(self, moments: dict[str, Tensor]) -> None:
        names, states = {p: name for name, p in self.parameters().items()}, {}
        for index, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            found = {key: moments[f"{names[p]}/{key}"] for key in MOMENTS if f"{names[p]}/{key}" in moments}
            if found:  # absent for a parameter that has had no gradient yet
                states[index] = found
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})


def _to_device(batch, device):
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to_device(value, device) for key, value in batch.items()}
    return tuple(_to_device(value, device) for value in batch)


def _count_targets(batch) -> int:
    values = list(batch.values()) if isinstance(batch, dict) else batch
    return int(((values if isinstance(values, Tensor) else values[-1]) != -100).sum())


class _Report:
    """One plain line at most every LOG_SECONDS, and a last one: for terminals, notebooks and logs alike."""

    def __init__(self, config: TrainConfig, log: bool):
        self.config, self.log, self.hinted = config, log, False
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, run: _Run) -> None:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        if not self.log or (wall < LOG_SECONDS and not run.finished):
            return
        self.wall, self.cpu, entry = self.wall + wall, self.cpu + cpu, run.history[-1]
        validation = f"  validation {entry['validation']:.4f}" if "validation" in entry else ""
        left = run.seconds / run.step * (self.config.steps - run.step)
        left = "" if run.finished else f", about {left:.0f} s left"
        print(
            f"step {run.step}/{self.config.steps}  loss {entry['loss']:.4f}{validation}  "
            f"lr {entry['lr']:.1e}  {run.tokens / run.seconds:,.0f} tokens/s  {run.seconds:.0f} s{left}",
            flush=True,
        )
        hint = oversubscribed(cpu / wall if run.device.type == "cpu" else 1.0)
        if hint and not self.hinted and wall > 1:
            print(hint, flush=True)
            self.hinted = True
