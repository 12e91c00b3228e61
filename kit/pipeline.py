"""QAT, pruning and distillation one after another, each ending in a file whose bytes and quality
are measured."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn

from kit import artifact
from kit.budget import RateLoss, RateSettings, row_sensitivity, set_rate_formats
from kit.core.measurement import peak_memory
from kit.core.protocols import LanguageModel, adapt, bare, tensors_of, tree_map
from kit.core.settings import Count, Meta, Positive, Seed, Share, checks, settings
from kit.core.store import code_digest, digest, lock, read_json, write_json
from kit.core.weights import copy_model, materialize, weights
from kit.distillation import DistillationTrainer
from kit.models import MoE, recipe
from kit.pruning.experts import prune_unused_experts
from kit.pruning.magnitude import MagnitudePruner
from kit.pruning.structured import sort_hidden_units
from kit.quantization import calibrate, original_mix, quantize_bk_core, quantize_weights
from kit.quantization.token_tables import compose_tables, order_rows
from kit.training import TrainConfig, parallel, steps_in, train
from kit.training.checkpoint import rng_state, set_rng_state
from kit.training.evaluation import evaluate
from kit.training.losses import classification_loss, training_loss

# Code that decides what a stage is and how it is measured
CODE = (
    "core", "models", "data", "training", "quantization", "pruning", "artifact", "budget",
    "distillation", "pipeline.py",
)  # fmt: skip

Stages = Annotated[tuple[Literal["qat", "pruning", "distillation"], ...], Meta(min_length=1)]


@settings
class PipelineSettings:
    """Constants of the stages, each tuned by experiment on validation text.

    calibration_batches: on which ranges, sensitivities and the use of experts are measured.
    frequent: words of a large vocabulary that every step of the distillation sees; others by turns.
    alpha: share of the distillation's loss from the teacher, the rest from labels. 0.6 is better in
        short runs, not in long ones.
    final_lr: weights cross the edges between codes for as long as steps are large enough.
    qat_lr: of `lr`: a trained model has only its rounding to get used to, and loses ground at more.
    start: times the budget, where the distillation begins to descend. Weights that go further down
        come out worse.
    pruned: how far pruning brings the file, in log size, from the last stage's to the budget:
        further, and the retraining of one stage does not repair it.
    rate: of training under a rate.
    """

    calibration_batches: Count = 8
    frequent: Count = 2048
    alpha: Share = 0.3
    final_lr: Share = 0.0
    qat_lr: Positive = 0.1
    start: Positive = 2.5
    pruned: Share = 0.25
    rate: RateSettings = RateSettings()


@dataclass(frozen=True)
class Stage:
    """A model ready to be trained, and what training it takes."""

    model: nn.Module
    loss: Callable
    hooks: tuple = ()
    parameters: Sequence[nn.Parameter] = ()
    finish: Callable[[], None] = lambda: None
    lr: float = 1.0  # of the pipeline's


class CompressionPipeline:
    """Compresses a trained model to a byte budget: its float32 file divided by
    `target_compression`.

    qat           INT4 groups for experts and INT8 for the rest, straight-through; the BK-core's v
                  and G in INT8
    pruning       experts under 5 % usage go, the router shrinks; then magnitude pruning on a cubic
                  schedule, part of the way to the budget
    distillation  from the uncompressed model and, for most of the loss, the labels; learned steps
                  and a rate term steer the range-coded size to the budget. What went (experts,
                  precision of activations) stays away; weights start over from their uncompressed
                  values, rounded to 2.5 times the budget (Renda et al. 2020, arXiv:2003.02389),
                  since those that the rate keeps are not those that magnitude kept

    Every stage starts from the file of the stage before it, and is measured after reloading its
    own.

    Args:
        model: any trained module. Language models are trained on next tokens, others on labels.
        stages: their order; distillation last if the budget is to be met.
        lr: peak learning rate; QAT takes a tenth of it.
        token_parts: what each token was merged from (`BPETokenizer.parts`): the distillation then
            codes token tables as residuals from their parts, and its file is loaded with
            `parts=token_parts`.
        token_counts: how often each token occurs in the training data (V,): the distillation then
            keeps rows of token tables by falling frequency. Worth it unless the tokenizer numbers
            tokens so.
    Raises ValueError for a value out of range.
    """

    @checks
    def __init__(
        self, model: nn.Module, target_compression: Annotated[float, Meta(ge=1, le=1e9)] = 100.0,
        device: str = "auto", stages: Stages = ("qat", "pruning", "distillation"),
        lr: Positive = 2e-3, seed: Seed = 0, log: bool = True,
        token_parts: np.ndarray | None = None, token_counts: np.ndarray | None = None,
        settings: PipelineSettings = PipelineSettings(),
    ):  # fmt: skip
        self.model, self.target_compression = adapt(model), target_compression
        self.stages, self.lr, self.seed, self.log = stages, lr, seed, log
        self.device, self.settings = parallel.join(device), settings
        language = isinstance(self.model, LanguageModel)
        self.tables = (token_parts, token_counts) if language else (None, None)
        self.loss = training_loss(self.model) if language else classification_loss
        self.baseline_bytes = artifact.float32_bytes(model)
        self.budget = math.floor(self.baseline_bytes / target_compression)

    @checks
    def run_pipeline(
        self, train_loader, val_loader, qat_epochs: Positive = 3, pruning_epochs: Positive = 3,
        distillation_epochs: Positive = 5, save_dir: str | Path = "runs/pipeline",
        until: str | None = None,
    ) -> tuple[nn.Module, dict]:  # fmt: skip
        """Runs the stages and returns (compressed model, metrics).

        Epochs may be fractions. Finished stages found in `save_dir` are not run again; one that was
        killed goes on from its last checkpoint. `until` names the last stage to run now. The model
        comes from its file. metrics:
        `compression_ratio`, `target_met`, `budget_bytes`, `baseline` and, for each stage,
        `stage_metrics[stage]` with `bytes`, `ratio`, `final_perplexity` (`final_accuracy` of a
        classifier), `degradation`, `seconds`, `tokens`, `peak_memory` (bytes), `path`, the
        `history` of its training and, under a rate, of `rate` (bytes, those wanted, lambda).
        """
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages are {', '.join(self.stages)}: name each but once")
        epochs = {"qat": qat_epochs, "pruning": pruning_epochs, "distillation": distillation_epochs}
        steps = {name: steps_in(train_loader, epochs[name]) for name in self.stages}
        if until not in (None, *self.stages):
            raise ValueError(f"until is {until!r}; it must be one of {', '.join(self.stages)}.")
        with nullcontext() if parallel.rank() else lock(save_dir):  # the second reads what is there
            return self._run(train_loader, val_loader, steps, Path(save_dir), until)

    def _run(self, train_loader, val_loader, steps, save_dir: Path, until) -> tuple:
        self._claim(save_dir, [*steps.items(), _ends(train_loader)])
        teacher = materialize(self.model).to(self.device).eval()
        baseline = self._quality(teacher, val_loader)
        previous, found = None, {}
        for name in self.stages:
            path = save_dir / f"{name}.kit"
            if due := parallel.agreed(_baseline_of(path) != baseline):  # none, or of other data
                trained = path.exists() and path.with_suffix(".training").exists()
                if not parallel.agreed(trained):
                    self._run_stage(name, previous, teacher, train_loader, steps[name], path)
                self._record(path, val_loader, baseline)
            previous = path
            found[name] = stage = read_json(path.with_suffix(".json"))
            del stage["baseline"]
            if due:
                quality = "error" if "final_accuracy" in stage else "perplexity"
                smaller = f"{stage['bytes']:,} bytes, {stage['ratio']:.1f}x smaller"
                self._say(f"{name}: {smaller}, {stage['degradation']:+.1%} {quality} on val_loader")
            if name == until:
                break
        final = found[name]
        over = final["bytes"] - self.budget
        met = "met" if over <= 0 else f"missed by {over:,} bytes"
        if name == self.stages[-1]:
            self._say(f"target of {self.target_compression:g}x ({self.budget:,} bytes): {met}")
        baseline = {"bytes": self.baseline_bytes, **baseline}
        metrics = {"baseline": baseline, "stage_metrics": found, "budget_bytes": self.budget}
        metrics |= {"compression_ratio": final["ratio"], "target_met": over <= 0}
        return bare(self._load(previous)), metrics

    def _say(self, text: str) -> None:
        if self.log and parallel.rank() == 0:
            print(text, flush=True)

    def _claim(self, save_dir: Path, training: list) -> None:
        """A folder belongs to one model, one set of settings and of training data and one version
        of the code, so that a resumed stage is the stage it says."""
        own = [self.target_compression, *training, self.lr, self.seed, self.settings]
        own.append(list(self.tables))
        claim, file = digest(self.model, own, code_digest(CODE)), save_dir / "settings.json"
        if parallel.agreed(file.exists() and read_json(file, str) != claim):
            raise ValueError(
                f"{save_dir} holds a run with another model, other settings or data or another "
                "version of the kit: delete it or choose another save_dir"
            )
        if parallel.rank() == 0:
            write_json(file, claim)

    def _load(self, path: Path, trainable: bool = False) -> nn.Module:
        skeleton = None if recipe(self.model) else materialize(self.model)
        return artifact.load(path, skeleton, trainable, self.tables[0]).to(self.device)

    def _quality(self, model: nn.Module, loader) -> dict:
        result = evaluate(model, loader)
        name = "accuracy" if result.classifier else "perplexity"
        return {name: getattr(result, name)}

    def _record(self, path: Path, val_loader, baseline: dict) -> None:
        """Measures a stage on the model in its file."""
        quality, size = self._quality(self._load(path), val_loader), path.stat().st_size
        if "accuracy" in quality:
            degradation = baseline["accuracy"] - quality["accuracy"]
        else:
            degradation = quality["perplexity"] / baseline["perplexity"] - 1
        record = {"bytes": size, "ratio": self.baseline_bytes / size, "degradation": degradation}
        record |= {"path": str(path), **read_json(path.with_suffix(".training"))}
        final = {"baseline": baseline, **{f"final_{key}": q for key, q in quality.items()}}
        path.with_suffix(".checkpoint").unlink(missing_ok=True)
        parallel.agreed(parallel.rank() or write_json(path.with_suffix(".json"), record | final))

    def _run_stage(
        self, name: str, previous: Path | None, teacher, loader, steps, path: Path
    ) -> None:
        start = time.perf_counter()
        torch.manual_seed(self.seed)
        batches = list(itertools.islice(loader, self.settings.calibration_batches))
        batches = [tree_map(lambda t: t.to(self.device), batch) for batch in batches]
        stage, final_lr = STAGES[name](self, previous, teacher, batches), self.settings.final_lr
        config = TrainConfig(steps, self.lr * stage.lr, final_lr=final_lr, seed=self.seed)
        checkpoint = path.with_suffix(".checkpoint")
        self._freeze(stage.model)
        result = train(
            stage.model, loader, config, loss=stage.loss, hooks=stage.hooks, checkpoint=checkpoint,
            log=self.log, extra_parameters=stage.parameters,
        )  # fmt: skip
        stage.finish()
        if parallel.rank() == 0:
            artifact.save(stage.model, path)
            training = {"seconds": time.perf_counter() - start, "tokens": result.tokens}
            training["peak_memory"] = peak_memory(self.device)
            training |= {"history": result.history, "rate": getattr(stage.loss, "history", [])}
            write_json(path.with_suffix(".training"), training)
        parallel.agreed(None)

    def _freeze(self, model: nn.Module) -> None:
        """What the user froze stays so: parameters, and parts of a training model in evaluation."""
        given, fixed = dict(self.model.named_modules()), {w.name for w in weights(self.model)
                        if not w.original.requires_grad}  # fmt: skip
        for weight in weights(model):
            if weight.name in fixed:
                weight.original.requires_grad_(False)
        for name, module in model.named_modules() if self.model.training else ():
            module.training = given[name].training if name in given else True

    def _qat(self, previous: Path | None, teacher: nn.Module, batches: list) -> Stage:
        model = copy_model(teacher) if previous is None else self._load(previous)
        calibrate(quantize_bk_core(model), batches)
        quantize_weights(model, original_mix(model))
        return Stage(model, self.loss, lr=self.settings.qat_lr)

    def _pruning(self, previous: Path | None, teacher: nn.Module, batches: list) -> Stage:
        model = copy_model(teacher) if previous is None else self._load(previous)
        if any(isinstance(module, MoE) for module in model.modules()):
            model = prune_unused_experts(model, batches)
        if previous is not None:
            quantize_weights(model, original_mix(model))
        sparsity = self._sparsity_for(model, previous)
        hook = MagnitudePruner(model, scope="global").schedule(sparsity)
        return Stage(model, self.loss, (hook,))

    def _sparsity_for(self, model: nn.Module, previous: Path | None) -> float:
        """The global sparsity that brings the file as far as the settings say."""
        size = previous.stat().st_size if previous else self.baseline_bytes
        share = self.settings.pruned
        wanted = size ** (1 - share) * self.budget**share
        low, high = 0.0, 0.95
        for _ in range(6):
            middle = (low + high) / 2
            trial = copy_model(model)
            MagnitudePruner(trial, scope="global").prune(middle)
            low, high = (low, middle) if artifact.nbytes(trial) <= wanted else (middle, high)
        return low

    def _distillation(self, previous: Path | None, teacher: nn.Module, batches: list) -> Stage:
        fits = previous is not None and previous.stat().st_size <= self.budget
        model = copy_model(teacher) if previous is None else self._load(previous, trainable=fits)
        if not fits:
            _rewind(model, teacher)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # few bits regularize enough
        settings, sample = self.settings, None
        if isinstance(self.loss, partial):
            sample = replace(self.loss.keywords["sample"], frequent=settings.frequent)
        distill = DistillationTrainer(teacher, model, 1.0, settings.alpha, 0.0, sample=sample)
        if fits:
            return Stage(model, distill, (distill.step,), distill.parameters())
        arrange_for_coding(model, batches, self.loss, *self.tables)
        count = sum(weight.original.numel() for weight in weights(model))
        sensitivity = row_sensitivity(model, batches, self.loss)
        start = min(settings.start * self.budget, count / 2)
        set_rate_formats(model, sensitivity, start, settings.rate)
        rate = RateLoss(distill, model, self.budget, batches[:2], settings.rate)
        parameters = [*distill.parameters(), *rate.parameters()]
        return Stage(model, rate, (distill.step, rate.step), parameters, rate.finish)


STAGES = {
    "qat": CompressionPipeline._qat,
    "pruning": CompressionPipeline._pruning,
    "distillation": CompressionPipeline._distillation,
}


def _baseline_of(path: Path) -> dict | None:
    """What the uncompressed model reached where a finished stage was measured."""
    record = path.with_suffix(".json")
    return read_json(record)["baseline"] if record.exists() and path.exists() else None


def _ends(loader) -> str:
    """Names the first and the last example, or batch, of training data that gives the same ones
    each time; "" for other data."""
    data, state, seen = getattr(loader, "dataset", loader), rng_state(), []
    for _ in range(2):
        with suppress(Exception):  # what cannot be indexed
            torch.manual_seed(0)
            seen.append(digest(tensors_of([data[0], data[len(data) - 1]])))
    set_rng_state(state)
    return seen[0] if len(seen) == 2 and seen[0] == seen[1] else ""


def arrange_for_coding(
    model: nn.Module, batches: list, loss: Callable, token_parts: np.ndarray | None = None,
    token_counts: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Puts a model in the form whose codes take the fewest bytes, in place; what it computes stays
    the same: hidden units of experts by size, token tables composed (given `token_parts`) and by
    falling frequency (given `token_counts`)."""
    sort_hidden_units(model)
    if token_parts is not None:
        compose_tables(model, token_parts, batches, loss)
    if token_counts is not None:
        order_rows(model, token_counts)


def _rewind(model: nn.Module, origin: nn.Module) -> None:
    """Gives weights that still have the shape they had in `origin` the values they had there."""
    values = {weight.name: weight.original for weight in weights(origin)}
    for weight in weights(model):
        if weight.name in values and values[weight.name].shape == weight.original.shape:
            weight.assign(values[weight.name])
