"""A teacher's targets on disk: k probabilities a token, so the teacher need not run again.

A cache is a folder of NumPy arrays and a header; it belongs to one dataset, temperature and
vocabulary. The k largest probabilities would say nothing about the rest, a quarter of the mass for
a small teacher: likely tokens are kept and a sample stands for the others (Anshumann et al. 2025).
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kit.core.protocols import Call, adapt, call_of, device_of, tensors_of
from kit.core.settings import Count, Positive, Seed, checks
from kit.core.store import digest, lock, read_json, write_json
from kit.core.weights import is_finite
from kit.distillation.divergences import soft_targets
from kit.distillation.objective import SparseTarget, output_of
from kit.training.losses import FUNCTION_BLOCK

ARRAYS = ("indices", "log_p")
SIZED = ("__len__", "__getitem__")
ROWS = 256  # of a batch, where the loader has no size of its own
KINDS = {"made_by": str, "inputs": str, "temperature": float, "sampled": float, "rounding": float}
KINDS |= dict.fromkeys(("k", "vocabulary", "examples"), Annotated[int, msgspec.Meta(ge=1)])
Header = msgspec.defstruct("Header", KINDS.items(), forbid_unknown_fields=True)


@dataclass(frozen=True)
class CachedCall(Call):
    """A batch with the teacher's targets of its examples."""

    soft: SparseTarget | None = None


class TeacherCache:
    """An opened cache: `cache[rows]` is the `SparseTarget` of examples, `wrap` adds it to batches.

    Attributes: temperature, k, vocabulary, examples, inputs (their digest), made_by (of teachers
    and settings), sampled (the mean probability that a sample stands for), rounding (the largest
    error of a stored probability).
    """

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError without a cache at `path`, ValueError when it is damaged."""
        self.path = Path(path)
        if not (self.path / "cache.json").exists():
            raise FileNotFoundError(f"no teacher cache at {self.path}: make one with build_cache")
        try:
            header = read_json(self.path / "cache.json", Header)
            vars(self).update(msgspec.structs.asdict(header))
            files = {name: self.path / f"{name}.npy" for name in ARRAYS}
            self.arrays = {n: np.lib.format.open_memmap(f, mode="r") for n, f in files.items()}
            indices, log_p = (self.arrays[name] for name in ARRAYS)
            kind = np.uint16 if self.vocabulary <= 2**16 else np.uint32
            if indices.dtype != kind or log_p.dtype != np.float16:
                raise ValueError(f"its arrays are {indices.dtype} and {log_p.dtype}")
            ends = self.examples, self.k
            if indices.shape != log_p.shape or (indices.shape[0], indices.shape[-1]) != ends:
                raise ValueError(f"its arrays are {indices.shape} and {log_p.shape}, not {ends}")
        except Exception as error:  # NumPy's parser of headers raises whatever Python's own does
            what = f"the teacher cache at {self.path} is damaged ({error})"
            raise ValueError(f"{what}: build it again") from error

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.iterdir())

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, rows: Sequence[int]) -> SparseTarget:
        """Targets of examples `rows`; their probabilities sum to 1. Raises ValueError for targets
        that are damaged."""
        found = (torch.from_numpy(self.arrays[name][np.asarray(rows)]) for name in ARRAYS)
        indices, log_p = (x.to(kind) for x, kind in zip(found, (torch.int64, torch.float32)))
        if indices.numel() and indices.max() >= self.vocabulary or not log_p.isfinite().all():
            what = f"the teacher cache at {self.path} holds classes or probabilities that are none"
            raise ValueError(f"{what}: build it again")
        return SparseTarget(indices, log_p.log_softmax(-1))

    def wrap(self, loader: DataLoader) -> DataLoader:
        """The same batches in the same order, as `CachedCall`s.

        Raises ValueError when the loader's dataset is not the one the cache was built on.
        """
        examples = len(loader.dataset)
        if examples != self.examples or _inputs_digest(loader) != self.inputs:
            what = f"the teacher cache at {self.path} was built on another dataset"
            raise ValueError(f"{what}: build one for this loader's {examples} examples")
        data, sampler = _Cached(loader, self), loader.batch_sampler
        return DataLoader(data, batch_sampler=sampler, collate_fn=lambda batch: batch)


class _Cached(Dataset):
    def __init__(self, loader: DataLoader, cache: TeacherCache):
        self.loader, self.cache = loader, cache

    def __len__(self):
        return len(self.cache)

    def __getitems__(self, rows):
        return CachedCall(**vars(call_of(_fetch(self.loader, rows))), soft=self.cache[rows])


def _fetch(loader: DataLoader, rows: Sequence[int]):
    """The batch of some examples of the loader's dataset."""
    dataset = loader.dataset
    many = hasattr(dataset, "__getitems__")
    return loader.collate_fn(dataset.__getitems__(rows) if many else [dataset[i] for i in rows])


def _calls(loader: DataLoader, size: int) -> Iterator[Call]:
    """Every example once, in the dataset's order."""
    for rows in torch.arange(len(loader.dataset)).split(size):
        yield call_of(_fetch(loader, rows.tolist()))


def _inputs_digest(loader: DataLoader) -> str:
    name = ""
    for call in _calls(loader, ROWS):  # whatever the loader's batch size
        name = digest(name, tensors_of([call.args, call.kwargs]))
    return name


