"""Hidden features of a student compared with its teacher's: hooks for the length of one forward pass, projections."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kit.distillation.divergences import FEATURE_LOSSES, as_real

BK_FEATURE = "mixer.quantize_g"  # gives the reflection coefficient r, (B, N, C) complex, after any quantizer


@contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the outputs of the submodules `names` in the block's forward passes; the hooks leave with the block.

    Raises ValueError when a name matches no submodule.
    """
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            raise ValueError(f"no submodule of {type(model).__name__} is called {name!r}: "
                             f"choose a name from named_modules()")  # fmt: skip
    outputs: dict[str, torch.Tensor] = {}
    handles = [modules[name].register_forward_hook(_keep(outputs, name)) for name in dict.fromkeys(names)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keep(outputs, name):
    def hook(module, arguments, output):
        outputs[name] = output[0] if isinstance(output, tuple) else output

    return hook


def layer_mapping(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layer for each layer of the student: evenly spaced, the last one learns from the last one."""
    return tuple(math.ceil((i + 1) * teacher_layers / student_layers) - 1 for i in range(student_layers))


def feature_pairs(student: nn.Module, teacher: nn.Module, suffix: str = BK_FEATURE) -> tuple[tuple[str, str], ...]:
    """Pairs (student's, teacher's) of submodule names "layers.<i>.<suffix>", "layers.<i>" if `suffix` is "".

    Depths are matched by `layer_mapping`. Empty when one of the models has no such submodule.
    """
    own, other = _layer_names(student, suffix), _layer_names(teacher, suffix)
    if not own or not other:
        return ()
    return tuple((name, other[j]) for name, j in zip(own, layer_mapping(len(own), len(other)), strict=True))


def _layer_names(model: nn.Module, suffix: str) -> list[str]:
    names, found = {name for name, _ in model.named_modules()}, []
    while (name := f"layers.{len(found)}.{suffix}".rstrip(".")) in names:
        found.append(name)
    return found


class FeatureLoss(nn.Module):
    """Mean of a feature loss over pairs of submodules; where widths differ the student's side is projected.

    Called with the two dicts of `capture`. The projections are linear maps without bias, learned with the student
    and thrown away after it; a complex feature of C channels counts as 2C real ones. `prepare` makes them.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], loss: str = "mse"):
        """Raises ValueError when `loss` is not one of losses.FEATURE_LOSSES."""
        super().__init__()
        if loss not in FEATURE_LOSSES:
            raise ValueError(f"feature loss {loss!r} is unknown: choose one of {', '.join(FEATURE_LOSSES)}")
        self.pairs, self.loss = tuple(pairs), loss
        self.projections: nn.ModuleList | None = None

    def prepare(self, student: dict, teacher: dict) -> None:
        """Make the projections from one example of the features. Raises ValueError where lengths differ, too."""
        if self.projections is not None:
            return
        pairs = [(name, as_real(student[name]), as_real(teacher[other])) for name, other in self.pairs]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.projections = nn.ModuleList(self._projection(*pair) for pair in pairs)

    def _projection(self, name: str, own: torch.Tensor, other: torch.Tensor) -> nn.Module:
        if self.loss == "relational" or own.shape == other.shape:
            return nn.Identity()
        if own.shape[:-1] != other.shape[:-1]:
            raise ValueError(f"feature {name!r} has shape {tuple(own.shape)}, the teacher's {tuple(other.shape)}: only "
                             f"the last dimension may differ, unless the feature loss is 'relational'")  # fmt: skip
        return nn.Linear(own.shape[-1], other.shape[-1], bias=False).to(own)

    def forward(self, student: dict, teacher: dict) -> torch.Tensor:
        self.prepare(student, teacher)
        loss = FEATURE_LOSSES[self.loss]
        terms = [loss(projection(as_real(student[name])), as_real(teacher[other]))
                 for projection, (name, other) in zip(self.projections, self.pairs, strict=True)]  # fmt: skip
        return torch.stack(terms).mean()
