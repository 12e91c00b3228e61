"""A teacher's targets on disk: k probabilities a token, so the teacher need not run again.

A cache is a folder of plain NumPy arrays and a header; it belongs to one dataset, one temperature and one vocabulary.
The k largest probabilities would say nothing about the rest, a quarter of the mass for a small teacher, or be biased
towards overconfidence; so likely tokens are kept as they are and a sample stands for the others (Anshumann et al. 2025,
"Sparse Logit Sampling").
"""

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from kit.distillation.fused import CPU_BLOCK, Output, SparseTarget, mean_probabilities
from kit.distillation.divergences import soft_targets

ARRAYS = ("indices", "log_p")


class TeacherCache:
    """Opened cache; `cache[rows]` is the `SparseTarget` of those examples, `cache.wrap(loader)` adds it to batches.

    Attributes: temperature, k, vocabulary, examples; nbytes on disk; `sampled`, the mean probability that a sample
    stands for, and `rounding`, the largest error of a stored probability (half precision).
    """

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError without a cache at `path`, ValueError when it is damaged."""
        self.path = Path(path)
        if not (self.path / "cache.json").exists():
            raise FileNotFoundError(f"no teacher cache at {self.path}: make one with build_cache")
        try:
            header = json.loads((self.path / "cache.json").read_text())
            self.arrays = {name: np.load(self.path / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
            for field in ("temperature", "k", "vocabulary", "examples", "inputs_crc", "sampled", "rounding"):
                setattr(self, field, header[field])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the teacher cache at {self.path} is damaged ({error}): build it again") from error
        if any(len(array) != self.examples for array in self.arrays.values()):
            raise ValueError(f"the teacher cache at {self.path} is damaged (lengths differ): build it again")

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.iterdir())

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, rows) -> SparseTarget:
        """Targets of examples `rows` (a sequence): indices int64, and log_p float32 of probabilities that sum to 1."""
        indices, log_p = (torch.from_numpy(self.arrays[name][np.asarray(rows)].astype(kind))
                          for name, kind in zip(ARRAYS, (np.int64, np.float32), strict=True))  # fmt: skip
        return SparseTarget(indices, log_p.log_softmax(-1))

    def wrap(self, loader: DataLoader) -> DataLoader:
        """The same batches in the same order, as (inputs, indices, log_p, targets).

        Raises ValueError when the loader's dataset is not the one the cache was built on.
        """
        if len(loader.dataset) != self.examples or _crc(loader) != self.inputs_crc:
            raise ValueError(f"the teacher cache at {self.path} was built on another dataset: build one for this "
                             f"loader's {len(loader.dataset)} examples")  # fmt: skip
        shuffle = isinstance(loader.sampler, RandomSampler)
        return DataLoader(_Cached(loader, self), loader.batch_size, shuffle=shuffle, drop_last=loader.drop_last,
                          collate_fn=_as_is)  # fmt: skip


class _Cached(Dataset):
    def __init__(self, loader, cache):
        self.loader, self.cache = loader, cache

    def __len__(self):
        return len(self.cache)

    def __getitems__(self, rows):
        inputs, targets = _fetch(self.loader, rows)
        return inputs, *self.cache[rows], targets


def _as_is(batch):
    return batch


def _fetch(loader: DataLoader, rows: Sequence[int]) -> Sequence[torch.Tensor]:
    dataset = loader.dataset
    items = dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[i] for i in rows]
    return loader.collate_fn(items)


def _batches(loader: DataLoader):
    """Every example once, in the dataset's order."""
    for start in range(0, len(loader.dataset), loader.batch_size):
        rows = list(range(start, min(start + loader.batch_size, len(loader.dataset))))
        yield rows, _fetch(loader, rows)


def _crc(loader: DataLoader) -> int:
    crc = 0
    for _, (inputs, *_) in _batches(loader):
        crc = zlib.crc32(inputs.contiguous().numpy().tobytes(), crc)
    return crc


