"""Ideas for more quality in the same bytes, alone and together, against the pipeline's
distillation, on a proxy that takes minutes: 4,000 words of docs, a tied ResNet-BK, one budget,
validation text.

    python -m notebooks.reference.ablation --ideas baseline muon --seeds 0 1
    python -m notebooks.reference.ablation --side  # bytes of docs-100x-0 that are no codes

Runs and dense models are kept in `runs/ablation` and not made again; one that was cut off goes on.
The record, `ablation.json`, has the side information and the trainings that were run. A row of
these: bytes of the file, perplexity and bits per byte of the model from it, and, for an idea, the
paired difference of log perplexity to the baseline of the same seed, with its 95 % interval. On
other tokens, perplexities do not compare: there the difference is of bits per byte, without one.
"""

import argparse
import itertools
import json
import lzma
import math
import re
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from kit import artifact
from kit.artifact.header import SAID, unsealed
from kit.budget import RateLoss, RateSettings, row_sensitivity, set_rate_formats
from kit.budget import rate as rates
from kit.core import range_coder
from kit.core.measurement import tune_process
from kit.core.store import read_json, write_json
from kit.core.weights import copy_model, weights
from kit.data import Corpus, load_corpus, token_loaders
from kit.data.corpus import CORPORA, Texts, register_corpus
from kit.distillation import DistillationTrainer
from kit.lab.records import environment
from kit.models import ResNetBK, ResNetBKConfig
from kit.pipeline import PipelineSettings, arrange_for_coding
from kit.quantization.fake import FakeQuantize
from kit.training import TrainConfig, train
from kit.training.evaluation import Evaluation, evaluate, paired_interval
from kit.training.losses import logits_of, training_loss
from notebooks.reference.baseline import load_or_train

HERE = Path(__file__).resolve().parent
RUNS = HERE.parents[1] / "runs" / "ablation"
RECORD = HERE / "ablation.json"
VOCABULARY, WINDOWS, LENGTH = 4000, 4, 128
SHAPE = {"d_model": 64, "layers": 4, "experts": 4, "dropout": 0.1}
DENSE = {"steps": 1500, "batch_size": 8, "weight_decay": 0.3, "final_lr": 0.0}
STEPS, LR = 300, 4e-3
VALIDATION = 512  # windows
AVERAGED = 0.15  # of a run
CORPUS = "docs"
BUDGET = 40_000  # bytes


@dataclass(frozen=True)
class Idea:
    """What differs from the baseline.

    student: the dense model that is compressed; teachers: those that it learns from.
    muon: for matrices of the body. rated: whether small tensors are under the rate too, or in eight
    bits. above: times the budget that training aims at, where `Chosen` codes take the rest away.
    written: share of each batch that is text which the first teacher wrote, in the second half of
    the run. corpus: the text that both train on.
    """

    student: str = "dense"
    teachers: Sequence[str] = ("dense",)
    muon: str = ""
    rated: bool = False
    above: float | None = None
    written: float = 0.0
    corpus: str = CORPUS


IDEAS = {
    "baseline": Idea(),
    "small": Idea(rated=True),
    "muon": Idea(muon="plain"),
    "normuon": Idea(muon="rows"),
    "ensemble": Idea(teachers=("dense", "dense-1")),
    "wide": Idea(student="wide"),
    "looped": Idea(student="looped"),
    "looped-3": Idea(student="looped-3"),
    "looped-self": Idea(student="looped", teachers=("looped",)),
    "chosen": Idea(above=1.012),
    "chosen-4": Idea(above=1.04),
    "written": Idea(written=0.5),
    "case": Idea(corpus="docs-case"),
    "together": Idea(student="looped", rated=True),
    "all": Idea(student="looped", rated=True, corpus="docs-case"),
}
MODELS = {  # name -> fields that differ from SHAPE
    "dense": {},
    "dense-1": {"seed": 1},
    "wide": {"d_model": 96},
    "looped": {"loops": 2, "layers": 2},
    "looped-3": {"loops": 2, "layers": 3},
}


