"""What an exact resume needs: tensors and a JSON header in one file, the state of the random
generators, and the place in the data."""

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kit.core.settings import reason_of
from kit.core.store import atomic, digest

GROUPS = {"model", "best", "optimizer", "scaler", "rng.now", "rng.epoch"}
COUNTS = ("step", "tokens", "stale", "best_step", "loss_steps", "position")
NUMBERS = dict.fromkeys(COUNTS, Annotated[int, msgspec.Meta(ge=0, lt=2**62)])
NUMBERS |= {"best_validation": float | None, "seconds": float, "loss_sum": float}
NUMBERS |= {"history": list[dict[str, int | float]], "config": dict[str, Any]}
State = msgspec.defstruct("State", NUMBERS.items(), forbid_unknown_fields=True)


def write_checkpoint(path: str | Path, groups: dict[str, dict[str, Tensor]], state: State) -> None:
    """Writes the file whole or not at all: a kill leaves the old one or the new one."""
    # Clones: safetensors refuses tensors that share memory.
    tensors = {f"{group}/{name}": t.detach().cpu().contiguous().clone()
               for group, ts in groups.items() for name, t in ts.items()}  # fmt: skip
    numbers = msgspec.structs.asdict(state)
    text = json.dumps(numbers, default=lambda number: number.item())  # NumPy's scalars
    data = save(tensors, {"kit.training": text, "kit.seal": _seal(tensors, text)})
    with atomic(path) as partial:
        partial.write_bytes(data)


def read_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], State]:
    """(groups of tensors, state); the random generators are set to it. Raises ValueError for a
    damaged file, another kind of file, and NaN."""
    advice = "delete it to train from the start"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, seal = metadata["kit.training"], metadata["kit.seal"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if _seal(tensors, text) != seal:
            raise ValueError("its checksum differs")
        state, groups = msgspec.convert(json.loads(text), State), defaultdict(dict)
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            groups[group][key] = tensor
        if extra := groups.keys() - GROUPS:
            raise ValueError(f"it holds {extra}")
        set_rng_state(groups["rng.epoch"]), set_rng_state(groups["rng.now"])
    except KeyError:
        raise ValueError(f"{path} is not a training checkpoint: give another path.") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        what = f"The checkpoint {path} is damaged ({reason_of(error)})"
        raise ValueError(f"{what}: {advice}.") from None
    for name, tensor in tensors.items():
        if not name.startswith("rng.") and _has_nan(tensor):
            lower = f"{advice}, with a lower lr if it diverged."
            raise ValueError(f"The checkpoint {path} holds NaN in {name!r}: {lower}")
    return groups, state


def _has_nan(tensor: Tensor) -> bool:
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isnan().any())


def check_storable(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for the first tensor that no checkpoint holds."""
    for name, tensor in tensors.items():
        sparse, small = tensor.layout != torch.strided, tensor.dtype == torch.complex32
        if sparse or small or _has_nan(tensor):
            kind = "is sparse" if sparse else "is complex32" if small else "holds NaN"
            raise ValueError(f"{name!r} {kind}, which no checkpoint keeps: train without one")


def _seal(tensors: dict[str, Tensor], text: str) -> str:
    return digest(text, [[n, str(t.dtype), list(t.shape), t] for n, t in sorted(tensors.items())])


def check_fit(targets: dict[str, Tensor], sources: dict[str, Tensor], what: str) -> None:
    """Raises ValueError for the first tensor that is missing, new, or of another shape or type."""
    for name in [*targets, *sources]:
        ours, theirs = (_kind(tensors.get(name)) for tensors in (targets, sources))
        if ours != theirs:
            difference = f"{name!r} is {theirs} there and {ours} here"
            advice = "build the same model, or delete it to train from the start."
            raise ValueError(f"{what} does not fit this model: {difference}; {advice}")


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")


@torch.no_grad()
def copy_into(targets: dict[str, Tensor], sources: dict[str, Tensor], what: str) -> None:
    """Copies tensors by name, in place; errors as in `check_fit`."""
    check_fit(targets, sources, what)
    for name, tensor in targets.items():
        tensor.copy_(sources[name])


def rng_state() -> dict[str, Tensor]:
    """The states of torch's, CUDA's, NumPy's and Python's global generators, as tensors."""
    _, keys, *rest = np.random.get_state()
    _, words, gauss = random.getstate()
    gauss = float("nan") if gauss is None else gauss
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), *rest], dtype=torch.float64),
        "python": torch.tensor([*words, gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Restores what `rng_state` returned; most errors of Python for anything else."""
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss, gauss = states["numpy"].tolist()
    if len(keys) != 624 or position not in range(625):  # NumPy would read beyond them
        raise ValueError(f"a random generator has {len(keys)} words and is at {position}")
    keys = np.array([*map(int, keys)], dtype=np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    *words, gauss = states["python"].tolist()
    random.setstate((3, tuple(map(int, words)), None if gauss != gauss else gauss))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"], i)


class Batches:
    """The loader's batches, epoch after epoch. A place in them is the generators' state at the
    start of the epoch, from which a shuffling loader draws its order, and the batches trained
    on since."""

    def __init__(self, loader):
        self.loader, self.iterator, self.epoch_rng, self.position = loader, None, {}, 0

    def _start(self):
        self.epoch_rng, self.iterator, self.position = rng_state(), iter(self.loader), 0

    def next(self):
        """The next batch. Raises ValueError when an epoch has none."""
        for _ in range(2):
            if self.iterator is None:
                self._start()
            for batch in self.iterator:
                return batch
            self.iterator = None
        advice = "give more data, or a smaller batch_size or seq_len."
        raise ValueError(f"The loader gives no batches: {advice}")

    def resume(self, epoch_rng: dict[str, Tensor], position: int) -> None:
        set_rng_state(epoch_rng)
        self._start()
        for _ in range(position):
            self.next()
        self.position = position
