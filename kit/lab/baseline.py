"""The dense model that everything else is compared with: trained once for its settings, then read from
disk.
"""

import dataclasses
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from kit import artifact
from kit.data import Corpus, Loaders, cache_dir, load_corpus, token_loaders
from kit.core.store import code_digest, digest, lock
from kit.training.evaluation import Evaluation, evaluate
from kit.training.losses import training_loss
from kit.core.measurement import has_fast_bfloat16, peak_memory
from kit.models import build_model
from kit.core.store import write_json
from kit.training import TrainConfig, train

VALIDATION_BATCHES = 32    # that decide when training stops: the whole split would take a third of the time
SOURCES = ("models", "data", "training")


@dataclass(frozen=True)
class Baseline:
    """A trained dense model, reloaded from its float32 file, with its data and its figures on the test
    split.
    """

    model: nn.Module
    corpus: Corpus
    loaders: Loaders
    test: Evaluation
    path: Path          # of the float32 artifact
    bytes: int          # of that file
    history: list       # of training: step, loss, lr, validation (nats per token)
    tokens: int         # seen in training
    seconds: float
    peak_memory: int    # bytes

    @property
    def bits_per_byte(self) -> float:
        return self.test.bits_per_byte(self.corpus.utf8_bytes["test"])

    def validate(self, model: nn.Module) -> float:
        """Nats per token on the validation split."""
        return evaluate(model, self.loaders.validation).loss


def load_or_train(*, corpus: str = "docs", vocab_size: int = 4096, train_bytes: int | None = None,
                  batch_size: int = 16, seq_len: int = 128, steps: int = 600, lr: float = 1e-2, patience: int | None = 3,
                  precision: str | None = None, weight_decay: float = 0.01, final_lr: float = 0.05, seed: int = 0,
                  model: str = "ResNetBK", log: bool = True, device: str = "cpu", **shape) -> Baseline:
    """Trains `model` (a name in kit.models.MODELS; `shape` is its config) until validation stops
    improving or `steps` are done, and writes it as a float32 artifact; with the same settings, data and
    code it is only read again.

    `precision` None is bfloat16 where the device multiplies it in hardware, else float32. Training resumes when it was
    killed. The test split is measured once, on the model reloaded from its file.
    Raises ValueError for settings that the data or the model cannot have, before any training.
    """
    text = load_corpus(corpus, vocab_size, train_bytes)
    loaders = token_loaders(text, batch_size, seq_len)
    precision = precision or ("bfloat16" if has_fast_bfloat16(device) else "float32")
    training = TrainConfig(steps=steps, lr=lr, weight_decay=weight_decay, final_lr=final_lr, patience=patience,
                           eval_every=max(steps // 12, 10), precision=precision, seed=seed)
    torch.manual_seed(seed)
    dense = build_model(model, {**shape, "vocab_size": text.tokenizer.vocab_size}).to(device)
    settings = {"model": model, "shape": dataclasses.asdict(dense.config), "training": dataclasses.asdict(training), "seq_len": seq_len,
                "batch_size": batch_size, "text": text.sha256, "vocab_size": vocab_size,
                "device": device, "sources": code_digest(SOURCES)}
    folder = cache_dir() / "baselines" / f"{model}-{digest(**settings)}"
    with lock(folder / "record.json"):
        if not (folder / "record.json").exists():
            _train(dense, loaders, training, folder, settings, log)
    record = json.loads((folder / "record.json").read_text())
    path = folder / "model.kit"
    dense = artifact.load(path).to(device)
    return Baseline(dense, text, loaders, _evaluation(record["test"]), path, path.stat().st_size, record["history"],
                    record["tokens"], record["seconds"], record["peak_memory"])


def _train(model: nn.Module, loaders: Loaders, config: TrainConfig, folder: Path, settings: dict, log: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    glance = list(itertools.islice(loaders.validation, VALIDATION_BATCHES))
    result = train(model, loaders.train, config, loss=training_loss(model), checkpoint=checkpoint, log=log,
                   validate=lambda m: evaluate(m, glance).loss)
    artifact.save(model, folder / "model.kit", layouts=("dense",))
    test = evaluate(artifact.load(folder / "model.kit").to(next(model.parameters()).device), loaders.test)
    write_json(folder / "record.json", {"settings": settings, "test": dataclasses.asdict(test), "history": result.history,
                                        "tokens": result.tokens, "seconds": result.seconds, "peak_memory": peak_memory()})
    shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink(missing_ok=True)


def _evaluation(record: dict) -> Evaluation:
    return Evaluation(**{k: np.array(v) if isinstance(v, list) else v for k, v in record.items()})
