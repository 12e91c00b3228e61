"""Data-parallel training: processes that share out each batch of the one loop.

Each draws the same batches and takes rows of its own; gradients are added up after the backward
pass. Nothing wraps the model, as DistributedDataParallel does: names, steps and hooks stay, and a
checkpoint fits any number of processes. `join` comes first: torchrun --nproc-per-node=2 -m yours
"""

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kit.core.protocols import pick_device, tensors_of, tree_map


def join(device: str = "auto") -> torch.device:
    """The device of this process, once it has met those that torchrun started with it, if any;
    of GPUs each takes its own. Errors of `pick_device`."""
    found = pick_device(device)
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if found.type == "cuda":
            torch.cuda.set_device(found := pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
    return found


def rank() -> int:
    """Number of this process; the one of rank 0 writes files and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many share out each batch; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(value):
    """What rank 0 has: the others wait for it."""
    found = [value]
    if processes() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def spread(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors with those of rank 0."""
    for tensor in tensors if processes() > 1 else ():
        dist.broadcast(values := tensor.detach().contiguous(), 0)
        tensor.detach().copy_(values)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Overwrites tensors with their sums over all processes, the same bits in each."""
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors if processes() > 1):
        same = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
        dist.all_reduce(flat := torch.cat([tensor.detach().flatten() for tensor in same]))
        for tensor, sums in zip(same, flat.split([tensor.numel() for tensor in same])):
            tensor.detach().copy_(sums.view_as(tensor))


def share(batch, part: int, parts: int):
    """One of so many nearly equal parts of a batch's rows, in order. Raises ValueError for a batch
    whose tensors differ in rows."""
    rows = sorted({len(tensor) for tensor in tensors_of(batch) if tensor.ndim})
    if len(rows) != 1:
        advice = "give each a row an example, or use one process and accumulate=1"
        raise ValueError(f"a batch with tensors of {rows} rows cannot be shared out: {advice}")
    cut = slice(rows[0] * part // parts, rows[0] * (part + 1) // parts)
    return tree_map(lambda tensor: tensor[cut] if tensor.ndim else tensor, batch)
