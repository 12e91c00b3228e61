"""Everything that the kit reads: honest files, how each is mutated, and what must come of it."""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import struct
import tempfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kit import artifact
from kit.artifact.file import serialized
from kit.artifact.header import SAID
from kit.artifact.model import buffers_of
from kit.core import ans, range_coder
from kit.core.weights import copy_model, weights
from kit.data import load_corpus
from kit.distillation.cache import TeacherCache, build_cache
from kit.engines.quantized import QuantizedModel, quantize
from kit.lab import batches
from kit.lab.records import read_results, read_stages, write_result
from kit.lab.runs import plan
from kit.models import build_model, recipe
from kit.pruning import MagnitudePruner
from kit.pruning.mask import set_mask
from kit.quantization import Format, calibrate, quantize_bk_core, quantize_weights
from kit.quantization.column_scale import ColumnScale
from kit.quantization.token_tables import compose_tables, order_rows
from kit.training import TrainConfig, train
from kit.training.checkpoint import _seal
from kit.training.losses import next_token_loss
from tests.fuzz.mutations import mutated_bytes, mutated_json, text_of

DATA = Path(__file__).parents[1] / "data"
V = 64
TOKENS = torch.randint(0, V, (4, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [(part[:, :-1], part[:, 1:]) for part in (TOKENS[:2], TOKENS[2:])]
PARTS = np.full((V, 2), -1, np.int32)
PARTS[32:] = np.arange(64).reshape(32, 2) // 2
COUNTS = np.random.default_rng(0).integers(1, 10000, V)


class Contradiction(Exception):
    """What was loaded is not what its file says of itself."""


@dataclass
class Base:
    """An honest file, or several, and what a reader needs besides."""

    name: str
    files: dict[str, bytes]
    extra: dict = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        return next(iter(self.files.values()))


class Reader:
    """`write` puts a mutant (kind None: the honest file) into a folder; `read` gives "equal" or
    "other", or raises one of `errors` in one sentence, or Contradiction."""

    name: str
    kinds: tuple[str, ...] = ("bytes",)
    errors: tuple[type, ...] = (ValueError, OSError)

    @cached_property
    def bases(self) -> list[Base]:
        raise NotImplementedError

    def mutant(self, name: str, data: bytes, kind: str, rng: random.Random) -> bytes:
        """The bytes of one file of a base; `kind` is one of `kinds`."""
        if kind == "json":
            return text_of(mutated_json(json.loads(data), rng)).encode()
        return mutated_bytes(data, rng)

    def write(self, folder: Path, base: Base, kind: str | None, rng: random.Random) -> None:
        for name, data in base.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        if kind is not None:
            names = [n for n in base.files if kind != "json" or n.endswith((".json", ".ipynb"))]
            name = rng.choice(names)
            (folder / name).write_bytes(self.mutant(name, base.files[name], kind, rng))

    def read(self, folder: Path, base: Base) -> str:
        raise NotImplementedError


# Artifacts


def lm(kind="ResNetBK", **shape):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "d_model": 16, "layers": 1, "d_ff": 12}
    if kind == "ResNetBK":
        sizes |= {"channels": 6, "experts": 2}
    if kind == "LSTMLM":
        del sizes["d_ff"]
        sizes["hidden"] = 6
    return build_model(kind, {**sizes, **shape}).eval()


class Scaled(nn.Module):
    """Anybody's module: several dtypes, a tied weight, buffers with infinities, extra state."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.short = nn.Parameter(torch.randn(4, 3).half())
        self.wide = nn.Parameter(torch.randn(3).double())
        self.register_buffer("causal", torch.full((3, 3), -math.inf).triu(1))
        self.register_buffer("phase", torch.randn(4, dtype=torch.complex64))
        self.register_buffer("mask", torch.tensor([[True, False], [False, True]]))
        self.register_buffer("count", torch.tensor(7))
        self.conv, self.cell = nn.ConvTranspose2d(2, 4, 3, groups=2), nn.GRU(3, 4)
        self.scale = {"by": 2.0, "names": ["a"]}

    def get_extra_state(self):
        return self.scale

    def set_extra_state(self, state):
        self.scale = {"by": float(state["by"]), "names": [str(n) for n in state["names"]]}


def scaled():
    torch.manual_seed(1)
    return Scaled().eval()


FORMATS = [
    Format(8), Format(6, False, "tensor"), Format(5, False), Format(16),
    Format(4, granularity="group", group_size=10), Format(3, False, "group", 7, scale="log8"),
    Format(2, granularity="rows", group_size=5, range="mse"), Format("ternary", range="mse"),
    Format(8, scale="float32"), Format(4, range="percentile"),
]  # fmt: skip


def masked(model):
    MagnitudePruner(model, "*").prune(0.6)
    return model


def explicit(model):
    """Masks that zero codes do not tell."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            set_mask(module, "weight", torch.rand(module.weight.shape) > 0.3)
    return quantize_weights(model, Format(2, granularity="tensor"))


def tables(model):
    compose_tables(model, PARTS, BATCHES, next_token_loss)
    order_rows(model, COUNTS)
    return quantize_weights(model, Format(4, granularity="rows", group_size=4, scale="log8"), True)


def models() -> dict:
    """The models of the bases: name -> (model, layouts, blank to fill or None)."""
    made, every = {}, tuple(artifact.LAYOUTS)
    for i, format in enumerate(FORMATS):
        tied, layout = i % 2 == 1, every[i % 5]
        made[f"{format.bits}-{format.granularity}-{layout}"] = (
            masked(quantize_weights(lm(tied=tied, layers=1 + i % 2), format)),
            ("dense", layout), None,
        )  # fmt: skip
    for layout in every:
        made[f"float-{layout}"] = masked(lm("TransformerLM", heads=2)), ("dense", layout), None
        made[f"int8-{layout}"] = quantize_weights(lm("LSTMLM"), Format(8)), (layout,), None
    made["masks"] = explicit(lm("LSTMLM", tied=True)), every, None
    made["factored"] = quantize_weights(lm(embedding_rank=4), Format(6)), every, None
    made["learned"] = quantize_weights(lm("TransformerLM", heads=2), Format(4), True), every, None
    made["tables"] = tables(lm()), every, None
    made["tied tables"] = tables(lm(tied=True)), every, None
    made["order"] = order_rows(lm("LSTMLM"), COUNTS), every, None
    for mode in ("separate", "joint", "polar"):
        core = quantize_bk_core(lm(), per_channel=mode == "joint", mode=mode)
        made[f"core {mode}"] = calibrate(core, BATCHES), every, None
    made["not calibrated"] = quantize_bk_core(lm()), every, None
    torch.manual_seed(0)
    made["cnn"] = build_model("DigitsCNN", {"channels": (3, 4)}).eval(), every, None
    mlp = build_model("DigitsMLP", {"hidden": (8, 6)}).eval()
    scales = quantize_weights(lm("LSTMLM"), Format(4, granularity="tensor"))
    for weight in weights(scales, matrices=True):
        columns = torch.rand(weight.view.columns) + 0.5
        weight.put(ColumnScale.nearest(columns, weight.view))
    made["column scales"] = scales, every, None
    made["mlp"] = masked(quantize_weights(mlp, Format(3))), every, None
    made["anybody's"] = scaled(), every, scaled
    formats = {"linear.*": Format(4), "conv.weight": Format(8), "cell.weight_*": Format(3)}
    made["anybody's rounded"] = quantize_weights(scaled(), formats), every, scaled
    return made


def opened(data: bytes) -> tuple[bytes, dict, list[bytes]]:
    """Magic, header and blobs of an honest file."""
    end = 8 + struct.unpack("<I", data[4:8])[0]
    header, blobs = json.loads(zlib.decompressobj(zdict=SAID).decompress(data[8:end])), []
    for entry in header["tensors"]:
        for size in entry["sizes"]:
            blobs.append(data[end : end + size])
            end += size
    return data[:4], header, blobs


def closed(magic: bytes, text: bytes, blobs: list[bytes], packed: bytes | None = None) -> bytes:
    packed = zlib.compress(text) if packed is None else packed
    body = magic + struct.pack("<I", len(packed)) + packed + b"".join(blobs)
    return body + hashlib.sha256(body).digest()


def resized(header: dict, blobs: list[bytes]) -> dict:
    """The header with the sizes that the blobs have."""
    sizes = iter([len(blob) for blob in blobs])
    for entry in header["tensors"]:
        entry["sizes"] = [next(sizes) for _ in entry["sizes"]]
    return header


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {weight.name: weight.value.detach() for weight in weights(model)}
    return found | {f"buffer {name}": buffer for name, buffer in buffers_of(model)}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape
        and torch.equal(raw(a[n]), raw(b[n]))
        for n in a
    )  # fmt: skip


