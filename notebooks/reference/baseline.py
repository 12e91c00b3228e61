"""The dense model that everything else is compared with: trained once for its settings, then read
from disk."""

import dataclasses
import itertools
import json
import runpy
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kit import artifact
from kit.core.measurement import has_fast_bfloat16, peak_memory
from kit.core.protocols import device_of
from kit.core.store import cache_dir, code_digest, digest, lock, write_json
from kit.data import Corpus, Loaders, load_corpus, token_loaders
from kit.models import build_model, recipe
from kit.training import TrainConfig, parallel, train
from kit.training.evaluation import Evaluation, evaluate
from kit.training.losses import training_loss

VALIDATION_BATCHES = 32  # that decide when training stops: the whole split would take as long
SOURCES = ("core/protocols.py", "models", "data", "training")  # whose code makes the model
NAMES = {"resnet_bk": "ResNetBK", "lstm": "LSTMLM", "transformer": "TransformerLM"}
TRAINING = {"steps": 600, "lr": 1e-2, "patience": 3}  # where TrainConfig's own defaults differ


@dataclass(frozen=True)
class Baseline:
    """A trained dense model, loaded from its float32 file, with its data and test figures."""

    model: nn.Module
    corpus: Corpus
    loaders: Loaders
    path: Path  # of the float32 artifact
    bytes: int  # of that file
    test: Evaluation
    history: list  # of training: step, loss, lr, validation (nats per token)
    tokens: int  # seen in training
    seconds: float
    peak_memory: int  # bytes

    @property
    def bits_per_byte(self) -> float:
        return self.test.bits_per_byte(self.corpus.utf8_bytes["test"])


def load_or_train(
    *, corpus="docs", vocab_size=4096, train_bytes=None, batch_size=16, seq_len=128,
    model="ResNetBK", device="auto", log=True, **settings,
) -> Baseline:  # fmt: skip
    """Trains `model` (a name in kit.models.MODELS or NAMES, or "file.py:function", which makes one
    from the size of the vocabulary) until validation stops improving or its steps are done, and
    writes it as a float32 artifact; with the same settings, data and code it is only read. A killed
    training resumes. The test split is measured once, on the model from the file.

    settings: fields of TrainConfig (`precision` is by default bfloat16 where the device multiplies
    it in hardware) and of the model's config; `experts` only where it has some. Raises ValueError,
    before any training, for settings that the data or the model cannot have.
    """
    device, text = parallel.join(device), load_corpus(corpus, vocab_size, train_bytes)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    chosen = {**TRAINING, **{name: settings.pop(name) for name in fields & settings.keys()}}
    chosen.setdefault("eval_every", max(chosen["steps"] // 12, 10))
    chosen.setdefault("precision", "bfloat16" if has_fast_bfloat16(device) else "float32")
    training = TrainConfig(**chosen)
    torch.manual_seed(training.seed)
    dense, made_by = _build(model, text.tokenizer.vocab_size, settings)
    dense = dense.to(device)
    skeleton = None if recipe(dense) else dense
    loaders = token_loaders(text, batch_size, seq_len)
    windows, code = (batch_size, seq_len), code_digest(SOURCES)
    key = digest(made_by, training, windows, text.sha256, vocab_size, device.type, code)
    folder = cache_dir() / "baselines" / f"{type(dense).__name__}-{key}"
    path, record = folder / "model.kit", folder / "record.json"
    with nullcontext() if parallel.rank() else lock(folder):  # the others wait for rank 0
        if not parallel.agreed(record.exists()):
            done = _train(dense, loaders, training, path, log, skeleton)
            if parallel.rank() == 0:
                write_json(record, done)
        parallel.agreed(None)
        path.with_name("checkpoint").unlink(missing_ok=True)
    found = json.loads(record.read_text())
    test = {k: np.array(v) if isinstance(v, list) else v for k, v in found.pop("test").items()}
    dense = artifact.load(path, skeleton).to(device)
    return Baseline(dense, text, loaders, path, path.stat().st_size, Evaluation(**test), **found)


def _build(name: str, vocab_size: int, settings: dict) -> tuple[nn.Module, object]:
    """The model, and what tells it from others: its config, or the text of the file it is from."""
    file, _, function = name.rpartition(":")
    if file:
        return runpy.run_path(file)[function](vocab_size), (function, Path(file).read_text())
    name = NAMES.get(name, name)
    if name in NAMES.values() and name != "ResNetBK":
        settings = {key: value for key, value in settings.items() if key != "experts"}
    model = build_model(name, {**settings, "vocab_size": vocab_size})
    return model, model.config


def _train(model, loaders: Loaders, config: TrainConfig, path: Path, log: bool, skeleton) -> dict:
    """Trains a model and writes it to `path`; returns what Baseline says of it."""
    glance = list(itertools.islice(loaders.validation, VALIDATION_BATCHES))
    options = {"validate": lambda m: evaluate(m, glance).loss, "log": log}
    options |= {"loss": training_loss(model), "checkpoint": path.with_name("checkpoint")}
    done = train(model, loaders.train, config, **options)
    if parallel.rank() == 0:
        artifact.save(model, path, layouts=("dense",))
    parallel.agreed(None)
    test = evaluate(artifact.load(path, skeleton).to(device_of(model)), loaders.test)
    found = {name: getattr(done, name) for name in ("history", "tokens", "seconds")}
    return {**found, "test": test, "peak_memory": peak_memory(device_of(model))}
