"""Steps: parametrizations of a weight that know how to be stored in a file and how to be resized.

A weight is `steps[-1](... steps[0](original))`. Its file holds one tensor, the *stored* value, and
the steps in their order. Steps that are projections (masks, quantizers: applied to their own output
they change nothing) come first, and what comes out of them is stored; what stands behind them
(order of rows, composition) is applied again. Nothing outside a step's file knows its kind.
"""

from collections.abc import Callable
from typing import ClassVar

import msgspec
import torch.nn as nn
from torch import Tensor

STEPS: dict[str, type["Step"]] = {}


class Stored(msgspec.Struct, forbid_unknown_fields=True):
    """Base of what a file states in JSON: fields of stated types and ranges, and no others."""


class Step(nn.Module):
    """Base of all steps. Register a subclass with `@register_step("name")` and it can be stored.

    kind: its name in files. rank: steps of a weight stand by rising rank, one of each (masks
        0, quantizers 10, transforms of what is stored 20 and above).
    projection: whether step(step(x)) == step(x), so that its output can be stored in place of its
        input. carries: whether `encode` writes the stored value itself, as a quantizer's codes.
    settings: what `encode` returns, as a type that msgspec checks files by (a `Stored` has fields).
    """

    kind: ClassVar[str]
    rank: ClassVar[int]
    projection: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    settings: ClassVar[type] = dict

    def encode(self, x: Tensor, stored: Tensor, write) -> dict:
        """Writes what the file needs to rebuild this step and returns the rest as plain JSON.

        Args:
            x: what the step sees. stored: the value in the file (after all projections).
            write: `write.tensor(t)`, `write.codes(matrix, bits)` and `write.integers(array)`, to be
                read back in the same order (`kit.artifact.layouts`).
        """
        raise NotImplementedError

    @classmethod
    def decode(
        cls, entry: dict, read, weight, stored: Tensor | None, parts
    ) -> tuple["Step", Tensor | None]:
        """The step that was encoded, and the stored value if the step carries it, else None.

        Args:
            entry: from `encode`, as `settings`. read: as `write`, with shapes; it refuses what does
                not fit them, and NaN. weight: the `Weight` to be filled. stored: the value in the
                file; None where the step carries it. parts: merges, or None.
        What is raised becomes the ArtifactError of `load`.
        """
        raise NotImplementedError

    def resized(self, select: Callable[[Tensor], Tensor], before: Tensor) -> "Step":
        """This step for the entries that stay.

        Args:
            select: picks them from any tensor of the old shape. before: what the step will see.
        Raises ValueError if the step has no meaning for them.
        """
        what = f"a weight with a {self.kind} step cannot change its shape"
        raise ValueError(f"{what}: resize it before")


def without_cast(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For `nn.Module._apply`: what `fn` does but for its change of the dtype."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return moved


def register_step(kind: str) -> Callable[[type[Step]], type[Step]]:
    """Class decorator: the name of this class in files. Raises ValueError for a taken name."""

    def register(cls: type[Step]) -> type[Step]:
        there = STEPS.get(kind, cls)
        if (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            said = f"steps called {kind!r} are of {there.__module__}: choose another name"
            raise ValueError(said)
        cls.kind = kind
        STEPS[kind] = cls
        return cls

    return register