def main() -> None:
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=list(IDEAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--dense", nargs="*", choices=MODELS, help="train these only")
    parser.add_argument("--side", action="store_true", help="side information only, no training")
    settings = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    if settings.side:
        file = HERE / "docs-100x-0" / "model.kit"
        write_json(RUNS / "side.json", found := side_bytes(file))
        write_json(RUNS / "side.json", {**found, "small tensors": small_tensors(file)})
        settings.ideas = ()
    for name in settings.dense or ():
        dense_model(name, load_corpus(CORPUS, VOCABULARY))
    ideas = settings.ideas if settings.dense is None else ()
    for seed, name in itertools.product(settings.seeds, ideas):
        if not (RUNS / f"{name}-average-{seed}.npz").exists():
            run(name, seed)
    report()


def run(name: str, seed: int) -> None:
    """One compression, and what the models in its files say of the validation text: the last
    weights, and the mean of those of the last AVERAGED steps."""
    start, idea = time.perf_counter(), IDEAS[name]
    corpus = load_corpus(idea.corpus, VOCABULARY)
    student, *teachers = (dense_model(n, corpus) for n in (idea.student, *idea.teachers))
    place = RUNS / f"{name}-{seed}"
    for own, model in compressed(student, teachers, corpus, idea, seed, place):
        file = RUNS / f"{name}{own}-{seed}.kit"
        size = artifact.save(model, file)
        skeleton = copy_model(student) if isinstance(student, Looped) else None
        loaded = artifact.load(file, skeleton, parts=corpus.tokenizer.parts)
        validation = token_loaders(corpus, WINDOWS, LENGTH).validation
        found = evaluate(loaded, itertools.islice(validation, VALIDATION // WINDOWS))
        seconds = time.perf_counter() - start
        print(file.stem, size, found.perplexity, f"{seconds:.0f} s", flush=True)
        np.savez(file.with_suffix(".npz"), bytes=size, seconds=seconds, **vars(found))
    place.with_suffix(".checkpoint").unlink()


def compressed(student, teachers, corpus: Corpus, idea: Idea, seed: int, place: Path):
    """The pipeline's distillation from the dense weights, with what the idea changes; yields the
    model twice, with the last weights and with their mean."""
    torch.manual_seed(seed)
    settings, loader = PipelineSettings(), token_loaders(corpus, WINDOWS, LENGTH).train
    loss, model = training_loss(student), copy_model(student)
    batches = list(itertools.islice(loader, settings.calibration_batches))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    distill = DistillationTrainer(teachers, model, 1.0, settings.alpha, 0.0)
    arrange_for_coding(model, batches, loss, corpus.tokenizer.parts, corpus.token_counts)
    sensitivity = row_sensitivity(model, batches, loss)
    set_rate_formats(model, sensitivity, settings.start * BUDGET, settings.rate)
    if idea.rated:
        for weight in weights(model):
            step, before = weight.find(FakeQuantize), weight.before(FakeQuantize.rank).detach()
            if not step.learned:
                first = settings.rate.first_step
                weight.put(FakeQuantize(before, step.format, step.view, True, first))
    loss = distill
    if idea.written:
        loss = Mixed(distill, written(teachers[0], corpus, seed), idea.written)
    kind, rate_settings = RateLoss, settings.rate
    if idea.above:
        kind, rate_settings = Chosen, replace(settings.rate, aim=idea.above)
    rate = kind(loss, model, BUDGET, batches[:2], rate_settings)
    average = Average(model)
    plain = torch.optim.AdamW
    if idea.muon:
        torch.optim.AdamW = Muon.on(model, idea.muon == "rows")
    config = TrainConfig(STEPS, LR, final_lr=settings.final_lr, seed=seed, eval_every=15)
    hooks = [loss.step] if idea.written else []
    options = {"hooks": (*hooks, distill.step, rate.step, average)}
    options["extra_parameters"] = [*distill.parameters(), *rate.parameters(), *average.sums]
    try:
        checkpoint = place.with_suffix(".checkpoint")
        train(model, loader, config, loss=rate, checkpoint=checkpoint, **options)
    finally:
        torch.optim.AdamW = plain
    rate.finish()
    yield "", model
    average.take()
    rate.finish()
    yield "-average", model


class Chosen(RateLoss):
    """Ends by rate-distortion: codes go a step towards zero, those first whose squared error, times
    the sensitivity of their row, grows least for each bit that the code gets shorter."""

    def finish(self) -> None:
        sensitivity, moves = row_sensitivity(self.model, self.batches, self.loss), []
        for weight, step in self.members:
            kept = weight.before(step.rank).detach().clone()
            codes, scale, _ = step.codes(kept)
            codes, scale, values = codes.float(), step.spread(scale), step.view.matrix(kept)
            lower = codes - codes.sign()
            cost = (values - lower * scale).square() - (values - codes * scale).square()
            cost *= step.spread(rates._block_sensitivity(weight.name, step, sensitivity))
            means = step.blocks(step.view.tensor(codes.abs())).mean(1, keepdim=True)
            bits = -rates.geometric_ratio(means.clamp(min=1e-3)).log2()
            score = (cost / step.spread(bits)).masked_fill(codes == 0, math.inf)
            moves.append((weight, kept, *map(step.view.tensor, (lower * scale, score))))
        ordered = torch.cat([score[score < math.inf] for *_, score in moves]).sort().values
        low, high = 0, len(ordered) - 1 if artifact.nbytes(self.model) > self.file_bytes else 0
        while low < high:
            self._move(moves, ordered[middle := (low + high) // 2])
            fits = artifact.nbytes(self.model) <= self.file_bytes
            low, high = (low, middle) if fits else (middle + 1, high)
        self._move(moves, ordered[low])

    @torch.no_grad()
    def _move(self, moves: list, most: Tensor) -> None:
        for weight, kept, lower, score in moves:
            weight.assign(torch.where(score <= most, lower, kept))


class Mixed:
    """A loss that, in the second half of a run, sees other windows in a share of each batch."""

    def __init__(self, loss, windows: Tensor, share: float):
        self.loss, self.windows, self.share, self.drawn = loss, windows, share, None

    def step(self, step: int, steps: int, model: nn.Module) -> None:
        self.drawn = step if 2 * step >= steps else None

    def __call__(self, model: nn.Module, batch) -> Tensor:
        if self.drawn is not None:
            count = round(self.share * len(batch[0]))
            rows = self.windows[torch.arange(count).add(self.drawn * count) % len(self.windows)]
            new = rows[:, :-1], rows[:, 1:]
            batch = tuple(torch.cat([x[count:], y]) for x, y in zip(batch, new))
        return self.loss(model, batch)


@torch.no_grad()
def written(teacher: nn.Module, corpus: Corpus, seed: int, prompt: int = 8) -> Tensor:
    """What a model writes after the beginnings of windows of the training text: int64 (windows,
    LENGTH + 1), as many as `Mixed` shows once."""
    count = STEPS // 2 * WINDOWS // 2
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(len(corpus.train) - prompt, (count, 1), generator=generator)
    text = torch.from_numpy(corpus.train)[at + torch.arange(prompt)].long()
    while text.shape[1] <= LENGTH:
        last = logits_of(teacher(text))[:, -1].softmax(-1)
        text = torch.cat([text, torch.multinomial(last, 1, generator=generator)], 1)
    return text


@register_corpus("docs-case")
def without_capitals() -> Texts:
    """The docs with words in lower case, after a mark where they had a capital or only those."""
    texts = CORPORA[CORPUS]()
    found = {split: lower(text) for split, text in texts.items()}
    assert all(capitals(found[split]) == texts[split] for split in texts), "the transform loses"
    return found


def lower(text: str) -> str:
    """Words of ASCII letters in lower case; before a word, and the space before it, stands 1 for a
    capital, 2 for capitals. Raises ValueError for a text with these marks."""
    if "\x01" in text or "\x02" in text:
        raise ValueError("The text holds the characters 1 or 2, which mark capitals.")
    words = re.compile(r"( ?)(?<![A-Za-z])([A-Z][a-z]*|[A-Z]{2,})(?![A-Za-z])")
    mark = {True: "\x02", False: "\x01"}
    return words.sub(lambda m: mark[len(m[2]) > 1 and m[2].isupper()] + m[1] + m[2].lower(), text)


def capitals(text: str) -> str:
    """The text that `lower` was given."""
    text = re.sub("\x01( ?)([a-z])", lambda m: m[1] + m[2].upper(), text)
    return re.sub("\x02( ?)([a-z]+)", lambda m: m[1] + m[2].upper(), text)


def text_bytes(corpus: Corpus) -> int:
    """Bytes of the text that VALIDATION windows hold, as it was before `lower`."""
    ids = corpus.validation[1 : VALIDATION * LENGTH + 1]
    return len(capitals(corpus.tokenizer.decode(ids)).encode())


class Average:
    """The mean of all parameters over the last AVERAGED of a run (Polyak)."""

    def __init__(self, model: nn.Module):
        self.of = [p for p in model.parameters() if p.is_floating_point()]
        self.sums = [nn.Parameter(torch.zeros_like(p), requires_grad=False) for p in self.of]

    @torch.no_grad()
    def __call__(self, step: int, steps: int, model: nn.Module) -> None:
        count = step - round((1 - AVERAGED) * steps)
        if count > 0:
            for total, p in zip(self.sums, self.of):
                total.lerp_(p, 1 / count)

    @torch.no_grad()
    def take(self) -> None:
        for total, p in zip(self.sums, self.of):
            p.copy_(total)


class Muon(torch.optim.AdamW):
    """Matrices by orthogonalized momentum (Jordan 2024), sized as AdamW's steps (Liu et al. 2025,
    arXiv:2502.16982); with `rows`, each row by its mean square (NorMuon, arXiv:2510.05491). The
    rest by AdamW."""

    matrices, rows = (), False

    @classmethod
    def on(cls, model: nn.Module, rows: bool) -> type:
        body = [w.original for w in weights(model) if w.name.startswith("layers.")]
        body = {p for p in body if p.ndim > 1 and min(p.shape[-2:]) >= 32}
        return type("MuonOn", (cls,), {"matrices": body, "rows": rows})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in self.matrices & set(group["params"]):
                if p.grad is not None:
                    self._move(p, group["lr"], group["weight_decay"])
                    p.grad = None
        return super().step(closure)

    def _move(self, p: Tensor, lr: float, decay: float) -> None:
        state = self.state[p]
        if not state:  # as AdamW's, for checkpoints
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        moment = state["exp_avg"].lerp_(p.grad, 0.05)
        update = orthogonal(p.grad.lerp(moment, 0.95))
        if self.rows:
            square = update.square().mean(-1, keepdim=True)
            second = state["exp_avg_sq"].lerp_(square.expand_as(p), 0.05)
            update = update / (second / (1 - 0.95 ** state["step"])).sqrt().clamp(min=1e-8)
            update = 0.2 * update / update.square().mean((-2, -1), keepdim=True).sqrt()
        else:
            update = 0.2 * math.sqrt(max(p.shape[-2:])) * update
        p.mul_(1 - lr * decay).sub_(update, alpha=lr)


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrices (..., m, n) with singular values about 1, by Newton-Schulz."""
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if wide else x


class Looped(ResNetBK):
    """Layers that are gone through twice."""

    def body(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return self.norm(x)


def dense_model(name: str, corpus: Corpus) -> nn.Module:
    path = RUNS / f"{name}-{corpus.name}.kit"
    more = dict(MODELS[name])
    loops = more.pop("loops", 1)
    if loops > 1:
        return looped(path, {**SHAPE, **more}, corpus)
    if not path.exists():
        settings = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "tied": True}
        made = load_or_train(corpus=corpus.name, **settings, **DENSE, **{**SHAPE, **more})
        shutil.copy(made.path, path)
    return artifact.load(path)


def looped(path: Path, shape: dict, corpus: Corpus) -> nn.Module:
    config = ResNetBKConfig(**shape, vocab_size=VOCABULARY, tied=True)
    torch.manual_seed(0)
    model = Looped(config)
    if path.exists():
        return artifact.load(path, model)
    options = {"steps": DENSE["steps"], "weight_decay": 0.3, "final_lr": 0.0, "lr": 1e-2}
    loader = token_loaders(corpus, DENSE["batch_size"], LENGTH).train
    train(model, loader, TrainConfig(**options), loss=training_loss(model))
    artifact.save(model, path, layouts=("dense",))
    return model.eval()


def side_bytes(file: Path) -> dict:
    """Bytes of the header and of the codes of scales in a file, in other codings."""
    with open(file, "rb") as opened:
        header = unsealed(opened, file)
        parts = iter([opened.read(n) for entry in header["tensors"] for n in entry["sizes"]])
    text = json.dumps(header, separators=(",", ":")).encode()
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16}]
    pack = zlib.compressobj(9, zdict=SAID)
    sizes = {
        "JSON, zlib": len(zlib.compress(text, 9)),
        "msgpack, zlib": len(zlib.compress(msgspec.msgpack.encode(header), 9)),
        "JSON, LZMA": len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters)),
        "JSON, zlib with a dictionary": len(pack.compress(text) + pack.flush()),
    }
    plain, deltas = 0, 0
    for entry in header["tensors"]:
        own = [next(parts) for _ in entry["sizes"]]
        if "log8" in str(entry.get("steps")):  # its first part: codes of scales, a byte each
            codes = np.frombuffer(own[0], np.uint8).astype(np.int64)
            coded = range_coder.encode(np.diff(codes, prepend=0)[:, None])
            plain, deltas = plain + len(codes), deltas + min(len(codes), len(coded))
    return {"header": sizes, "scales": {"a byte each": plain, "coded differences": deltas}}


def small_tensors(file: Path) -> list[dict]:
    """What coarser steps of tensors under 256 values, by their sensitivity, save and cost in log
    perplexity of validation text, without training."""
    corpus, rows, settings = load_corpus(CORPUS, 30000), [], RateSettings()
    loaders = token_loaders(corpus, 16, LENGTH)
    torch.manual_seed(0)
    batches = list(itertools.islice(loaders.train, 4))
    glance = list(itertools.islice(loaders.validation, 10))
    model = artifact.load(file, trainable=True, parts=corpus.tokenizer.parts)
    before, size = evaluate(model, glance), artifact.nbytes(model)
    small = [w for w in weights(model) if w.original.numel() < settings.small]
    coarse = rates.SMALL_FORMAT
    steps = {w.name: FakeQuantize(w.value.detach(), coarse, w.view, True) for w in small}
    sensitivity = row_sensitivity(model, batches, training_loss(model))
    mean = {w.name: sensitivity[w.name].mean() for w in small}
    largest = max(map(max, sensitivity.values()))
    for power, factor in ((0.5, -9), (0.5, -8), (0.42, -8), (0.42, -7)):
        for weight in small:
            step, relative = steps[weight.name], mean[weight.name] / largest
            finest = weight.original.detach().abs().max() / 127
            step.set_qparams(
                torch.maximum(relative.clamp(min=1e-8) ** -power * 2.0**factor, finest)
            )
            weight.put(step)
        found, bytes_ = evaluate(model, glance), artifact.nbytes(model) - size
        rows.append({"power": power, "factor": 2.0**factor, "bytes": bytes_})
        rows[-1]["difference"] = found.loss - before.loss
        rows[-1]["interval"] = paired_interval(before, found)
        print(rows[-1], flush=True)
    return rows


def evaluation(found: dict) -> Evaluation:
    return Evaluation(**{k: v for k, v in found.items() if k not in ("bytes", "seconds")})


def report() -> None:
    """Writes the record from all runs that are there; rows of others on the same proxy stay."""
    runs = {}
    for file in sorted(RUNS.glob("*.npz")):
        with np.load(file) as found:
            runs[file.stem] = {k: v if v.ndim else v[()] for k, v in found.items()}
    names = {idea.corpus for idea in IDEAS.values()}
    rows, sizes = [], {name: text_bytes(load_corpus(name, VOCABULARY)) for name in names}
    for name, found in runs.items():
        idea, _, seed = name.rpartition("-")
        result, base = evaluation(found), runs.get(f"baseline-{seed}")
        row = {"idea": idea, "seed": int(seed), "perplexity": result.perplexity}
        row |= {key: found[key].item() for key in ("bytes", "seconds")}
        corpus = IDEAS[idea.removesuffix("-average")].corpus
        row["bits_per_byte"] = result.bits_per_byte(sizes[corpus])
        if base is not None and idea != "baseline":
            before = evaluation(base)
            if corpus == CORPUS:
                row["difference"] = result.loss - before.loss
                row["interval"] = paired_interval(before, result)
            else:
                bits = before.bits_per_byte(sizes[CORPUS])
                row["difference"] = before.loss * (row["bits_per_byte"] / bits - 1)
        rows.append(row)
    proxy = {"corpus": "docs", "vocab_size": VOCABULARY, "shape": SHAPE, "dense": DENSE}
    proxy |= {"steps": STEPS, "windows": WINDOWS, "lr": LR, "budget": BUDGET}
    side, known = RUNS / "side.json", read_json(RECORD)
    found = {"side": read_json(side) if side.exists() else known["side"]}
    if proxy == known["proxy"]:
        made = {(row["idea"], row["seed"]) for row in rows}
        rows = [row for row in known["rows"] if (row["idea"], row["seed"]) not in made] + rows
        rows.sort(key=lambda row: (row["idea"], row["seed"]))
    write_json(RECORD, {**environment(), "proxy": proxy, "rows": rows, **found})
    for row in rows:
        print({k: v for k, v in row.items() if k != "seconds"})


if __name__ == "__main__":
    main()
