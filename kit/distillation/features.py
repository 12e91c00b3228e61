"""Hidden features of a student compared with its teacher's: hooks and projections."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from kit.core.protocols import bare
from kit.core.settings import checked
from kit.distillation.divergences import FEATURE_LOSSES, as_real

BK_FEATURE = "mixer.quantize_g"  # sees the reflection coefficient r, (B, N, C) complex


@contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of the submodules `names` (of a tuple the first) in the block's forward
    passes. Raises ValueError when a name matches no submodule."""
    modules, outputs = dict(bare(model).named_modules()), {}
    with ExitStack() as hooks:
        for name in dict.fromkeys(names):
            if not name or name not in modules:
                what = f"no submodule of {type(model).__name__} is called {name!r}"
                raise ValueError(f"{what}: choose a name from named_modules()")

            def keep(module, arguments, output, name=name):
                outputs[name] = output[0] if isinstance(output, tuple) else output

            hooks.enter_context(modules[name].register_forward_hook(keep))
        yield outputs


def layer_mapping(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layer for each of the student's: evenly spaced, from the last back."""
    ends = [(i + 1) * teacher_layers / student_layers for i in range(student_layers)]
    return tuple(math.ceil(end) - 1 for end in ends)


def feature_pairs(
    student: nn.Module, teacher: nn.Module, suffix: str = BK_FEATURE
) -> tuple[tuple[str, str], ...]:
    """Pairs (student's, teacher's) of submodule names "layers.<i>.<suffix>", "layers.<i>" if
    `suffix` is "", by `layer_mapping`. Empty when one of the models has no such submodule."""
    own, other = _layer_names(student, suffix), _layer_names(teacher, suffix)
    mapping = layer_mapping(len(own), len(other)) if own and other else ()
    return tuple((own[i], other[j]) for i, j in enumerate(mapping))


def _layer_names(model: nn.Module, suffix: str) -> list[str]:
    names, found = {name for name, _ in model.named_modules()}, []
    while (name := f"layers.{len(found)}.{suffix}".rstrip(".")) in names:
        found.append(name)
    return found


class FeatureLoss(nn.Module):
    """Mean of a feature loss over pairs of submodules; a student's other width is projected.

    Called with the two dicts of `capture`. The projections are linear maps without bias, learned
    with the student and thrown away after it; complex ones count as pairs of reals.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], loss: str = "mse"):
        """Raises ValueError when `loss` is not one of FEATURE_LOSSES."""
        super().__init__()
        self.loss = FEATURE_LOSSES[checked("feature_loss", loss, Literal[*FEATURE_LOSSES])]
        self.pairs = tuple(pairs)
        self.projections: nn.ModuleList | None = None

    def prepare(self, student: dict, teacher: dict) -> None:
        """Makes the projections from an example. Raises ValueError for what cannot be compared."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pairs = [(name, as_real(student[name]), as_real(teacher[o])) for name, o in self.pairs]
            self.projections = nn.ModuleList(self._projection(*pair) for pair in pairs)

    def _projection(self, name: str, own: Tensor, other: Tensor) -> nn.Module:
        if not getattr(self.loss, "same_width", True) or own.shape == other.shape:
            return nn.Identity()
        if own.shape[:-1] != other.shape[:-1]:
            shapes = f"{tuple(own.shape)}, the teacher's {tuple(other.shape)}"
            raise ValueError(f"feature {name!r} has shape {shapes}: only the last may differ")
        return nn.Linear(own.shape[-1], other.shape[-1], bias=False).to(own)

    def forward(self, student: dict, teacher: dict) -> Tensor:
        if self.projections is None:
            self.prepare(student, teacher)
        pairs = zip(self.projections, self.pairs)
        sides = [(p(as_real(student[a])), as_real(teacher[b])) for p, (a, b) in pairs]
        return torch.stack([self.loss(own, other) for own, other in sides]).mean()
