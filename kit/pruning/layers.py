"""Whole layers go: those of a stack that change a model's outputs least when they are skipped."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import nn

from kit.core.measurement import relative_error
from kit.core.protocols import bare, call_of, device_of, evaluating, tensors_of, tree_map
from kit.core.settings import BelowOne, checks
from kit.core.weights import class_of, copy_model
from kit.models import refresh_config
from kit.pruning.units import Verifier, fit_config, misfit

Gone = Mapping[str, list[int]]  # name of a stack -> numbers of its layers


@checks
def prune_layers(model: nn.Module, batches: Iterable, sparsity: BelowOne) -> nn.Module:
    """A copy of any model that has lost a share `sparsity` of the layers of each of its stacks.

    A stack is a list of layers of one class, each of which gives what has the shape of its input.
    Those go whose skipping changes the outputs on `batches` (`kit.core.protocols.call_of`) least;
    one stays. Each is verified: the copy computes what the model does when it passes its input on.
    `removed` of the copy names them. A config of transformers, and the numbers that modules keep
    for caches, follow; what it cannot describe, or others need (a T5's first layers), stays.

    Raises ValueError: sparsity outside [0, 1), no batch, or if no layer can go.
    """
    model, gone = bare(model), {}
    calls = [call_of(batch, model).to(device_of(model)) for batch in batches]
    if not calls:
        raise ValueError("layers are compared on batches: give at least one batch of inputs")
    with evaluating(model):
        wanted, verifier = [call(model) for call in calls], Verifier(model, calls[0])
    lists = {n: m for n, m in model.named_modules() if type(m) in (nn.ModuleList, nn.Sequential)}
    for stack, layers in lists.items():
        count, changes = len(layers), {}
        for i in range(count if len({*map(class_of, layers)}) == 1 else 0):
            with suppress(Exception), evaluating(model), skipped(model, {stack: [i]}):
                changes[i] = sum(relative_error(call(model), y) for call, y in zip(calls, wanted))
        for i in sorted(changes, key=changes.get):
            more = gone | {stack: [*gone.get(stack, []), i]}
            enough, cut = min(round(sparsity * count), count - 1), partial(cut_layers, gone=more)
            if len(more[stack]) <= enough and verifier.agrees(cut, skipped(verifier.model, more)):
                gone = more
    if sparsity and not gone:
        what = f"cannot prune this {type(model).__name__}: it has no stack of which {sparsity:.0%}"
        raise ValueError(f"{what} of the layers can go")
    small = copy_model(model)
    cut_layers(small, gone)
    small.removed = [f"{stack}.{i}" for stack, lost in gone.items() for i in sorted(lost)]
    return small


@contextmanager
def skipped(model: nn.Module, gone: Gone) -> Iterator[None]:
    """Layers pass their first input on as their first output."""

    def after(module, args, kwargs, output):
        (x, *_), (y, *_) = tensors_of((args, kwargs)), tensors_of(output)
        if x.shape != y.shape:
            raise ValueError(f"a {class_of(module).__name__} gives another shape than it takes")
        return tree_map(lambda tensor: x if tensor is y else tensor, output)

    layers = [model.get_submodule(f"{stack}.{i}") for stack, lost in gone.items() for i in lost]
    handles = [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut_layers(model: nn.Module, gone: Gone) -> None:
    """Takes layers out, in place. Each module gets the config, and those numbers, that it has in a
    model built from the new config and that differ from what it had in one of the old config."""
    named, build = dict(model.named_modules()), getattr(type(model), "_from_config", None)
    names, old = {m: name for name, m in named.items()}, copy.deepcopy(getattr(model, "config", 0))
    fitted = bool(build) and not misfit(model)
    for stack, lost in gone.items():
        count = len(named[stack])
        for i in sorted(lost, reverse=True):
            del named[stack][i]
        if build:
            fields = vars(model.config).items()
            lists = {k: v for k, v in fields if isinstance(v, (list, tuple)) and len(v) == count}
            lists = {k: [v[i] for i in range(count) if i not in lost] for k, v in lists.items()}
            changes = [{k: count - len(lost)} for k, v in fields if type(v) is int and v == count]
            fit_config(model, [change | more for change in changes for more in (lists, {})])
    if fitted and misfit(model):
        raise ValueError(f"no {type(old).__name__} describes this {type(model).__name__}")
    if build:
        with torch.device("meta"):
            made = [build(copy.deepcopy(config)) for config in (old, model.config)]
        before, after = (dict(each.named_modules()) for each in made)
        for name, module in list(model.named_modules()):
            for key, value in vars(after[name]).items() if name in after else ():
                number = isinstance(value, (int, float)) or key == "config"
                if number and value != vars(before[names[module]]).get(key):
                    setattr(module, key, value)
    refresh_config(model)
