"""What an exact resume needs: tensors and a JSON header in one safetensors file, written atomically and
checked on reading; the state of the random generators; the place in the data."""

import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_checkpoint(path: Path, tensors: dict[str, Tensor], header: dict) -> None:
    """Writes beside `path` and renames, so that a kill leaves the old file or the new one, never half of
    one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # Clones, because safetensors refuses tensors that share memory.
        save_file(
            {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()},
            partial,
            metadata={"kit.training": json.dumps(header)},
        )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Returns (tensors, header). Raises ValueError for a file that is damaged, not a checkpoint, or holds
    NaN."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["kit.training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except KeyError:
        raise ValueError(f"{path} is not a training checkpoint: give another path.") from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"The checkpoint {path} is damaged ({error}): delete it to train from the start."
        ) from None
    for name, tensor in tensors.items():
        if not name.startswith("rng.") and tensor.isnan().any():
            raise ValueError(
                f"The checkpoint {path} holds NaN in {name!r}: delete it to train from the "
                "start, with a lower lr if it diverged."
            )
    return tensors, header


def copy_into(targets: dict[str, Tensor], sources: dict[str, Tensor], what: str) -> None:
    """Copies tensors by name, in place. Raises ValueError naming the first that is missing, new, or of
    another shape."""
    for name in [*targets, *sources]:
        ours, theirs = targets.get(name), sources.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ValueError(
                f"{what} does not fit this model: {name!r} is {_describe(theirs)} there and "
                f"{_describe(ours)} here; build the same model, or delete it to train from the start."
            )
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(sources[name])


def _describe(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def rng_state() -> dict[str, Tensor]:
    """The states of torch's, CUDA's, numpy's and Python's global generators, as tensors."""
    _, keys, *rest = np.random.get_state()
    _, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), *rest], dtype=torch.float64),
        "python": torch.tensor([*words, float("nan") if gauss is None else gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Restores what `rng_state` returned."""
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss, gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss))
    *words, gauss = states["python"].tolist()
    random.setstate((3, tuple(map(int, words)), None if gauss != gauss else gauss))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda{i}"], i)


class Batches:
    """The loader's batches, epoch after epoch. A place in them is the generators' state at the start of the
    epoch, from which a shuffling loader draws its order, and the number of batches taken since."""

    def __init__(self, loader):
        self.loader, self.iterator, self.epoch_rng, self.position = loader, None, {}, 0

    def _start(self):
        self.epoch_rng, self.iterator, self.position = rng_state(), iter(self.loader), 0

    def next(self):
        for _ in range(2):
            if self.iterator is None:
                self._start()
            for batch in self.iterator:
                self.position += 1
                return batch
            self.iterator = None
        raise ValueError("The loader gives no batches: give more data, or a smaller batch_size or seq_len.")

    def resume(self, epoch_rng: dict[str, Tensor], position: int) -> None:
        set_rng_state(epoch_rng)
        self._start()
        for _ in range(position):
            next(self.iterator)
        self.position = position