@checks
@torch.no_grad()
def build_cache(
    teacher: nn.Module | Sequence[nn.Module], loader: DataLoader, path: str | Path, k: Count = 64,
    temperature: Positive = 2.0, seed: Seed = 0,
) -> TeacherCache:  # fmt: skip
    """Runs the teacher (or several, for their mean) over `loader.dataset` once and keeps `sparse`
    targets: 4k bytes a token (6k beyond 65,536 classes).

    The folder appears when it is complete, in place of one that exists. Of processes that build the
    same at once, one does and the others wait for it. Raises ValueError for k or temperature out of
    range and teachers in training mode.
    """
    if not all(hasattr(getattr(loader, "dataset", None), name) for name in SIZED):
        what = f"a {type(loader).__name__} has no data set of a known length"
        raise ValueError(f"{what}: give a DataLoader over one")
    teachers = [teacher] if isinstance(teacher, nn.Module) else teacher
    teachers = [adapt(model) for model in teachers]
    check_evaluating(teachers)
    path, made_by = Path(path), digest(teachers, k, temperature, seed)
    work, before = path.with_name(path.name + ".partial"), _changed(path)
    with lock(path):
        if _changed(path) != before:  # while this process waited
            cache = TeacherCache(path)
            if (cache.made_by, cache.inputs) == (made_by, _inputs_digest(loader)):
                return cache
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        header = _fill(work, teachers, loader, k, temperature, seed)
        header |= {"made_by": made_by, "k": k, "temperature": temperature}
        write_json(work / "cache.json", header)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(work, path)
        return TeacherCache(path)


def _changed(path: Path) -> int | None:
    """When the cache at `path` was completed."""
    file = path / "cache.json"
    return file.stat().st_mtime_ns if file.exists() else None


def check_evaluating(teachers: Sequence[nn.Module]) -> None:
    """Raises ValueError for a teacher in training mode."""
    if any(module.training for teacher in teachers for module in teacher.modules()):
        why = "where dropout would blur its targets"
        raise ValueError(f"a teacher is in training mode, {why}: call teacher.eval() first")


def sparse(p: Tensor, k: int, start: Tensor) -> tuple[SparseTarget, Tensor]:
    """Unbiased targets of k entries for probabilities p (..., V), and the mass (...) sampled.

    With the threshold tau that solves sum_i min(1, p_i / tau) = k, tokens above it are kept with
    p_i, any other with probability p_i / tau and then with tau: every sum over tokens is right in
    the mean, the sum over all always, with the smallest variance (Cohen et al. 2009, "VarOpt").
    `start` (..., 1), uniform, decides which: those that start, start + 1, ... fall on when p / tau
    is laid end to end (systematic sampling, Madow 1949). Raises ValueError for k out of range.
    """
    classes = p.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k is {k}: it must lie between 1 and the teacher's {classes} classes")
    top, likely = p.topk(k, -1)
    tail = p.scatter(-1, likely, 0).sum(-1, keepdim=True)
    rest = tail + top.flip(-1).cumsum(-1).flip(-1)  # left to the j-th largest and all after it
    slots = torch.arange(k, device=p.device)
    exact = top > rest / (k - slots)
    line = p.scatter(-1, likely, top.masked_fill(exact, 0)).cumsum(-1)
    mass, count = line[..., -1:], exact.sum(-1, keepdim=True)
    tau = mass / (k - count)
    drawn = torch.searchsorted(line, (slots - count + start) * tau, right=True)
    kept = torch.where(exact, top, tau.clamp_min(torch.finfo(p.dtype).tiny))
    indices = torch.where(exact, likely, drawn.clamp_max(classes - 1))
    return SparseTarget(indices, kept.log()), mass[..., 0]


def _fill(folder: Path, teachers, loader, k, temperature, seed) -> dict:
    """Writes the arrays; returns what of the header only the pass over the data tells."""
    device, examples, done = device_of(teachers[0]), len(loader.dataset), 0
    generator, arrays, sampled, rounding = torch.Generator().manual_seed(seed), {}, 0.0, 0.0
    for call in _calls(loader, loader.batch_size or ROWS):
        call = call_of(call, teachers[0]).to(device)
        outputs = [output_of(teacher, call) for teacher in teachers]
        classes = outputs[0].classes
        target, mass = _targets(outputs, k, temperature, generator)
        if not is_finite(mass) or target.log_p.isnan().any():
            raise ValueError(
                "a teacher's probabilities are not finite: restore a finite checkpoint"
            )
        types = np.uint16 if classes <= 2**16 else np.uint32, np.float16
        for name, kind, values in zip(ARRAYS, types, target):
            if name not in arrays:
                file, shape = folder / f"{name}.npy", (examples, *values.shape[1:])
                arrays[name] = np.lib.format.open_memmap(file, "w+", kind, shape)
            arrays[name][done : done + len(values)] = values.cpu().numpy()
        done, sampled = done + len(mass), sampled + mass.mean().item() * len(mass) / examples
        error = target.log_p.half().float().exp() - target.log_p.exp()
        rounding = max(rounding, error.abs().max().item())
    for array in arrays.values():
        array.flush()
    found = {"vocabulary": classes, "sampled": sampled, "rounding": rounding}
    return found | {"examples": examples, "inputs": _inputs_digest(loader)}


def _targets(outputs, k, temperature, generator) -> tuple[SparseTarget, Tensor]:
    """Targets of a batch and their sampled mass; probabilities are made a few tokens at a time."""
    shape, device = outputs[0].hidden.shape[:-1], outputs[0].hidden.device
    start = torch.rand(shape.numel(), 1, generator=generator).to(device)
    chunk, parts = max(16, FUNCTION_BLOCK // (4 * outputs[0].classes)), []
    outputs = [output.tokens(slice(None)) for output in outputs]
    for first in range(0, shape.numel(), chunk):
        rows = slice(first, first + chunk)
        p = soft_targets([output.logits(rows) for output in outputs], temperature).float().exp()
        target, mass = sparse(p, k, start[rows])
        parts.append((*target, mass))
    indices, log_p, mass = (torch.cat(tensors).unflatten(0, shape) for tensors in zip(*parts))
    return SparseTarget(indices, log_p), mass
