"""Units that can go from any model: found by what spoils what, and cut only where that is verified.

A unit is an output of a layer. Set to NaN, it spoils those inputs of other layers that it reaches,
whatever lies between (views, shuffles, attention, sums). Units and inputs that hang together are a
group: a channel with what reads it, a neuron with its gate, a head with its queries, keys and
values. Like groups form a family, from which some may go.
"""

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from kit.core.protocols import Call, evaluating, tensors_of, tree_map
from kit.core.steps import Step
from kit.core.weights import (
    class_of,
    copy_model,
    is_plain,
    materialize,
    matrix_view,
    original_of,
    weight_of,
    weights,
)  # fmt: skip

PATIENCE = 3  # halvings of a block of units that tell no more before it counts as one
BOUND = 1e-5  # of the largest output: what the cut model may differ from the zeroed one
FIXES = ("heads", "widths"), ("heads",), ("widths",), (), ("count", "widths"), ("count",)
OUTPUTS = ("out_features", "out_channels", "embedding_dim", "nf")
INPUTS = ("in_features", "in_channels", "nx")
FOLLOWERS = ("num_features", "in_channels", "out_channels", "groups")
Slot = tuple[str, int]  # an axis of a weight, which tied layers share: first name and number


@dataclass(eq=False)
class Layer:
    """What can be cut of a module: the axes of its weight for outputs and inputs (None: it has
    none), and that of features in what it takes and gives."""

    name: str
    module: nn.Module
    outputs: int | None
    inputs: int | None
    features: int
    follows: bool = False  # a parameter a feature, as batch norms have: goes with what it is given
    slots: dict[Slot, int] = field(default_factory=dict)  # slot -> entries

    def slot(self, axis: int | None) -> Slot | None:
        return next((slot for slot in self.slots if slot[1] == axis), None)


