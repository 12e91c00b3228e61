"""One model, one afternoon: quantize, prune, distil, export and measure any nn.Module without changing it.

A front: the arithmetic is kit.quantization's, pruning kit.pruning's, losses kit.distillation's, files
kit.artifact's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from kit.distillation import DistillationTrainer
from kit.training.losses import classification_loss, next_token_loss
from kit.pruning import MagnitudePruner, prune_channels
from kit.core.weights import copy_model
from kit.engines.quantized import QuantizationConfig, QuantizedModel, prepare_qat, quantize
from kit.engines.report import OptimizationResult, compare_models, example_inputs
from kit.training import TrainConfig, train

STRUCTURED = {"l1": "l1", "l2": "l2", "l1_structured": "l1", "ln_structured": "l2"}
UNSTRUCTURED = {"magnitude": "magnitude", "random": "random", "l1_unstructured": "magnitude",
                "random_unstructured": "random"}


@dataclass(frozen=True)
class PruningConfig:
    """How much goes, and what.

    amount: the share of outputs of each layer (structured) or of weights (unstructured), in [0, 1).
    method: structured "l1", "l2"; unstructured "magnitude", "random". torch's names are understood.
    dim: 0 names the outputs of a layer, 1 its inputs; a unit that goes takes both with it, so they are one choice.
    """

    amount: float = 0.3
    method: str = "l1"
    dim: int = 0

    def __post_init__(self):
        if not 0 <= self.amount < 1:
            raise ValueError(f"amount={self.amount} must be at least 0 and below 1: the share that is pruned")
        if self.method not in (*STRUCTURED, *UNSTRUCTURED):
            known = ", ".join((*STRUCTURED, *UNSTRUCTURED))
            raise ValueError(f"method {self.method!r} is unknown: choose one of {known}")
        if self.dim not in (0, 1):
            raise ValueError(f"dim={self.dim} must be 0 (outputs) or 1 (inputs)")


@dataclass(frozen=True)
class DistillationConfig:
    """alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy, T = temperature (Hinton et al. 2015)."""

    temperature: float = 3.0
    alpha: float = 0.5
    epochs: float = 10
    learning_rate: float = 1e-4

    def __post_init__(self):
        if not (self.epochs > 0 and self.learning_rate > 0):
            raise ValueError(f"epochs={self.epochs}, learning_rate={self.learning_rate}: both must exceed 0")


class ProductionModelOptimizer:
    """Compression of any trained module; every method returns a new model and leaves its argument as it was.

    `inputs` are a batch the model accepts (a tensor, or a tuple of them); where they may be left out they
    are made up from the first layer. Training runs on `device`; quantized models run on the CPU.
    """

    def __init__(self, device: str = "cpu", log: bool = False):
        self.device, self.log = torch.device(device), log

    def quantize_dynamic(self, model: nn.Module,
                         config: QuantizationConfig = QuantizationConfig()) -> QuantizedModel:
        """Weights in integers (Linear, LSTM, GRU, convolutions, embeddings), input ranges those of each
        batch.

        Raises ValueError if there is nothing to quantize.
        """
        return quantize(model, config)

    def quantize_static(self, model: nn.Module, calibration: Iterable,
                        config: QuantizationConfig = QuantizationConfig()) -> QuantizedModel:
        """Weights in integers, and the inputs of Linear and convolutions in ranges found on the batches
        `calibration`.

        Raises ValueError if there is no batch or nothing to quantize.
        """
        return quantize(model, config, calibration)

    def prepare_qat_model(self, model: nn.Module, config: QuantizationConfig = QuantizationConfig(),
                          calibration: Iterable | None = None) -> nn.Module:
        """A copy to train with rounded weights (and inputs, if calibrated); `quantize_dynamic` then packs
        it.
        """
        return prepare_qat(model, config, calibration).to(self.device)

    def prune_structured(self, model: nn.Module, config: PruningConfig = PruningConfig(),
                         inputs=None) -> nn.Module:
        """A smaller dense copy without the `config.amount` least important outputs of each layer.

        Raises ValueError for an unstructured method and for models whose layers cannot be taken apart.
        """
        if config.method not in STRUCTURED:
            raise ValueError(f"method {config.method!r} removes weights: choose from {', '.join(STRUCTURED)}")
        example = _as_tuple(inputs) or example_inputs(model)
        return prune_channels(model, example[0], config.amount, importance=STRUCTURED[config.method])

    def prune_unstructured(self, model: nn.Module,
                           config: PruningConfig = PruningConfig(method="magnitude")) -> nn.Module:
        """A masked copy: the `config.amount` lowest weights of each tensor are zero, also while it is
        trained on.

        Raises ValueError for a structured method and for models without weights of two or more dimensions.
        """
        if config.method not in UNSTRUCTURED:
            raise ValueError(f"method {config.method!r} removes units: choose from {', '.join(UNSTRUCTURED)}")
        return MagnitudePruner(copy_model(model), score=UNSTRUCTURED[config.method]).prune(config.amount)

    def distill_knowledge(self, teacher_model: nn.Module, student_model: nn.Module, train_loader,
                          config: DistillationConfig = DistillationConfig()) -> nn.Module:
        """A copy of the student trained to follow the teacher and the labels; in evaluation mode.

        train_loader: batches (inputs, labels), of known length. Raises ValueError for settings out of
        range and models of different classes.
        """
        teacher, student = (copy_model(model).to(self.device) for model in (teacher_model, student_model))
        trainer = DistillationTrainer(teacher.eval(), student, config.temperature, config.alpha, 0.0)
        trainer.fit(train_loader, _schedule(train_loader, config.epochs, config.learning_rate), log=self.log)
        return student.eval()

    def retrain(self, model: nn.Module, train_loader, epochs: float = 1, learning_rate: float = 1e-3,
                loss: Callable | None = None) -> nn.Module:
        """A copy trained further; masks and fake quantizers stay.

        loss(model, batch): by default that of the next token for language models, else cross-entropy with labels.
        """
        copy = copy_model(model).to(self.device)
        loss = loss or (next_token_loss if hasattr(model, "output") else classification_loss)
        train(copy, train_loader, _schedule(train_loader, epochs, learning_rate), loss=loss, log=self.log)
        return copy.eval()

    def optimize_full_pipeline(self, model: nn.Module, prune_amount: float = 0.3,
                               use_quantization: bool = True, use_pruning: bool = True, *, inputs=None,
                               train_loader=None, epochs: float = 1, calibration: Iterable | None = None,
                               loss: Callable | None = None,
                               config: QuantizationConfig = QuantizationConfig()
                               ) -> tuple[nn.Module, OptimizationResult]:
        """Prune, retrain (with a `train_loader`), quantize (statically with `calibration`); returns model
        and result.

        Units are removed where the model can be taken apart; where it cannot, single weights are masked
        instead, and the result says so.
        """
        inputs, notes, optimized = _as_tuple(inputs) or example_inputs(model), [], model
        if use_pruning and prune_amount:
            optimized, notes = self._prune(model, PruningConfig(prune_amount), inputs)
            if train_loader is not None:
                optimized = self.retrain(optimized, train_loader, epochs, loss=loss)
            else:
                notes.append("pruned without retraining: pass train_loader= to win back what that cost")
        if use_quantization:
            optimized = quantize(optimized, config, calibration)
            optimized.tune(*inputs)
        return optimized, self.measure(model, optimized, inputs, tuple(notes))

    def _prune(self, model: nn.Module, config: PruningConfig, inputs) -> tuple[nn.Module, list[str]]:
        try:
            return self.prune_structured(model, config, inputs), []
        except ValueError as reason:
            pruned = self.prune_unstructured(model, PruningConfig(config.amount, "magnitude"))
            return pruned, [f"weights were masked, no units removed: {reason}"]

    def measure(self, original: nn.Module, optimized: nn.Module, inputs=None, notes: tuple[str, ...] = ()
                ) -> OptimizationResult:
        """Both models side by side: file, latency, outputs, layers."""
        return compare_models(original, optimized, _as_tuple(inputs) or example_inputs(original), notes=notes)

    def export_onnx(self, model: nn.Module, path: str | PathLike, inputs=None) -> dict:
        """Writes an .onnx file and checks it in ONNX Runtime against torch: see kit.engines.export.export_onnx.

        Float, or integers for a QuantizedModel: QDQ if its inputs are calibrated. Raises ValueError if the model
        cannot be exported.
        """
        from kit.engines.export import export_onnx

        return export_onnx(model, path, _as_tuple(inputs) or example_inputs(model))


def _schedule(loader, epochs: float, learning_rate: float) -> TrainConfig:
    return TrainConfig(steps=max(1, round(epochs * len(loader))), lr=learning_rate)


def _as_tuple(inputs) -> tuple[Tensor, ...] | None:
    return (inputs,) if isinstance(inputs, Tensor) else None if inputs is None else tuple(inputs)


def quick_quantize(model: nn.Module, inputs=None, **settings) -> QuantizedModel:
    """The model with INT8 weights on the fastest engine; `settings` are those of QuantizationConfig.

    The engine is measured on `inputs` if given, else on those of the first call.
    """
    quantized = quantize(model, QuantizationConfig(**settings))
    if inputs is not None:
        quantized.tune(*_as_tuple(inputs))
    return quantized


def quick_optimize(model: nn.Module, inputs=None, prune_amount: float = 0.3, **arguments
                   ) -> tuple[nn.Module, OptimizationResult]:
    """Pruned and quantized model, and the result, of ProductionModelOptimizer().optimize_full_pipeline."""
    return ProductionModelOptimizer().optimize_full_pipeline(model, prune_amount, inputs=inputs, **arguments)
