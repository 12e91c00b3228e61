"""QAT, pruning and distillation one after another, each ending in a file whose bytes and quality are measured."""

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from kit import artifact
from kit.core.store import code_digest, digest
from kit.distillation import DistillationTrainer
from kit.training.evaluation import evaluate
from kit.training.losses import classification_loss, training_loss
from kit.core.measurement import peak_memory
from kit.models import MoE, recipe
from kit.core.weights import bake, copy_model, named_weights, original_of
from kit.pruning.experts import prune_unused_experts
from kit.pruning.magnitude import MagnitudePruner
from kit.pruning.structured import sort_hidden_units
from kit.quantization import calibrate, original_mix, quantize_bk_core, quantize_weights
from kit.quantization.token_tables import compose_tables, order_rows
from kit.budget.rate import RateLoss, row_sensitivity, set_rate_formats
from kit.core.store import write_json
from kit.training import TrainConfig, train

STAGES = ("qat", "pruning", "distillation")
CODE = ("core", "models", "data", "training", "quantization", "pruning", "artifact", "budget", "distillation", "pipeline.py")  # that decides what a stage is and how it is measured
CALIBRATION_BATCHES = 8
FREQUENT = 2048  # words of a large vocabulary that every step of the distillation sees; all others by turns
ALPHA = 0.3  # of the distillation's loss from the teacher, the rest from labels: 0.6 is better in short runs, not in long ones
FINAL_LR = 0.0  # weights cross the edges between codes for as long as steps are large enough
QAT_LR = 0.1  # of `lr`: a trained model has only its rounding to get used to, and would first lose ground at more
START = 2.5  # times the budget: where the distillation begins to descend. Weights that go further down come out worse