class Artifact(Reader):
    name = "artifact"
    kinds = ("raw", "sealed bytes", "header", "header", "header", "stream", "stream", "frame")
    errors = (artifact.ArtifactError,)

    @cached_property
    def bases(self):
        found = []
        for name, (model, layouts, blank) in models().items():
            data = b"".join(serialized(model, layouts))
            extra = {"blank": blank, "state": state_of(model)}
            found.append(Base(name, {"a.kit": data}, extra))
        before = np.load(DATA / "kit3.npz")
        for name in ("tables", "formats"):
            file = DATA / f"kit3_{name}.kit"
            data, state = file.read_bytes(), state_of(artifact.load(file, parts=before["parts"]))
            extra = {"blank": None, "parts": before["parts"], "state": state}
            found.append(Base(f"KIT3 {name}", {"a.kit": data}, extra))
        return found

    def mutant(self, name, data, kind, rng):
        if kind == "raw":
            return mutated_bytes(data, rng)
        magic, header, blobs = opened(data)
        text = json.dumps(header).encode()
        if kind == "header":
            return closed(magic, text_of(mutated_json(header, rng)).encode(), blobs)
        if kind == "sealed bytes":
            body = mutated_bytes(data[:-32], rng)
            return body + hashlib.sha256(body).digest()
        if kind == "stream":
            for _ in range(rng.choice([1, 1, 2])):
                at = rng.randrange(len(blobs))
                blob = blobs[at]
                blobs[at] = rng.choice([
                    lambda: mutated_bytes(blob, rng), lambda: mutated_bytes(blob, rng),
                    lambda: rng.randbytes(len(blob)), lambda: rng.randbytes(rng.randrange(300)),
                    lambda: bytes(len(blob)), lambda: b"\xff" * len(blob), lambda: b"",
                    lambda: blobs[rng.randrange(len(blobs))], lambda: blob[: len(blob) // 2],
                    lambda: struct.pack("<I", rng.choice([0, 1, 2**20, 2**32 - 1])) + blob[4:],
                ])()  # fmt: skip
            header = resized(header, blobs)
            if rng.random() < 0.2:
                entry = rng.choice(header["tensors"])
                entry["in"] = "".join(rng.choice("dbgei") for _ in entry["sizes"])
            return closed(magic, json.dumps(header).encode(), blobs)
        return rng.choice([
            lambda: closed(magic, text, blobs[:-1]),
            lambda: closed(magic, text, [*blobs, b"more"]),
            lambda: closed(magic, text[: rng.randrange(len(text))], blobs),
            lambda: closed(magic, text + rng.randbytes(5), blobs),
            lambda: closed(magic, mutated_bytes(text, rng), blobs),
            lambda: closed(magic, b"", blobs, mutated_bytes(zlib.compress(text), rng)),
            lambda: closed(magic, b"", blobs, zlib.compress(text)[: rng.randrange(40)]),
            lambda: closed(magic, b"", blobs, zlib.compress(text) + b"more"),
            lambda: closed(magic, b" " * 2**22 + text, blobs),
            lambda: closed(magic, b"[" * 10**6, blobs),
            lambda: closed(rng.choice([b"KIT1", b"KIT2", b"KIT3", b"KIT4", b"KIT5"]), text, blobs),
            lambda: closed(magic, text, blobs)[: rng.randrange(200)],
            lambda: magic + struct.pack("<I", rng.choice([0, 2**31, 2**32 - 1])) + data[8:-32],
        ])()  # fmt: skip

    def load(self, path, base, trainable):
        blank, parts = base.extra["blank"], base.extra.get("parts", PARTS)
        return artifact.load(path, blank and blank(), trainable, parts=parts)

    def read(self, folder, base):
        path, error = folder / "a.kit", None
        try:
            model = self.load(path, base, False)
        except artifact.ArtifactError as caught:
            if path.stat().st_size % 4:  # a quarter of what is refused is asked the other ways too
                raise
            error = caught
        with contextlib.suppress(artifact.ArtifactError):
            artifact.describe(path)
        try:
            trainable = self.load(path, base, True)
        except artifact.ArtifactError as other:
            if error is None:
                raise Contradiction(f"it loads, but not to be trained on: {other}") from None
            raise
        if error is not None:
            raise Contradiction(f"it loads only to be trained on: {error}")
        state = state_of(model)
        if not same(state, state_of(trainable)):
            raise Contradiction("what is trained on computes something else")
        if same(state, base.extra["state"]):
            return "equal"
        for name, tensor in state.items():
            held = base.extra["state"].get(name, tensor)
            fine = torch.isfinite(tensor) if tensor.shape != held.shape else (
                torch.isfinite(tensor) | (tensor == held) | ~torch.isfinite(held))  # fmt: skip
            if not fine.all():
                raise Contradiction(f"{name} is not finite")
        self.compare_headers(opened(path.read_bytes()), trainable)
        again = folder / "again.kit"
        again.write_bytes(b"".join(serialized(trainable)))
        if not same(state_of(self.load(again, base, False)), state):
            raise Contradiction("saved again it is something else")
        return "other"

    def compare_headers(self, file, model):
        magic, stated, _ = file
        ours = recipe(model)
        if stated["model"] is not None and ours is not None:
            config = json.loads(json.dumps(ours["config"]))
            for name, value in stated["model"]["config"].items():
                if config[name] != value:
                    raise Contradiction(f"its config has {name}={value}, the model {config[name]}")
        if magic != b"KIT4":
            return
        _, saved, _ = opened(b"".join(serialized(model)))
        if stated["modules"] != saved["modules"]:
            raise Contradiction(f"its modules are {stated['modules']}")
        if stated.get("extra", {}) != saved.get("extra", {}):
            raise Contradiction(f"its extra state is {stated.get('extra')}")
        theirs = {entry["name"]: entry for entry in saved["tensors"]}
        for entry in stated["tensors"]:
            other = theirs[entry["name"]]
            for key, usual in (("shape", None), ("dtype", "float32")):
                if entry.get(key, usual) not in (None, other.get(key, usual)):
                    raise Contradiction(f"{entry['name']} has {key} {entry.get(key)}")
            for (kind, mine), (known, theirs_) in zip(
                entry.get("steps", []), other.get("steps", []), strict=True
            ):
                if kind == known == "fake_quantize":
                    for key, usual in (("format", {}), ("rows", 0), ("learned", 0)):
                        if mine.get(key, usual) != theirs_.get(key, usual):
                            raise Contradiction(f"{entry['name']} has {key} {mine.get(key)}")
                elif kind != known and "=" not in (kind, known):
                    raise Contradiction(f"{entry['name']} has a step {kind}")


class Quantized(Artifact):
    """`QuantizedModel.load`: the artifact of a rounded network with calibrated inputs."""

    name = "quantized"

    @cached_property
    def bases(self):
        found = []
        for calibrated in (False, True):
            torch.manual_seed(0)
            blank = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
            model = quantize(blank, calibration=[torch.randn(4, 6)] if calibrated else None)
            data, copied = b"".join(serialized(model.model)), copy_model(blank)
            extra = {"blank": copied, "state": state_of(model.model)}
            found.append(Base(f"calibrated {calibrated}", {"a.kit": data}, extra))
        return found

    def read(self, folder, base):
        loaded = QuantizedModel.load(folder / "a.kit", base.extra["blank"])
        state = state_of(loaded.model)
        with contextlib.suppress(ValueError):  # of a range that no calibration gave
            out = loaded.model(torch.ones(2, 6))
            if not out.isfinite().all():
                raise Contradiction("its outputs are not finite")
        return "equal" if same(state, base.extra["state"]) else "other"


class Coder(Reader):
    """The two coders by themselves."""

    name, errors = "coder", (ValueError,)
    kinds = ("bytes", "bytes", "noise", "shape")

    @cached_property
    def bases(self):
        rng, found = np.random.default_rng(0), []
        for spread, shape in ((0.05, (30, 40)), (1.0, (9, 50)), (40.0, (20, 3)), (1e8, (5, 5))):
            codes = np.round(rng.laplace(scale=spread, size=shape)).astype(np.int64)
            codes[-1, -1] = 1  # or zeros at the end, which take no bytes
            for coder in (range_coder, ans) if spread < 1e8 else (range_coder,):
                extra = {"codes": codes, "coder": coder}
                found.append(Base(f"{coder.__name__} {spread}", {"f": coder.encode(codes)}, extra))
        return found

    def write(self, folder, base, kind, rng):
        self.shape, data = base.extra["codes"].shape, base.data
        if kind == "shape":
            self.shape = rng.choice([(0, 0), (1, 1), (1, 300), (300, 1), (7, 11), self.shape[::-1]])
        if kind == "bytes":
            data = mutated_bytes(data, rng)
        elif kind == "noise":
            data = rng.randbytes(rng.randrange(2 * len(data)))
        (folder / "f").write_bytes(data)

    def read(self, folder, base):
        data, coder = (folder / "f").read_bytes(), base.extra["coder"]
        codes = coder.decode(data, self.shape)
        if coder is range_coder and coder.encode(codes) != data.rstrip(b"\0"):
            raise Contradiction("the encoder writes other bytes for what was read")
        return "equal" if np.array_equal(codes, base.extra["codes"]) else "other"


# Training


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 5), nn.Dropout(0.1), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


