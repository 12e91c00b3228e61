"""A teacher's targets on disk: k probabilities a token, and the mass of all others, so the teacher need not run again.

A cache is a folder of plain NumPy arrays and a header; it belongs to one dataset, one temperature and one vocabulary.
Keeping the mass of the tail leaves the student's probabilities outside the k free to share it as they like; without
it a top-k target would be biased towards overconfidence (Anshumann et al. 2025, "Sparse Logit Sampling").
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

from kit.distillation.fused import CPU_BLOCK, Output, TopK, mean_probabilities
from kit.distillation.losses import soft_targets

ARRAYS = ("indices", "log_p", "log_tail")


class TeacherCache:
    """Opened cache; `cache[rows]` is the `TopK` of those examples, `cache.wrap(loader)` adds it to batches.

    Attributes: temperature, k, vocabulary, examples; nbytes on disk; `tail`, the mean probability outside the k, and
    `rounding`, the largest error of a stored probability (half precision).
    """

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError without a cache at `path`, ValueError when it is damaged."""
        self.path = Path(path)
        if not (self.path / "cache.json").exists():
            raise FileNotFoundError(f"no teacher cache at {self.path}: make one with build_cache")
        try:
            header = json.loads((self.path / "cache.json").read_text())
            self.arrays = {name: np.load(self.path / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
            for field in ("temperature", "k", "vocabulary", "examples", "inputs_crc", "tail", "rounding"):
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

    def __getitem__(self, rows) -> TopK:
        """Targets of examples `rows` (a sequence): indices int64, log_p and log_tail float32, summing to 1."""
        indices, log_p, log_tail = (torch.from_numpy(self.arrays[name][np.asarray(rows)].astype(kind))
                                    for name, kind in zip(ARRAYS, (np.int64, np.float32, np.float32), strict=True))
        total = torch.logaddexp(log_p.logsumexp(-1), log_tail)
        return TopK(indices, log_p - total[..., None], log_tail - total)

    def wrap(self, loader: DataLoader) -> DataLoader:
        """The same batches in the same order, as (inputs, indices, log_p, log_tail, targets).

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
    teacher: nn.Module | Sequence[nn.Module], loader: DataLoader, path: str | Path, k: int = 32,
    temperature: float = 2.0,
) -> TeacherCache:  # fmt: skip
    """Run the teacher (or the mean of several) once over every example of `loader.dataset` and keep its top k.

    A token takes 4k + 2 bytes (6k + 2 beyond 65,536 classes). The folder appears when it is complete; one that
    exists is replaced. Raises ValueError for k or temperature out of range and teachers in training mode.
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
    header = _fill(work, teachers, loader, k, temperature)
    (work / "cache.json").write_text(json.dumps(header))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(work, path)
    return TeacherCache(path)


def _fill(folder, teachers, loader, k, temperature) -> dict:
    device, examples = next(teachers[0].parameters()).device, len(loader.dataset)
    arrays, vocabulary, tail, rounding = {}, 0, 0.0, 0.0
    for rows, (inputs, *_) in _batches(loader):
        target, vocabulary = _top_k(teachers, inputs.to(device), k, temperature)
        arrays = arrays or _create(folder, examples, target, vocabulary)
        for name, values in zip(ARRAYS, target, strict=True):
            arrays[name][rows[0] : rows[-1] + 1] = values.cpu().numpy()
        tail += target.log_tail.exp().mean().item() * len(rows) / examples
        rounding = max(rounding, (target.log_p.half().float().exp() - target.log_p.exp()).abs().max().item())
    for array in arrays.values():
        array.flush()
    return dict(temperature=temperature, k=k, vocabulary=vocabulary, examples=examples, inputs_crc=_crc(loader),
                tail=tail, rounding=rounding)  # fmt: skip


def _top_k(teachers, inputs, k, temperature) -> tuple[TopK, int]:
    """Targets of a batch, and the number of classes; a language model's logits are made a few tokens at a time."""
    if not all(hasattr(model, "output") for model in teachers):
        log_p = soft_targets([model(inputs).float() for model in teachers], temperature)
        return TopK(*_split(log_p, log_p.exp(), k)), log_p.shape[-1]
    outputs = [Output(model.hidden(inputs).flatten(0, -2), *model.output()) for model in teachers]
    tokens, vocabulary = inputs.numel(), len(outputs[0].weight)
    rows = max(16, CPU_BLOCK // vocabulary)
    p, log_p = outputs[0].hidden.new_empty(2, min(rows, tokens), vocabulary)
    target = TopK(inputs.new_empty(tokens, k), p.new_empty(tokens, k), p.new_empty(tokens))
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        here = slice(part.stop - start)
        log_p[here] -= mean_probabilities(outputs, part, temperature, p[here], log_p[here])
        for whole, values in zip(target, _split(log_p[here], p[here], k), strict=True):
            whole[part] = values
    return TopK(*(tensor.unflatten(0, inputs.shape) for tensor in target)), vocabulary


def _split(log_p: torch.Tensor, p: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Indices and log-probabilities of the k largest, and the log of the sum of the rest; zeroes the k in p."""
    if not 1 <= k <= log_p.shape[-1]:
        raise ValueError(f"k is {k}: it must lie between 1 and the {log_p.shape[-1]} classes of the teacher")
    values, indices = log_p.topk(k, -1)
    return indices, values, p.scatter_(-1, indices, 0).sum(-1).log()


def _create(folder: Path, examples: int, target: TopK, vocabulary: int) -> dict[str, np.ndarray]:
    kinds = (np.uint16 if vocabulary <= 2**16 else np.uint32, np.float16, np.float16)
    return {name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (examples, *values.shape[1:]))
            for name, kind, values in zip(ARRAYS, kinds, target, strict=True)}  # fmt: skip
