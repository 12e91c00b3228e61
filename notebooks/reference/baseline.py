"""The dense model that everything else is compared with: trained once for its settings, or
pretrained, then read from disk."""

import dataclasses
import itertools
import json
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kit import artifact
from kit.core.measurement import has_fast_bfloat16, peak_memory
from kit.core.protocols import device_of, evaluating
from kit.core.store import cache_dir, code_digest, digest, lock, write_json
from kit.core.weights import materialize
from kit.data import Corpus, Loaders, load_corpus, token_loaders
from kit.models import build_model, recipe
from kit.training import TrainConfig, parallel, train
from kit.training.evaluation import Evaluation, evaluate
from kit.training.losses import logits_of, training_loss

VALIDATION_BATCHES = 32  # that decide when training stops: the whole split would take as long
SOURCES = ("core/protocols.py", "models", "data", "training")  # whose code makes the model
NAMES = {"resnet_bk": "ResNetBK", "lstm": "LSTMLM", "transformer": "TransformerLM"}
PRETRAINED = "hf:"
TRAINING = {"steps": 600, "lr": 1e-2, "patience": 3}  # where TrainConfig's own defaults differ


@dataclass(frozen=True)
class Baseline:
    """A dense model, loaded from its float32 file, with its data and test figures."""

    model: nn.Module
    corpus: Corpus
    loaders: Loaders
    path: Path  # of the float32 artifact
    bytes: int  # of that file
    test: Evaluation
    history: list  # of training: step, loss, lr, validation (nats per token); of none: empty
    tokens: int  # seen in training
    seconds: float
    peak_memory: int  # bytes

    @property
    def bits_per_byte(self) -> float:
        return self.test.bits_per_byte(self.corpus.utf8_bytes["test"])

    def load(self, path: str | Path, trainable: bool = False) -> nn.Module:
        """The model in a file that was made of this one, on the CPU."""
        skeleton = None if recipe(self.model) else materialize(self.model).cpu()
        return artifact.load(path, skeleton, trainable, self.corpus.tokenizer.parts)