def _layer(name: str, module: nn.Module) -> Layer | None:
    """A module as a layer, or None: its class does not say what it computes."""
    kind, steps = class_of(module), getattr(module, "parametrizations", {}).values()
    if not is_plain(module, kind) or not all(isinstance(s, Step) for each in steps for s in each):
        return None
    own = kind.__module__.startswith("torch.nn.modules.")
    if own and issubclass(kind, _NormBase):
        return Layer(name, module, None, 0, 1, True)
    if own and issubclass(kind, _ConvNd):
        axis, swapped = -1 - len(module.kernel_size), isinstance(module, _ConvTransposeNd)
        if module.groups == module.in_channels == module.out_channels > 1:
            return Layer(name, module, None, 0, axis, True)
        return None if module.groups > 1 else Layer(name, module, +swapped, +(not swapped), axis)
    if kind is nn.Linear:
        return Layer(name, module, 0, 1, -1)
    if kind is nn.Embedding:
        return Layer(name, module, 1, None, -1)
    return Layer(name, module, 1, 0, -1) if matrix_view((1, 1), module).transposed else None


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers whose outputs or inputs can be cut, in model order."""
    found = [_layer(name, module) for name, module in model.named_modules()]
    found, keys = [layer for layer in found if layer is not None], {}
    for layer in found:
        bare = getattr(layer.module, "weight", None) is None
        held = layer.module if bare else original_of(layer.module, "weight")
        shape = (layer.module.num_features,) if bare else held.shape
        axes = (axis for axis in (layer.outputs, layer.inputs) if axis is not None)
        layer.slots = {(keys.setdefault(id(held), layer.name), axis): shape[axis] for axis in axes}
    return found


@contextmanager
def _hooks(layers: Iterable[Layer], take: Callable, give: Callable | None = None) -> Iterator[None]:
    """Layers take `take(layer, x)` for each tensor x of their arguments, give `give(layer, y)`."""
    handles = []
    for layer in layers:

        def before(module, args, kwargs, layer=layer):
            return tree_map(lambda x: take(layer, x), (args, kwargs))

        def after(module, args, output, layer=layer):
            return give(layer, output) if give else None

        handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(
    model: nn.Module, call: Call, first: dict[Slot, int], size: int, called: set[str]
) -> Iterator[tuple]:
    """Units, and bool (size + 1,) what they spoil without a layer between, by the numbers from
    `first`; `size` stands for the output. Adds to `called` the layers that the call reaches. Blocks
    of units are halved until nothing more is told apart, many at a time where they reach nothing in
    common."""
    layers = layers_of(model)

    def reach(*blocks: tuple[Layer, int, int]) -> Tensor:
        seen = torch.zeros(size + 1, dtype=torch.bool)

        def take(layer: Layer, x: Tensor) -> Tensor:
            called.add(layer.name)
            if not x.is_floating_point() or layer.inputs is None:
                return x
            bad, at = x.isnan(), first[layer.slot(layer.inputs)]
            hit = bad.movedim(layer.features, 0).flatten(1).any(1).cpu()
            seen[at : at + len(hit)] |= hit
            return x if layer.follows else torch.where(bad, 1.0, x)

        def give(layer: Layer, y: Tensor) -> Tensor:
            for units in (units for spoiled, *units in blocks if spoiled is layer):
                y = y.index_fill(layer.features, torch.arange(*units, device=y.device), torch.nan)
            return y

        # fused kernels of attention may make numbers of NaN
        with _hooks(layers, take, give), evaluating(model), sdpa_kernel(SDPBackend.MATH):
            outputs = tensors_of(call(model))
        seen[-1] = any(bool(y.isnan().any()) for y in outputs if y.is_floating_point())
        return seen

    if reach().any():
        raise ValueError("it computes NaN")
    roots = [(m, 0, m.slots[m.slot(m.outputs)]) for m in layers if m.outputs is not None]
    active = [(block, reach(block), 0) for block in roots]
    while active:
        rounds: list[tuple[Tensor, list]] = []
        for (layer, a, b), seen, waited in active:
            if seen[-1] or waited == PATIENCE or b - a < 2 or not seen.any():
                at = first[layer.slot(layer.outputs)]
                yield range(at + a, at + b), seen
                continue
            taken, chosen = next((r for r in rounds if not (r[0] & seen).any()), (None, []))
            if taken is None:
                rounds.append((seen.clone(), chosen))
            else:
                taken |= seen
            middle = (a + b) // 2
            chosen.append((((layer, a, middle), (layer, middle, b)), seen, waited))
        active = []
        for _, entries in rounds:
            sides = [reach(*side) for side in zip(*(halves for halves, _, _ in entries))]
            for halves, seen, waited in entries:
                waited = (waited + 1) * all(torch.equal(side & seen, seen) for side in sides)
                active += [(half, side & seen, waited) for half, side in zip(halves, sides)]


@dataclass(eq=False)
class Family:
    """Like groups: `members`, the entries of each by slot; `names` of the layers that lose outputs;
    `gone`, the members that are to go; `fix`, which numbers that modules keep of shapes follow."""

    members: list[dict[Slot, list[int]]]
    names: list[str]
    gone: list[int] = field(default_factory=list)
    fix: tuple[str, ...] = FIXES[0]


def families(model: nn.Module, call: Call, names: Iterable[str]) -> list[Family]:
    """The families of units of the layers in `names`, without those that hang on other layers'."""
    layers = layers_of(model)
    widths = {slot: width for layer in layers for slot, width in layer.slots.items()}
    size, parent = sum(widths.values()), {}
    first = dict(zip(widths, itertools.accumulate(widths.values(), initial=0)))

    def root(i: int) -> int:
        while (above := parent.get(i, i)) != i:
            parent[i] = parent.get(above, above)
            i = above
        return i

    called: set[str] = set()
    for units, seen in _blocks(model, call, first, size, called):
        for other in (*units, *seen.nonzero()[:, 0].tolist(), *[size] * (not seen.any())):
            parent[root(other)] = root(units[0])  # what nobody reads stays, as what the output is
    groups: dict[int, dict] = defaultdict(lambda: defaultdict(list))
    for slot, width in widths.items():
        for i in range(width):
            groups[root(first[slot] + i)][slot].append(i)
    groups.pop(root(size), None)
    idle = [layer for layer in layers if layer.name not in called]
    idle_widths = {widths[layer.slot(layer.inputs)] for layer in idle if layer.inputs is not None}
    makers, found = defaultdict(list), defaultdict(list)
    for layer in layers:
        makers[layer.slot(layer.outputs)].append(layer.name)
    makers.pop(None, None)
    for group in groups.values():
        made = {name for slot in group for name in makers.get(slot, ())}
        read = any(slot in makers and widths[slot] in idle_widths for slot in group)
        if made and made <= set(names) and not read:  # by what the call does not reach, perhaps
            kind = tuple((slot, len(entries)) for slot, entries in group.items())
            found[kind, tuple(sorted(made))].append(dict(group))
    return [Family(group, list(made)) for (_, made), group in found.items() if len(group) > 1]