def rows():
    x = torch.arange(72.0).reshape(12, 6).sin()
    return DataLoader(TensorDataset(x, torch.arange(12) % 3), 4, shuffle=True)


def squared(model, batch):
    return model(batch[0]).square().mean()


class Checkpoint(Reader):
    name = "checkpoint"
    kinds = ("raw", "sealed numbers", "sealed tensors", "sealed tensors")
    CONFIG = TrainConfig(steps=4, eval_every=2)

    def trained(self, path, steps=None):
        torch.manual_seed(0)
        model, seen = Net(), []

        def stop(step, steps_, _):
            seen.append(step)
            if steps is not None and step > steps:
                raise KeyboardInterrupt

        options = {"loss": squared, "validate": lambda m: 1.0, "log": False, "hooks": [stop]}
        with contextlib.suppress(KeyboardInterrupt):
            train(model, rows(), self.CONFIG, checkpoint=path, **options)
        if len(seen) > self.CONFIG.steps:
            raise Contradiction(f"{len(seen)} steps were trained")
        return state_of(model)

    @cached_property
    def bases(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "c"
            self.trained(path, 2)
            data = path.read_bytes()
            return [Base("toy", {"c": data}, {"state": self.trained(path)})]

    def mutant(self, name, data, kind, rng):
        if kind == "raw":
            return mutated_bytes(data, rng)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "c"
            path.write_bytes(data)
            with safe_open(path, framework="pt") as file:
                text = file.metadata()["kit.training"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if kind == "sealed numbers":
                text = text_of(mutated_json(json.loads(text), rng))
            for _ in range(rng.choice([1, 1, 2]) if kind == "sealed tensors" else 0):
                at = rng.choice(list(tensors))
                old = tensors[at]
                flat = old.reshape(-1)
                floats = old.is_floating_point()
                noise = np.frombuffer(rng.randbytes(old.numel() * old.itemsize), np.uint8).copy()
                tensors[at] = rng.choice([
                    lambda: old.double(), lambda: old.half(), lambda: old[None], lambda: flat[:-1],
                    lambda: torch.full_like(old, math.nan if floats else 255), lambda: flat[:0],
                    lambda: torch.full_like(old, 1e30 if floats else 0), lambda: -old,
                    lambda: old.to(torch.int64), lambda: tensors[rng.choice(list(tensors))],
                    lambda: torch.from_numpy(noise).view(old.dtype).reshape(old.shape),
                ])()  # fmt: skip
                if rng.random() < 0.2:
                    tensors[rng.choice(["x", "model/x", "optimizer/x/step", at + "x"])] = old
                if rng.random() < 0.2:
                    del tensors[at]
            tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
            save_file(
                tensors, path, metadata={"kit.training": text, "kit.seal": _seal(tensors, text)}
            )
            return path.read_bytes()

    def read(self, folder, base):
        return "equal" if same(self.trained(folder / "c"), base.extra["state"]) else "other"


class Cache(Reader):
    name = "teacher cache"
    kinds = ("raw", "json", "arrays")

    @cached_property
    def bases(self):
        data = TensorDataset(TOKENS[:, :-1], TOKENS[:, 1:])
        loader = DataLoader(data, 2)
        with tempfile.TemporaryDirectory() as folder:
            cache = build_cache(lm("LSTMLM"), loader, Path(folder) / "cache", k=5)
            files = {f"cache/{f.name}": f.read_bytes() for f in sorted(cache.path.iterdir())}
            extra = {"loader": loader, "seen": self.seen(cache, loader)}
            return [Base("tokens", files, extra)]

    def seen(self, cache, loader):
        found = [batch.soft for batch in cache.wrap(loader)]
        return {f"{i} {name}": t for i, soft in enumerate(found) for name, t in zip("il", soft)}

    def write(self, folder, base, kind, rng):
        super().write(folder, base, None if kind == "arrays" else kind, rng)
        if kind == "arrays":
            name = rng.choice([n for n in base.files if n.endswith(".npy")])
            array = np.load(folder / name)
            other = -1 if array.dtype.kind == "f" else 64
            array = rng.choice([
                lambda: array.astype(np.int64), lambda: array.astype(np.float32),
                lambda: array[:-1], lambda: array[..., :-1], lambda: array.reshape(-1),
                lambda: array[None], lambda: np.full_like(array, 65000), lambda: array + other,
                lambda: np.full(array.shape, np.inf).astype(array.dtype), lambda: np.float16(3),
                lambda: array[:, ::-1].copy(), lambda: np.asfortranarray(array),
                lambda: np.array({"a": 1}, object),
            ])()  # fmt: skip
            np.save(folder / name, array, allow_pickle=True)

    def read(self, folder, base):
        cache, loader = TeacherCache(folder / "cache"), base.extra["loader"]
        seen = self.seen(cache, loader)
        for name, tensor in seen.items():
            if name.endswith("i") and not 0 <= tensor.min() <= tensor.max() < cache.vocabulary:
                raise Contradiction("a class that is none")
            if name.endswith("l") and not torch.allclose(tensor.exp().sum(-1), torch.ones(())):
                raise Contradiction("probabilities that do not sum to one")
        return "equal" if same(seen, base.extra["seen"]) else "other"


# Text


class Records(Reader):
    name, kinds = "record", ("bytes", "json", "json", "json")

    @cached_property
    def bases(self):
        stage = {"name": "quantize", "seconds": 2.0, "bytes": 10, "perplexity": 3.5}
        record = {"notebook": "05", "parameters": {"steps": 3, "vocab_size": 512}, "seed": 0,
                  "corpus": {"name": "docs", "sha256": "aa"}, "stages": [stage, stage],
                  "bytes": 10, "perplexity": 3.5, "low": 3.4, "high": 3.6}  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            data = write_result(folder, record).read_bytes()
            return [Base("05", {"run/result.json": data}, {"said": self.said(Path(folder))})]

    def said(self, folder):
        tables = [read_results(folder), read_stages(folder)]
        return [table.drop(columns="run").to_json() for table in tables]

    def read(self, folder, base):
        return "equal" if self.said(folder) == base.extra["said"] else "other"


class Text(Reader):
    name = "text"
    WORDS = "der die das und nicht über straße naïve 東京 𝛼 tensor matrix weight bias layer".split()

    @cached_property
    def bases(self):
        rng = random.Random(0)
        text = "".join(f"{' '.join(rng.choices(self.WORDS, k=6))}.\n" for _ in range(60))
        return [Base("words", {"text.txt": text.encode(), "other.txt": text.encode()})]

    def read(self, folder, base):
        os.environ["KIT_CACHE"] = str(folder / "cache")
        try:
            corpus = load_corpus(f"text:{folder}", 300)
        finally:
            shutil.rmtree(folder / "cache", ignore_errors=True)
        files = [
            (folder / name).read_bytes().decode("utf-8-sig") for name in ("other.txt", "text.txt")
        ]
        told = [
            corpus.tokenizer.decode(getattr(corpus, s)) for s in ("train", "validation", "test")
        ]
        lines = ["\n".join(re.split("\r\n|\r|\n", text)) for text in files]
        lines = [text if text.endswith("\n") else text + "\n" for text in lines]
        if sum(map(len, told)) != sum(map(len, lines)):
            raise Contradiction("the splits are not all of the text")
        honest = [base.files[name].decode() for name in ("other.txt", "text.txt")]
        return "equal" if files == honest else "other"


class Tokens(Reader):
    """The cache of a corpus' tokens, which is made again when it does not fit."""

    name = "token cache"

    @cached_property
    def bases(self):
        self.texts = {name: data for base in Text().bases for name, data in base.files.items()}
        with tempfile.TemporaryDirectory() as folder:
            corpus = self.corpus(Path(folder))
            (path,) = Path(folder).rglob("*.tokens")
            name = str(path.relative_to(folder))
            return [Base("words", {name: path.read_bytes()}, {"tokens": corpus.train})]

    def corpus(self, folder):
        for name, data in self.texts.items():
            (folder / name).write_bytes(data)
        os.environ["KIT_CACHE"] = str(folder / "cache")
        return load_corpus(f"text:{folder}", 300)

    def read(self, folder, base):
        if not np.array_equal(self.corpus(folder).train, base.extra["tokens"]):
            raise Contradiction("other tokens")
        return "equal"


NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["# A run"]},
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "outputs": [],
         "source": ["out = 'runs/x'\n", "steps = 3\n", "lr = 1e-3\n", "seed = 0\n"]},
        {"cell_type": "code", "metadata": {}, "outputs": [], "source": ["print(steps)\n"]},
    ],
    "metadata": {"kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5,
}  # fmt: skip
GRID = {"grid": {"steps": [3, 4], "lr": [0.1, 0.2]}, "seeds": [0, 1]}