def load_or_train(
    *, corpus="docs", vocab_size=4096, train_bytes=None, batch_size=16, seq_len=128,
    model="ResNetBK", device="auto", log=True, **settings,
) -> Baseline:  # fmt: skip
    """Trains `model` (a name in kit.models.MODELS or NAMES, or what `opened` takes) until
    validation stops improving or its steps are done, and writes it as a float32 artifact; with the
    same settings, data and code it is only read. A killed training resumes. The test split is
    measured once, on the model from the file. A pretrained model is not trained.

    settings: fields of TrainConfig (`precision` is by default bfloat16 where the device multiplies
    it in hardware) and of the model's config; `experts` only where it has some; what a model that
    is not the kit's has no use for is printed. Raises ValueError, before any training, for settings
    that the data or the model cannot have.
    """
    device = parallel.join(device)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    of_training = {name: settings.pop(name) for name in fields & settings.keys()}
    chosen = {**TRAINING, **of_training}
    chosen.setdefault("eval_every", max(chosen["steps"] // 12, 10))
    chosen.setdefault("precision", "bfloat16" if has_fast_bfloat16(device) else "float32")
    training = TrainConfig(**chosen)
    torch.manual_seed(training.seed)
    text, dense, made_by = opened(model, corpus, vocab_size, train_bytes, seq_len)
    if model.startswith(PRETRAINED):
        training, settings = None, {"vocab_size": vocab_size, **of_training, **settings}
    if dense is None:
        dense = _build(model, text.tokenizer.vocab_size, settings)
        made_by = dense.config
    elif settings and log and not parallel.rank():
        comes = "comes trained, with its tokens" if training is None else "has the shape it has"
        print(f"{model} {comes}: {', '.join(sorted(settings))} do not apply to it.")
    dense = dense.to(device)
    skeleton = None if recipe(dense) else dense
    loaders = token_loaders(text, batch_size, seq_len)
    windows, code, size = (batch_size, seq_len), code_digest(SOURCES), text.tokenizer.vocab_size
    key = digest(made_by, training, windows, text.sha256, size, device.type, code)
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


def opened(
    model: str, corpus: str, vocab_size: int, train_bytes: int | None, seq_len: int
) -> tuple[Corpus, nn.Module | None, object]:
    """A corpus in the tokens of a model that reads windows of `seq_len`; the model, and what tells
    it from others, or None twice for a name of the kit's.

    model: "hf:" and a folder, or an id of the hub: a pretrained causal language model of
    transformers, in float32, with its fast tokenizer; or "file.py:function", which makes one from
    the size of the vocabulary. Raises ValueError for what is neither.
    """
    file, _, function = model.rpartition(":")
    if model.startswith(PRETRAINED):
        from kit import hub  # transformers takes seconds

        module = hub.load(model).float()
        module.config.use_cache = False  # of keys and values, which only generation needs
        most = getattr(module.config.get_text_config(), "max_position_embeddings", None)
        if most and seq_len > most:
            raise ValueError(f"seq_len is {seq_len}, but {model} has {most} positions: choose less")
        tokenizer = hub.load_tokenizer(model, _vocabulary(model, module))
        text = load_corpus(corpus, train_bytes=train_bytes, tokenizer=tokenizer)
        return text, module, [digest(module), text.tokenizer.to_json()]
    make = function_of(model) if file else None
    text = load_corpus(corpus, vocab_size, train_bytes)
    if make is None:
        return text, None, None
    module, size = make(text.tokenizer.vocab_size), text.tokenizer.vocab_size
    if (found := _vocabulary(model, module)) != size:
        raise ValueError(f"model is {model!r}, with logits of {found} tokens: it must have {size}")
    return text, module, (function, Path(file).read_text())


def function_of(name: str) -> Callable:
    """The function of "file.py:function". Raises ValueError where the file has none."""
    file, _, function = name.rpartition(":")
    found = runpy.run_path(file).get(function)
    if not callable(found):
        raise ValueError(f"model is {name!r}, but {file} has no function {function!r}: name one")
    return found


def _vocabulary(name: str, model: nn.Module) -> int:
    """Tokens that a causal language model has logits of. Raises ValueError for another model."""
    head = getattr(model, "get_output_embeddings", lambda: model)()
    try:
        with evaluating(model):
            logits = logits_of(model(torch.tensor([[0, 1, 2], [0, 1, 3]])))
        if head is None or logits.shape[:2] != (2, 3) or logits.ndim != 3:
            reason = "gives no logits of tokens"
        elif torch.allclose(logits[0, :2], logits[1, :2], 1e-3, 1e-4):
            return logits.shape[2]
        else:
            reason = "sees the tokens that it should predict"
    except Exception as error:  # whatever it takes instead
        reason = f"cannot be called with tokens alone ({str(error).partition(chr(10))[0][:200]})"
    what = f"model is {name!r}, a {type(model).__name__}, which {reason}"
    raise ValueError(
        f"{what}: give a causal language model, whose logits (B, T, V) are of the next tokens; "
        "09_pretrained takes encoders, 00_your_model any module"
    )


def _build(name: str, vocab_size: int, settings: dict) -> nn.Module:
    """A model of the kit's."""
    name = NAMES.get(name, name)
    if name in NAMES.values() and name != "ResNetBK":
        settings = {key: value for key, value in settings.items() if key != "experts"}
    return build_model(name, {**settings, "vocab_size": vocab_size})


def _train(model, loaders: Loaders, config: TrainConfig | None, path: Path, log, skeleton) -> dict:
    """Trains a model, if it is to be, and writes it to `path`; returns what Baseline says of it."""
    found = {"history": [], "tokens": 0, "seconds": 0.0}
    if config is not None:
        glance = list(itertools.islice(loaders.validation, VALIDATION_BATCHES))
        options = {"validate": lambda m: evaluate(m, glance).loss, "log": log}
        options |= {"loss": training_loss(model), "checkpoint": path.with_name("checkpoint")}
        done = train(model, loaders.train, config, **options)
        found = {name: getattr(done, name) for name in found}
    if parallel.rank() == 0:
        artifact.save(model, path, layouts=("dense",))
    parallel.agreed(None)
    test = evaluate(artifact.load(path, skeleton).to(device_of(model)), loaders.test)
    return {**found, "test": test, "peak_memory": peak_memory(device_of(model))}