def _gone(families: Iterable[Family]) -> dict[Slot, set[int]]:
    gone: dict[Slot, set[int]] = defaultdict(set)
    for family in families:
        for i in family.gone:
            for slot, entries in family.members[i].items():
                gone[slot].update(entries)
    return gone


def cut(model: nn.Module, families: Iterable[Family], spared=frozenset()) -> set[tuple]:
    """Takes the members that are gone off the layers, with their steps, and off the numbers that
    modules keep of their shapes, in place, but for those `spared`: (class, name) each. Returns
    which of the others changed, but for numbers of heads."""
    gone, done, owners = _gone(families), set(), {}
    for layer in layers_of(model):
        owner = model.get_submodule(layer.name.rpartition(".")[0])
        for slot, width in layer.slots.items():
            keep = torch.tensor(sorted({*range(width)} - gone.get(slot, set())))
            for family in families:
                if slot in family.members[0]:
                    numbers = owners.setdefault(owner, {})
                    numbers |= _followed(vars(owner), family, width, len(keep)) | numbers
            if slot not in gone:
                continue
            made, module = slot[1] != layer.inputs or layer.follows, layer.module
            for name in ["bias"] * made + ["weight"] * (slot not in done):
                if getattr(module, name, None) is not None:
                    axis = slot[1] if name == "weight" else 0
                    weight = weight_of(module, name, model)
                    weight.select(lambda t, a=axis, k=keep: t.index_select(a, k.to(t.device)))
            for name, buffer in module._buffers.items():
                if layer.follows and buffer is not None and buffer.ndim == 1:
                    setattr(module, name, buffer[keep.to(buffer.device)])
            for name in FOLLOWERS if layer.follows else OUTPUTS if made else INPUTS:
                if hasattr(module, name):
                    setattr(module, name, len(keep))
            done.add(slot)
    changed = set()
    for owner, numbers in owners.items():
        for name in numbers.keys() - {name for kind, name in spared if kind is class_of(owner)}:
            if getattr(owner, name) != numbers[name] and not _counts_heads(name):
                changed.add((class_of(owner), name))
            setattr(owner, name, numbers[name])
    return changed


def _counts_heads(name: str) -> bool:
    return "head" in name and not re.search("dim|size|group", name)


def _followed(numbers: dict, family: Family, width: int, left: int) -> dict[str, int]:
    """What becomes of `numbers`, by name, when `width` units become `left`: as `family.fix` says,
    numbers of heads, widths, or whatever equals the number of groups."""
    count, kept, found = len(family.members), len(family.members) - len(family.gone), {}
    for name, value in numbers.items():
        heads = _counts_heads(name)
        if type(value) is not int:
            continue
        if heads and "heads" in family.fix and value % count == 0:
            found[name] = value // count * kept
        elif value == count and "count" in family.fix:
            found[name] = kept
        elif value == width and "widths" in family.fix and not heads:
            found[name] = left
    return found


def misfit(model: nn.Module, change: dict | None = None) -> set[str]:
    """Weights with other shapes in a model built from the config, or that with a change; all where
    none can be built."""
    shapes = {weight.name: weight.original.shape for weight in weights(model)}
    config = copy.deepcopy(model.config)
    vars(config).update(change or {})
    with suppress(Exception), torch.device("meta"):
        built = weights(type(model)._from_config(config))
        return {w.name for w in built if shapes.get(w.name) != w.original.shape}
    return {"", *shapes}


def fit_config(model: nn.Module, changes: Iterable[dict]) -> dict:
    """Makes the first of some changes of the config that lets more weights fit and no other fewer,
    without the numbers that have no part in that; returns it."""
    now = misfit(model)
    for change in changes:
        if change and (least := misfit(model, change)) < now:
            for name in [name for name, value in change.items() if type(value) is int]:
                rest = {key: value for key, value in change.items() if key != name}
                change = rest if misfit(model, rest) <= least else change
            vars(model.config).update(change)
            return change
    return {}


