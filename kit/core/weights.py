"""Weights: any tensor of any module may carry steps (a mask, a quantizer, a transform).

torch.nn.utils.parametrize keeps the trained values under `original` and computes the compressed
tensor on access. This file adds what compression needs on top: one object for a weight and its
steps, tensors shared by several modules, recurrent layers, whose cached weight list would otherwise
go stale, and the view of any weight as a matrix whose rows are outputs.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from kit.core.steps import STEPS, Step


@dataclass(frozen=True)
class MatrixView:
    """A tensor seen as (rows, columns), a row for what feeds one output.

    shape: of the tensor. split: the same with sets of outputs that have inputs of their own
    (experts, groups of a convolution) as the first axis, (groups, outputs, inputs, ...), or
    (groups, inputs, outputs, ...) if `transposed`.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.split[0] * self.split[1 + self.transposed]

    @property
    def columns(self) -> int:
        _, outputs, *inputs = self.split
        return math.prod([outputs, *inputs[1:]] if self.transposed else inputs)

    def matrix(self, tensor: Tensor) -> Tensor:
        """(rows, columns), from a tensor of `shape`."""
        if self.transposed:
            tensor = tensor.reshape(self.split).transpose(1, 2)
        return tensor.reshape(self.rows, self.columns)

    def tensor(self, matrix: Tensor) -> Tensor:
        """A tensor of `shape`, from (rows, columns)."""
        if self.transposed:
            groups, inputs, outputs, *rest = self.split
            matrix = matrix.reshape(groups, outputs, inputs, *rest).transpose(1, 2)
        return matrix.reshape(self.shape)

    def like(self, shape: Sequence[int]) -> "MatrixView":
        """The same way of seeing for a tensor that has lost entries."""
        shape = tuple(shape)
        if len(shape) < 2:
            split = (1, *shape, 1) if self.split[-1] == 1 else (1, 1, *shape)
        elif len(self.split) > len(shape):  # groups of a convolution share the first axis
            split = (self.split[0], shape[0] // self.split[0], *shape[1:])
        else:
            split = (math.prod(shape[:-2]), *shape[-2:])
        return MatrixView(shape, split, self.transposed)

    def stack(self, tensor: Tensor) -> Tensor:
        """(groups, rows of a group, columns), from a tensor of `shape`."""
        return self.matrix(tensor).unflatten(0, (self.split[0], -1))


def column_view(shape: Sequence[int]) -> MatrixView:
    """A vector as a column: a row an entry."""
    return MatrixView(tuple(shape), (1, *shape, 1))


def matrix_view(shape: Sequence[int], module: nn.Module | None = None) -> MatrixView:
    """How a tensor of `shape` in `module` is seen as a matrix: outputs of a Linear, convolution,
    embedding or recurrent layer are rows, and those of each expert (E, outputs, inputs). A vector
    is one row."""
    shape = tuple(shape)
    if len(shape) < 2:
        return MatrixView(shape, (1, 1, math.prod(shape)))
    if isinstance(module, _ConvNd):
        split = (module.groups, shape[0] // module.groups, *shape[1:])
        return MatrixView(shape, split, isinstance(module, _ConvTransposeNd))
    return MatrixView(shape, (math.prod(shape[:-2]), *shape[-2:]), _holds_transposed(module, shape))


def _holds_transposed(module: nn.Module | None, shape: tuple[int, ...]) -> bool:
    """Whether a weight is kept as (inputs, outputs): transformers' Conv1D, and stacked experts that
    say so or whose first product ends in twice what the second one begins with."""
    if len(shape) == 3 and hasattr(module, "gate_up_proj"):
        first, second = (original_of(module, name) for name in ("gate_up_proj", "down_proj"))
        return first.shape[2] == 2 * second.shape[1]
    names = [(cls.__name__, cls.__module__) for cls in type(module).__mro__]
    return any(name == "Conv1D" and home.startswith("transformers") for name, home in names)


@dataclass(frozen=True, eq=False)
class Weight:
    """One trainable tensor of a model: where it lives, what it holds, its steps."""

    model: nn.Module
    module: nn.Module
    attribute: str
    name: str  # dotted, of the uncompressed model

    @property
    def original(self) -> nn.Parameter:
        """The trained values behind the steps."""
        return original_of(self.module, self.attribute)

    @property
    def value(self) -> Tensor:
        """What the module computes with."""
        return getattr(self.module, self.attribute)

    @property
    def steps(self) -> list[Step]:
        """In order of application; empty when there are none."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return []
        return list(self.module.parametrizations[self.attribute])

    @property
    def view(self) -> MatrixView:
        return matrix_view(self.original.shape, self.module)

    @property
    def is_matrix(self) -> bool:
        """Floating, of two or more dimensions, and not the stacked biases of experts, nor a vector
        shaped to be broadcast: the gains (outputs, 1) of torch's old weight norm, a scale
        (channels, 1, 1), a token (1, 1, D) that all inputs share. A `weight` is none of these."""
        x, name = self.original, self.attribute
        bias = name.startswith(("b_", "bias")) or name.endswith("bias")
        layers = name == "weight" or isinstance(self.module, nn.RNNBase)
        vector = not layers and sum(size > 1 for size in x.shape) < 2
        return x.is_floating_point() and x.ndim >= 2 and not bias and not vector

    def find(self, kind: type) -> Step | None:
        """The step of a class, or None."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    def before(self, rank: int) -> Tensor:
        """What a step of this rank is applied to: the trained values after the steps before it."""
        x = self.original
        for step in self.steps:
            if step.rank < rank:
                x = step(x)
        return x

    def put(self, step: Step) -> None:
        """Adds a step in its place by rank; one of the same class is replaced. Raises ValueError as
        `check_put`."""
        self.check_put(type(step))
        kept = [present for present in self.steps if present.rank != step.rank]
        self.set_steps(sorted([*kept, step], key=lambda step: step.rank))

    def check_put(self, kind: type[Step]) -> None:
        """Raises ValueError for steps that no file could hold, or whose rank another class has."""
        name = kind.__name__
        if STEPS.get(getattr(kind, "kind", None)) is not kind:
            raise ValueError(f"{name} has no name in files: put @register_step('...') on the class")
        for method in ("encode", "decode"):
            if getattr(kind, method) == getattr(Step, method):
                raise ValueError(f"{name} cannot be stored: give it an {method} method")
        for present in self.steps:
            if present.rank == kind.rank and type(present) is not kind:
                there = type(present).__name__
                what = f"{self.name!r} carries a {there}, which has the rank {kind.rank} of {name}"
                raise ValueError(f"{what}: call drop({there}) first")

    def drop(self, kind: type) -> None:
        """Takes the steps of a class off."""
        self.set_steps([step for step in self.steps if not isinstance(step, kind)])

    def set_steps(self, steps: Sequence[Step]) -> None:
        """Replaces the steps wherever the model shares this tensor; trained values stay. Layers
        with sparse gradients get dense ones: those of a computed tensor are."""
        for holder, name in _holders(self.model, self.original):
            _own_class(holder)
            if not parametrize.is_parametrized(holder):
                holder._parameter_order = list(holder._parameters)
            if parametrize.is_parametrized(holder, name):
                parametrize.remove_parametrizations(holder, name, leave_parametrized=False)
            for step in steps:
                parametrize.register_parametrization(holder, name, step, unsafe=True)
            _in_order(holder)
            if steps and getattr(holder, "sparse", False):
                holder.sparse = False
            if isinstance(holder, nn.RNNBase):
                if steps:
                    type(holder)._apply = _apply_and_forget
                if not hasattr(holder, "_weight_hooks"):
                    before = holder.register_forward_pre_hook(_read_weights)
                    holder._weight_hooks = before, holder.register_forward_hook(_forget_weights)
                _forget_weights(holder)

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        """Overwrites the trained values, which the steps go on acting on."""
        self.original.copy_(value)

    def select(self, select: Callable[[Tensor], Tensor]) -> None:
        """Keeps the entries that `select` picks from any tensor of this shape; steps are resized.
        Raises ValueError, and changes nothing, if a step cannot be."""
        kept = x = select(self.original.detach()).clone()
        resized = []
        with torch.no_grad():
            for step in self.steps:
                resized.append(step.resized(select, x))
                x = resized[-1](x)
        self.become(kept, resized)

    def become(self, values: Tensor, steps: Sequence[Step] = ()) -> None:
        """Replaces trained values, by others of any shape, and steps, wherever they are shared."""
        old = self.original
        new = nn.Parameter(values, requires_grad=old.requires_grad)
        self.set_steps([])
        for module, attribute in _holders(self.model, old):
            setattr(module, attribute, new)
        self.set_steps(steps)


def weights(model: nn.Module, select: str | Iterable[str] = "*", matrices=False) -> list[Weight]:
    """The weights whose dotted name matches a shell pattern, in model order; a tensor shared by
    several modules once, under its first name. The order does not depend on what carries steps.
    matrices: only those that `Weight.is_matrix`. Raises ValueError for a pattern that matches
    nothing, and as `original_of`."""
    found, seen = [], set()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            kind = type(module).__name__
            raise ValueError(f"a {kind} keeps its code: give the nn.Module that it was made from")
        if "parametrizations" in path.split("."):
            continue
        for attribute in sorted({*module._parameters, *getattr(module, "parametrizations", {})}):
            original = original_of(module, attribute)
            if original is not None and id(original) not in seen:
                seen.add(id(original))
                name = f"{path}.{attribute}" if path else attribute
                found.append(Weight(model, module, attribute, name))
    if matrices:
        found = [weight for weight in found if weight.is_matrix]
    patterns = [select] if isinstance(select, str) else list(select)
    for pattern in patterns:
        if pattern != "*" and not any(fnmatch(weight.name, pattern) for weight in found):
            what = "weight of two or more dimensions" if matrices else "weight"
            there = ", ".join(weight.name for weight in found) or "none"
            raise ValueError(f"no {what} is named {pattern!r}: this model has {there}")
    return [weight for weight in found if any(fnmatch(weight.name, p) for p in patterns)]


def weight_of(module: nn.Module, attribute: str = "weight", model=None) -> Weight:
    """The weight in `module.<attribute>`; give `model` where it is shared with other modules.
    Raises ValueError when the module has no such parameter."""
    if attribute not in {*module._parameters, *getattr(module, "parametrizations", {})}:
        raise ValueError(f"{type(module).__name__} has no parameter {attribute!r}")
    return Weight(model or module, module, attribute, attribute)


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity, in one pass and without a copy for most dtypes."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    small = tensor.dtype.itemsize == 1  # eight-bit floats know no order
    return torch.stack(torch.aminmax(tensor.float() if small else tensor)).isfinite().all().item()


def check_values(tensor: Tensor, name: str) -> None:
    """Raises ValueError for a tensor without values (on the meta device), NaN or infinite ones."""
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, without values: load a checkpoint first")
    if bad := int((~torch.isfinite(tensor)).sum()):
        held = f"{name} holds {bad} NaN or infinite values"
        raise ValueError(f"{held}: restore a finite checkpoint first")


def class_of(module: nn.Module) -> type:
    """A module's class, not the one that torch generates where weights carry steps."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a module computes what its class says: exactly this class, its own forward, no hooks,
    so that another layer can take its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    changed = "forward" in vars(module) or getattr(module, "max_norm", None) is not None
    return class_of(module) is kind and not hooks and not changed


def original_of(module: nn.Module, attribute: str) -> nn.Parameter:
    """The trained values behind a tensor, with steps or without. Raises ValueError for other
    parametrizations than steps, such as torch's weight and spectral norms: zeros and rounded values
    would not survive them, nor are they in files."""
    if not parametrize.is_parametrized(module, attribute):
        return module._parameters[attribute]
    for step in (steps := module.parametrizations[attribute]):
        if not isinstance(step, Step):
            kind, other = class_of(module).__name__, type(step).__name__
            what = f"{attribute!r} of a {kind} is computed by a {other}, which is no step"
            advice = "compress kit.core.weights.materialize(model), where it is a plain tensor"
            raise ValueError(f"{what}: {advice}")
    return steps.original


def _holders(model: nn.Module, original: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every (module, attribute) of the model that is this tensor."""
    modules = [m for m in model.modules() if not isinstance(m, parametrize.ParametrizationList)]
    return [(m, a) for m in modules for a in [*m._parameters, *getattr(m, "parametrizations", {})]
            if original_of(m, a) is original]  # fmt: skip


def _in_order(module: nn.Module) -> None:
    """torch puts a parameter last that carries nothing any more: back to its place, by which
    optimizers' states and vectors of parameters know it."""
    held, order = module._parameters, getattr(module, "_parameter_order", [])
    for name in [*(n for n in order if n in held), *(n for n in held if n not in order)]:
        held[name] = held.pop(name)


def _own_class(module: nn.Module) -> None:
    """torch puts properties on the module's generated class, and copies share that: part them."""
    if parametrize.is_parametrized(module):
        shared = type(module)
        own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)


def _read_weights(module: nn.RNNBase, *_) -> None:
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _forget_weights(module: nn.RNNBase, *_) -> None:
    """Computed weights belong to one forward pass; kept, they would forbid copying the model."""
    module._flat_weights = [None] * len(module._flat_weights_names)


def _apply_and_forget(module: nn.RNNBase, *args):
    """A cast reads the weights anew."""
    applied = nn.RNNBase._apply(module, *args)
    _forget_weights(module)
    return applied


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with the model; computed tensors leave their graph behind."""
    held = [value for module in model.modules() for entry in vars(module).values()
            for value in (entry if isinstance(entry, list) else [entry])]  # fmt: skip
    computed = {id(v): v.detach() for v in held if isinstance(v, Tensor) and not v.is_leaf}
    try:
        copied = copy.deepcopy(model, computed)
    except TypeError as error:  # of a lock, a file, a generator
        what = f"this {type(model).__name__} cannot be copied ({error})"
        raise ValueError(f"{what}: take that off the model first") from None
    for module in copied.modules():
        _own_class(module)
    return copied


def materialize(model: nn.Module) -> nn.Module:
    """A copy of the model with every weight's steps replaced by the tensor they compute."""
    model = copy_model(model)
    for module in list(model.modules()):
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for attribute in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        _in_order(module)
        if hasattr(module, "_weight_hooks"):
            for hook in module._weight_hooks:
                hook.remove()
            del module._weight_hooks
            _read_weights(module)
    return model
