"""A student's first weights from its teacher's: some layers and units, truncated tables."""

import dataclasses
import re

import torch
from torch import Tensor, nn

from kit.distillation.features import layer_mapping
from kit.models import LanguageModel

LAYER = re.compile(r"^(.*?\blayers)\.(\d+)(\..*)$")


@torch.no_grad()
def initialize_from_teacher(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copies into the student, in place, what of the teacher fits; returns the names that were set.

    Layers are those of `layer_mapping`. Where an axis shrinks, some of its units are kept: of the
    residual stream (config.d_model) those with the largest variance in the teacher's token tables,
    of any other axis evenly spaced ones, so that concatenated halves and gates stay aligned (weight
    subcloning, Samragh et al. 2023). A factored token table is the truncated SVD of the teacher's;
    a tied one starts from its output layer. What is larger than in the teacher keeps its random
    values. Before masks and quantizers are put on.
    """
    language = all(isinstance(model, LanguageModel) for model in (student, teacher))
    units = _residual_units(student, teacher) if language else None
    kept = {} if units is None else _residual_axes(student, units, teacher.config.d_model)
    tables = _token_tables(student, teacher, units) if language else {}
    source, done = dict(teacher.named_parameters()), []
    for name, parameter in student.named_parameters():
        value, other = tables.get(name), source.get(_teacher_name(name, student, teacher))
        if value is None and other is not None:
            value = _subset(other, parameter.shape, kept.get(name, {}))
        if value is not None:
            parameter.copy_(value)
            done.append(name)
    return done


def _teacher_name(name: str, student: nn.Module, teacher: nn.Module) -> str:
    match = LAYER.match(name)
    if not match:
        return name
    before, index, after = match.groups()
    modules = dict(teacher.named_modules())
    if before not in modules:
        return name
    mapping = layer_mapping(len(student.get_submodule(before)), len(modules[before]))
    return f"{before}.{mapping[int(index)]}{after}"


def _tables(model: LanguageModel) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embedding (V, D), output weight (V, D) and bias, multiplied out if factored."""
    weight, up = model.embedding.weight, model.embedding_up
    return weight if up is None else weight @ up.weight.T, *model.output()


def _residual_units(student: LanguageModel, teacher: LanguageModel) -> Tensor | None:
    """The units of the residual stream that a narrower student keeps, in ascending order."""
    width = student.config.d_model
    if width >= teacher.config.d_model:
        return None
    variances = [table.var(0) for table in _tables(teacher)[:2]]
    importance = sum(variance / variance.sum() for variance in variances)
    return importance.topk(width).indices.sort().values


def _residual_axes(student: nn.Module, units: Tensor, width: int) -> dict[str, dict[int, Tensor]]:
    """For each parameter the teacher's units along the axes that double with d_model."""
    with torch.device("meta"):
        wider = dataclasses.replace(student.config, d_model=2 * student.config.d_model)
        doubled = dict(type(student)(wider).named_parameters())
    axes: dict[str, dict[int, Tensor]] = {}
    for name, parameter in student.named_parameters():
        sizes = enumerate(zip(parameter.shape, doubled[name].shape))
        copies = {axis: torch.arange(n // len(units)) for axis, (n, wide) in sizes if wide == 2 * n}
        axes[name] = {a: (width * i[:, None] + units.cpu()).flatten() for a, i in copies.items()}
    return axes


def _subset(value: Tensor, shape: torch.Size, kept: dict[int, Tensor]) -> Tensor | None:
    if value.dim() != len(shape) or any(new > old for new, old in zip(shape, value.shape)):
        return None
    for axis, (old, new) in enumerate(zip(value.shape, shape)):
        if old != new:
            units = kept.get(axis, torch.arange(new) * old // new)
            value = value.index_select(axis, units.to(value.device))
    return value


def _token_tables(student: LanguageModel, teacher: LanguageModel, units) -> dict[str, Tensor]:
    """Token tables that a copy does not give: factored, or tied where the teacher's are not."""
    if student.config.vocab_size != teacher.config.vocab_size:
        return {}
    embedding, output, bias = _tables(teacher)
    if units is not None:
        embedding, output = embedding[:, units], output[:, units]
    tied, rank = student.config.tied, student.config.embedding_rank
    values = {"output_bias" if tied else "head.bias": bias}
    for name, table in (("embedding", output if tied else embedding), ("head", output)):
        values[f"{name}.weight"] = table
        if rank:
            left, singular, right = torch.linalg.svd(table, full_matrices=False)
            root = singular[:rank].sqrt()
            values[f"{name}.weight"], right = left[:, :rank] * root, root[:, None] * right[:rank]
            small = ("embedding_up", right.T) if name == "embedding" else ("head_down", right)
            values[f"{small[0]}.weight"] = small[1]
    return values