@torch.no_grad()
def build_cache(
    teacher: nn.Module | Sequence[nn.Module], loader: DataLoader, path: str | Path, k: int = 64,
    temperature: float = 2.0, seed: int = 0,
) -> TeacherCache:  # fmt: skip
    """Run the teacher (or the mean of several) once over every example of `loader.dataset`, keep `sparse` targets of it.

    A token takes 4k bytes (6k beyond 65,536 classes). The folder appears when it is complete; one that exists is
    replaced. Raises ValueError for k or temperature out of range and teachers in training mode.
    """
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: it must be positive")
    if any(model.training for model in teachers):
        raise ValueError("a teacher is in training mode, where dropout would blur its targets: call teacher.eval()")
    path = Path(path)
    work = path.with_name(path.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    header = _fill(work, teachers, loader, k, temperature, torch.Generator().manual_seed(seed))
    (work / "cache.json").write_text(json.dumps(header))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(work, path)
    return TeacherCache(path)


def sparse(p: torch.Tensor, k: int, start: torch.Tensor) -> tuple[SparseTarget, torch.Tensor]:
    """Unbiased targets of k entries for probabilities p (..., V), and the mass (...) that a sample stands for.

    With the threshold tau that solves sum_i min(1, p_i / tau) = k, tokens above it are kept with p_i, any other with
    probability p_i / tau and then with tau: every sum over tokens is right in the mean, the sum over all always, and no
    sample of k has a smaller variance (Cohen et al. 2009, "VarOpt"). Which ones is decided by one uniform number a
    row, `start` (..., 1): those that start, start + 1, ... fall on when p / tau is laid end to end (systematic
    sampling, Madow 1949), neighbours in the vocabulary rarely together. Exact for k = V.
    Raises ValueError for k out of range.
    """
    if not 1 <= k <= p.shape[-1]:
        raise ValueError(f"k is {k}: it must lie between 1 and the {p.shape[-1]} classes of the teacher")
    top, likely = p.topk(k, -1)
    tail = p.scatter(-1, likely, 0).sum(-1, keepdim=True)
    rest = tail + top.flip(-1).cumsum(-1).flip(-1)  # what is left to the j-th largest and all after it
    slots = torch.arange(k, device=p.device)
    exact = top > rest / (k - slots)
    line = p.scatter(-1, likely, top.masked_fill(exact, 0)).cumsum(-1)
    mass, count = line[..., -1:], exact.sum(-1, keepdim=True)
    tau = mass / (k - count)
    drawn = torch.searchsorted(line, (slots - count + start) * tau, right=True).clamp_max_(p.shape[-1] - 1)
    return SparseTarget(torch.where(exact, likely, drawn), torch.where(exact, top, tau.clamp_min(torch.finfo(p.dtype).tiny)).log()), mass[..., 0]


def _fill(folder, teachers, loader, k, temperature, generator) -> dict:
    device, examples = next(teachers[0].parameters()).device, len(loader.dataset)
    arrays, vocabulary, sampled, rounding = {}, 0, 0.0, 0.0
    for rows, (inputs, *_) in _batches(loader):
        target, mass, vocabulary = _targets(teachers, inputs.to(device), k, temperature, generator)
        arrays = arrays or _create(folder, examples, target, vocabulary)
        for name, values in zip(ARRAYS, target, strict=True):
            arrays[name][rows[0] : rows[-1] + 1] = values.cpu().numpy()
        sampled += mass.mean().item() * len(rows) / examples
        rounding = max(rounding, (target.log_p.half().float().exp() - target.log_p.exp()).abs().max().item())
    for array in arrays.values():
        array.flush()
    return dict(temperature=temperature, k=k, vocabulary=vocabulary, examples=examples, inputs_crc=_crc(loader),
                sampled=sampled, rounding=rounding)  # fmt: skip


def _targets(teachers, inputs, k, temperature, generator) -> tuple[SparseTarget, torch.Tensor, int]:
    """Targets of a batch, their sampled mass, the number of classes; logits over a vocabulary are made a few tokens at
    a time."""
    if not all(hasattr(model, "output") for model in teachers):
        p = soft_targets([model(inputs).float() for model in teachers], temperature).exp()
        start = torch.rand(*p.shape[:-1], 1, generator=generator).to(p.device)
        return *sparse(p, k, start), p.shape[-1]
    outputs = [Output(model.hidden(inputs).flatten(0, -2), *model.output()) for model in teachers]
    tokens, vocabulary = inputs.numel(), len(outputs[0].weight)
    start = torch.rand(tokens, 1, generator=generator).to(inputs.device)
    chunk, parts = max(16, CPU_BLOCK // vocabulary), []
    p, log_p = outputs[0].hidden.new_empty(2, min(chunk, tokens), vocabulary)
    for first in range(0, tokens, chunk):
        rows = slice(first, min(first + chunk, tokens))
        here = slice(rows.stop - first)
        mean_probabilities(outputs, rows, temperature, p[here], log_p[here])
        target, mass = sparse(p[here], k, start[rows])
        parts.append((*target, mass))
    indices, log_p, mass = (torch.cat(tensors).unflatten(0, inputs.shape) for tensors in zip(*parts, strict=True))
    return SparseTarget(indices, log_p), mass, vocabulary


def _create(folder: Path, examples: int, target: SparseTarget, vocabulary: int) -> dict[str, np.ndarray]:
    kinds = (np.uint16 if vocabulary <= 2**16 else np.uint32, np.float16)
    return {name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (examples, *values.shape[1:]))
            for name, kind, values in zip(ARRAYS, kinds, target, strict=True)}  # fmt: skip