class Batch(Reader):
    """A grid, the notebook that it is for, and the status of a run."""

    name, kinds = "batch", ("bytes", "json", "yaml")

    @cached_property
    def bases(self):
        files = {
            "n.ipynb": json.dumps(NOTEBOOK).encode(),
            "grid.yaml": yaml.safe_dump(GRID).encode(),
        }
        run = "status.json"
        status = {"exit_code": 0, "pid": 1, "started": 3.5}
        return [Base("grid", files), Base("status", {**files, run: json.dumps(status).encode()})]

    def write(self, folder, base, kind, rng):
        super().write(folder, base, None, rng)
        if kind == "yaml":
            grid = mutated_json(GRID, rng)
            text = yaml.safe_dump(grid) if rng.random() < 0.5 else text_of(grid)
            (folder / "grid.yaml").write_bytes(text.encode())
        elif base.name == "status" and kind is not None:
            self.mutate(folder / "status.json", kind, rng)
        elif kind is not None:
            super().write(folder, base, kind, rng)

    def mutate(self, path, kind, rng):
        path.write_bytes(self.mutant(path.name, path.read_bytes(), kind, rng))

    def read(self, folder, base):
        runs = plan(
            folder / "n.ipynb", **batches._read(folder / "grid.yaml"), folder=folder / "runs"
        )
        if base.name == "status":
            place = runs[0].folder
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "status.json", place / "status.json")
            try:
                runs[0].state()
            finally:
                shutil.rmtree(folder / "runs", ignore_errors=True)
        return "equal" if len(runs) == 8 else "other"


READERS = (Artifact, Quantized, Coder, Checkpoint, Cache, Records, Text, Tokens, Batch)