def describe(model: nn.Module, dense: nn.Module, families: Iterable[Family]) -> None:
    """Makes a config of transformers say what was cut from `dense`, in place, where it can."""
    if not hasattr(type(model), "_from_config"):
        return
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    new = {slot: width for layer in layers_of(model) for slot, width in layer.slots.items()}
    old = {slot: width for layer in layers_of(dense) for slot, width in layer.slots.items()}
    seen = []
    for family, slot in [(each, slot) for each in families for slot in each.members[0]]:
        for family.fix in FIXES[1:3]:
            changed = _followed(vars(model.config), family, old[slot], new[slot])
            if "widths" in family.fix and getattr(model.config, "n_inner", 0) is None:  # GPT-2: 4 d
                changed["n_inner"] = new[slot]
            if "num_attention_heads" in changed and not getattr(model.config, "head_dim", None):
                changed["head_dim"] = dense.config.hidden_size // dense.config.num_attention_heads
            made = fit_config(model, [changed] * (changed not in seen))
            for config in configs:
                vars(config).update(made)
            seen.append(changed)


class Verifier:
    """Compares a cut model with the dense one that reads zeros in place of what went; in float64
    where the model can, every parameter moved, so that nothing agrees by chance."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model, self.call = materialize(model), call
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                if tensor.is_floating_point() and tensor.ndim:
                    noise = torch.rand(tensor.shape, generator=generator).to(tensor)
                    tensor.mul_(1 + 0.2 * noise)
                    if isinstance(tensor, nn.Parameter):
                        tensor.add_(0.05 * noise - 0.025)
        for dtype in (torch.float64, torch.float32):
            self.model, parts = self.model.to(dtype), (call.args, call.kwargs)
            parts = tree_map(lambda t, d=dtype: t.to(d) if t.is_floating_point() else t, parts)
            self.call = Call(*parts)
            with suppress(Exception), evaluating(self.model):
                self.call(self.model)
                break

    def agrees(self, cut: Callable, reading: AbstractContextManager) -> bool:
        """Whether a copy that `cut` has changed computes what the model does in that context."""
        small = copy_model(self.model)
        try:
            cut(small)
            with evaluating(small, self.model), reading:
                outputs = tensors_of(self.call(self.model)), tensors_of(self.call(small))
            return all(_close(*pair) for pair in zip(*outputs, strict=True))
        except Exception:  # whatever a model raises that does not fit together
            return False

    def holds(self, families: list[Family], spared=frozenset()) -> bool:
        """Whether the model without what is gone computes the same as with zeros there."""
        gone = _gone(families)
        readers = [m for m in layers_of(self.model) if not m.follows and m.slot(m.inputs) in gone]

        def zero(layer: Layer, x: Tensor) -> Tensor:
            lost = torch.tensor(sorted(gone[layer.slot(layer.inputs)]), device=x.device)
            return x.index_fill(layer.features, lost, 0)

        return self.agrees(lambda small: cut(small, families, spared), _hooks(readers, zero))

    def spared(self, families: list[Family]) -> frozenset[tuple]:
        """The numbers of modules that merely equal what is cut: all holds without them as well."""
        changed, spared = cut(copy_model(self.model), families), frozenset()
        if self.holds(families, frozenset(changed)):
            return frozenset(changed)
        for one in sorted(changed, key=str):
            spared = spared | {one} if self.holds(families, spared | {one}) else spared
        return spared

    def verified(self, families: list[Family]) -> list[Family]:
        """Those that hold, alone and together."""
        if not families or self.holds(families):
            return families
        if len(families) == 1:
            for families[0].fix in FIXES[1:]:
                if self.holds(families):
                    return families
            return []
        half = len(families) // 2
        first, second = self.verified(families[:half]), self.verified(families[half:])
        return first + second if self.holds(first + second) else first


def _close(wanted: Tensor, found: Tensor) -> bool:
    if wanted.shape != found.shape or not wanted.is_floating_point():
        return torch.equal(wanted, found)
    return bool((wanted - found).abs().max() <= BOUND * wanted.abs().max())