class CompressionPipeline:
    """Compresses a trained model to a byte budget: its float32 file divided by `target_compression`.

    qat           INT4 groups for experts and INT8 for the rest, straight-through; the BK-core's v and G in INT8
    pruning       experts under 5 % usage go, the router shrinks; then magnitude pruning on a cubic schedule, as far
                  as brings the file a quarter of the way (in ratio) from the last stage to the budget
    distillation  from the uncompressed model and, for most of the loss, the labels; learned steps and a rate term steer
                  the range-coded size to the budget. What went (experts, precision of activations) stays away; weights
                  start over from their uncompressed values, rounded to 2.5 times the budget (Renda et al. 2020,
                  arXiv:2003.02389), since those that the rate keeps are not those that magnitude kept

    Every stage starts from the file of the stage before it, and is measured after reloading its own.

    Args:
        model: any trained module. Language models (`hidden`, `output`) are trained on next tokens, others on labels.
        stages: their order; distillation last if the budget is to be met.
        lr: peak learning rate; QAT takes a tenth of it.
        token_parts: what each token was merged from (`BPETokenizer.parts`): the distillation then codes token tables as
            residuals from their parts (`kit.quantization.composition`), and its file is loaded with `parts=token_parts`.
        token_counts: how often each token occurs in the training data (V,): the distillation then keeps rows of token tables by
            falling frequency (`kit.quantization.ordering`). Worth it unless the tokenizer numbers tokens that way.
    Raises ValueError for a target below 1 or an unknown stage.
    """

    def __init__(self, model: nn.Module, target_compression: float = 100.0, device: str = "cpu",
                 stages: Sequence[str] = STAGES, lr: float = 2e-3, seed: int = 0, log: bool = True,
                 token_parts: np.ndarray | None = None, token_counts: np.ndarray | None = None):
        if not target_compression >= 1:
            raise ValueError(f"target_compression={target_compression} must be at least 1, the float32 file itself")
        if unknown := set(stages) - set(STAGES):
            raise ValueError(f"unknown stage {sorted(unknown)[0]!r}: choose from {', '.join(STAGES)}")
        self.model, self.target_compression, self.device = model, target_compression, device
        self.stages, self.lr, self.seed, self.log = tuple(stages), lr, seed, log
        self.token_parts, self.token_counts, self.language = token_parts, token_counts, hasattr(model, "output")
        self.loss = training_loss(model) if self.language else classification_loss
        self.baseline_bytes = artifact.float32_bytes(model)
        self.budget = math.floor(self.baseline_bytes / target_compression)

    def run_pipeline(self, train_loader, val_loader, qat_epochs: float = 3, pruning_epochs: float = 3,
                     distillation_epochs: float = 5, save_dir: str | Path = "runs/pipeline") -> tuple[nn.Module, dict]:
        """Runs the stages and returns (compressed model, metrics).

        Epochs may be fractions. Finished stages found in `save_dir` are not run again; one that was
        killed goes on from its last checkpoint. The model comes from its file. metrics:
        `compression_ratio`, `target_met`, `budget_bytes`, `baseline` and, for each stage,
        `stage_metrics[stage]` with `bytes`, `ratio`, `final_perplexity` (`final_accuracy` of a
        classifier), `degradation`, `seconds`, `tokens`, `peak_memory` (bytes), `path`.
        """
        save_dir = Path(save_dir)
        save_dir.mkdir(parents=True, exist_ok=True)
        epochs = {"qat": qat_epochs, "pruning": pruning_epochs, "distillation": distillation_epochs}
        steps = {name: max(1, round(epochs[name] * len(train_loader))) for name in self.stages}
        self._claim(save_dir, steps)
        teacher = bake(self.model).to(self.device).eval()
        baseline = self._quality(teacher, val_loader)
        previous, metrics = None, {"baseline": {"bytes": self.baseline_bytes, **baseline}, "stage_metrics": {}}
        for name in self.stages:
            path = save_dir / f"{name}.kit"
            if not path.with_suffix(".json").exists():
                self._run_stage(name, previous, teacher, train_loader, steps[name], path)
                self._record(path, val_loader, baseline)
            previous = path
            metrics["stage_metrics"][name] = stage = json.loads(path.with_suffix(".json").read_text())
            self._say(f"{name}: {stage['bytes']:,} bytes, {stage['ratio']:.1f}x smaller, "
                      f"{stage['degradation']:+.1%} {'error' if 'final_accuracy' in stage else 'perplexity'}")
        final = metrics["stage_metrics"][self.stages[-1]]
        metrics |= {"compression_ratio": final["ratio"], "budget_bytes": self.budget,
                    "target_met": final["bytes"] <= self.budget}
        self._say(f"target of {self.target_compression:g}x ({self.budget:,} bytes): " + (
            "met" if metrics["target_met"] else f"missed by {final['bytes'] - self.budget:,} bytes"))
        return self._load(previous), metrics

    def _say(self, text: str) -> None:
        if self.log:
            print(text, flush=True)

    def _claim(self, save_dir: Path, steps: dict) -> None:
        """A folder belongs to one model, one set of settings and one version of the code, so that a resumed stage is the stage
        it says."""
        total = float(sum(p.detach().double().abs().sum() for p in self.model.parameters()))
        tables = [None if x is None else int(np.sum(x)) for x in (self.token_parts, self.token_counts)]
        claim = digest(model=total, target=self.target_compression, steps=steps, lr=self.lr, seed=self.seed, tables=tables,
                       code=code_digest(CODE))
        file = save_dir / "settings.json"
        if file.exists() and json.loads(file.read_text()) != claim:
            raise ValueError(f"{save_dir} holds a run with another model, other settings or another version of the kit: "
                             "delete it or choose another save_dir")
        write_json(file, claim)

    def _load(self, path: Path, trainable: bool = False) -> nn.Module:
        return artifact.load(path, self._skeleton(), trainable, self.token_parts).to(self.device)

    def _skeleton(self) -> nn.Module | None:
        return None if recipe(self.model) else bake(self.model)

    def _quality(self, model: nn.Module, loader) -> dict:
        result = evaluate(model, loader)
        return {"accuracy": result.accuracy} if result.classifier else {"perplexity": result.perplexity}

    def _record(self, path: Path, val_loader, baseline: dict) -> None:
        """Measures a stage on the model in its file."""
        quality = self._quality(self._load(path), val_loader)
        size = path.stat().st_size
        if "accuracy" in quality:
            degradation = baseline["accuracy"] - quality["accuracy"]
        else:
            degradation = quality["perplexity"] / baseline["perplexity"] - 1
        training = json.loads(path.with_suffix(".training").read_text())
        write_json(path.with_suffix(".json"), {
            "bytes": size, "ratio": self.baseline_bytes / size, "degradation": degradation, "path": str(path), **training,
            **{f"final_{key}": value for key, value in quality.items()}})

    def _run_stage(self, name: str, previous: Path | None, teacher: nn.Module, loader, steps: int, path: Path) -> None:
        start = time.perf_counter()
        torch.manual_seed(self.seed)
        batches = [tuple(t.to(self.device) for t in batch) for batch in itertools.islice(loader, CALIBRATION_BATCHES)]
        model = copy_model(teacher) if previous is None else self._load(previous)
        model, loss, hooks, extra, finish = getattr(self, f"_{name}")(model, teacher, batches, previous)
        config = TrainConfig(steps=steps, lr=self.lr * (QAT_LR if name == "qat" else 1), final_lr=FINAL_LR, seed=self.seed)
        checkpoint = path.with_suffix(".checkpoint")
        result = train(model, loader, config, loss=loss, hooks=hooks, checkpoint=checkpoint, log=self.log,
                       extra_parameters=extra)
        finish()
        artifact.save(model, path)
        write_json(path.with_suffix(".training"), {"seconds": time.perf_counter() - start, "tokens": result.tokens,
                                                    "peak_memory": peak_memory()})
        checkpoint.unlink(missing_ok=True)

    def _qat(self, model, teacher, batches, previous):
        quantize_bk_core(model)
        calibrate(model, batches)
        quantize_weights(model, original_mix(model))
        return model, self.loss, (), (), lambda: None

    def _pruning(self, model, teacher, batches, previous):
        formats = previous is not None
        if any(isinstance(module, MoE) for module in model.modules()):
            model = prune_unused_experts(model, batches)
        if formats:
            quantize_weights(model, original_mix(model))
        pruner = MagnitudePruner(model, scope="global")
        sparsity = self._sparsity_for(model, previous)
        return model, self.loss, (pruner.schedule(sparsity),), (), lambda: None

    def _sparsity_for(self, model: nn.Module, previous: Path | None) -> float:
        """The global sparsity whose file is a quarter of the way, in ratio, from the last stage's to the budget:
        further, and the retraining of one stage no longer repairs it."""
        size = previous.stat().st_size if previous else self.baseline_bytes
        wanted = size**0.75 * self.budget**0.25
        low, high = 0.0, 0.95
        for _ in range(6):
            middle = (low + high) / 2
            trial = copy_model(model)
            MagnitudePruner(trial, scope="global").prune(middle)
            low, high = (low, middle) if artifact.nbytes(trial) <= wanted else (middle, high)
        return low

    def _distillation(self, model, teacher, batches, previous):
        fits = previous is not None and previous.stat().st_size <= self.budget
        if fits:
            model = self._load(previous, trainable=True)
        else:
            _rewind(model, teacher)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # few bits regularize enough
        sample = replace(self.loss.keywords["sample"], frequent=FREQUENT) if isinstance(self.loss, partial) else None
        distill = DistillationTrainer(teacher, model, temperature=1.0, alpha=ALPHA, feature_weight=0.0, sample=sample)
        if fits:
            return model, distill, (distill.step,), distill.parameters(), lambda: None
        arrange(model, batches, self.loss, *((self.token_parts, self.token_counts) if self.language else ()))
        weights = sum(original_of(m, a).numel() for _, m, a in named_weights(model))
        start = min(START * self.budget, weights / 2)
        set_rate_formats(model, row_sensitivity(model, batches, self.loss), start)
        rate = RateLoss(distill, model, self.budget, batches[:2])
        return model, rate, (distill.step, rate.step), [*distill.parameters(), *rate.parameters()], rate.finish


def arrange(model: nn.Module, batches: list, loss: Callable, token_parts: np.ndarray | None = None,
            token_counts: np.ndarray | None = None) -> None:
    """Puts a model in the form whose codes take the fewest bytes, in place; what it computes stays the same: hidden units of
    experts by size, token tables composed (given `token_parts`) and by falling frequency (given `token_counts`)."""
    sort_hidden_units(model)
    if token_parts is not None:
        compose_tables(model, token_parts, batches, loss)
    if token_counts is not None:
        order_rows(model, token_counts)


@torch.no_grad()
def _rewind(model: nn.Module, origin: nn.Module) -> None:
    """Gives weights that still have the shape they had in `origin` the values they had there."""
    values = {name: original_of(m, a) for name, m, a in named_weights(origin)}
    for name, module, attribute in named_weights(model):
        weight = original_of(module, attribute)
        if name in values and values[name].shape == weight.shape:
            weight.copy_(values[name])
