"""A student's first weights from its teacher's: a subset of layers, of units, and truncated SVD of the tables."""

import dataclasses
import re

import torch
from torch import nn

from kit.distillation.features import layer_mapping

LAYER = re.compile(r"^(.*?\blayers\.)(\d+)(\..*)$")


@torch.no_grad()
def initialize_from_teacher(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy into the student, in place, what of the teacher fits; returns the names that were set.

    Layers are those of `layer_mapping`. Where an axis shrinks, some of its units are kept: of the residual stream
    (config.d_model) those with the largest variance in the teacher's token tables, of any other axis evenly spaced
    ones, so that concatenated halves and gates stay aligned (weight subcloning, Samragh et al. 2023). A factored
    token table is the truncated SVD of the teacher's (`embedding_rank`); a tied one starts from the teacher's output
    layer. What is larger than in the teacher keeps its random values. Before masks and quantizers are put on.
    """
    source, units = dict(teacher.named_parameters()), _residual_units(student, teacher)
    kept = _residual_axes(student, units, 0 if units is None else teacher.config.d_model)
    tables = _tables(student, teacher, units)
    done = []
    for name, parameter in student.named_parameters():
        value = tables.get(name)
        if value is None and (other := source.get(_teacher_name(name, student, teacher))) is not None:
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
    own, other = (len(model.get_submodule(before.rstrip("."))) if _has(model, before.rstrip(".")) else 0
                  for model in (student, teacher))  # fmt: skip
    return f"{before}{layer_mapping(own, other)[int(index)]}{after}" if own and other else name


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


def _token_tables(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Embedding (V, D), output weight (V, D) and bias of a language model, multiplied out if factored."""
    weight = model.embedding.weight
    up = getattr(model, "embedding_up", None)
    return weight if up is None else weight @ up.weight.T, *model.output()


def _is_language_model(*models: nn.Module) -> bool:
    return all(hasattr(m, "embedding") and hasattr(m, "output") and hasattr(m, "config") for m in models)


def _residual_units(student: nn.Module, teacher: nn.Module) -> torch.Tensor | None:
    """The units of the residual stream that a narrower student keeps, in ascending order."""
    if not _is_language_model(student, teacher) or student.config.d_model >= teacher.config.d_model:
        return None
    embedding, output, _ = _token_tables(teacher)
    importance = embedding.var(0) / embedding.var(0).sum() + output.var(0) / output.var(0).sum()
    return importance.topk(student.config.d_model).indices.sort().values


def _residual_axes(student: nn.Module, units: torch.Tensor | None, width: int) -> dict[str, dict[int, torch.Tensor]]:
    """For each parameter the teacher's units along the axes that d_model sets: those that double when it doubles."""
    if units is None:
        return {}
    with torch.device("meta"):
        double = type(student)(dataclasses.replace(student.config, d_model=2 * student.config.d_model))
    shapes = {name: parameter.shape for name, parameter in double.named_parameters()}
    axes = {}
    for name, parameter in student.named_parameters():
        copies = parameter.shape, shapes[name]
        axes[name] = {axis: torch.cat([units + i * width for i in range(size // len(units))])
                      for axis, (size, wide) in enumerate(zip(*copies, strict=True)) if wide == 2 * size}  # fmt: skip
    return axes


def _subset(value: torch.Tensor, shape: torch.Size, kept: dict[int, torch.Tensor]) -> torch.Tensor | None:
    if value.dim() != len(shape) or any(new > old for new, old in zip(shape, value.shape, strict=True)):
        return None
    for axis, (old, new) in enumerate(zip(value.shape, shape, strict=True)):
        if old != new:
            units = kept.get(axis, torch.arange(new) * old // new)
            value = value.index_select(axis, units.to(value.device))
    return value


def _tables(student: nn.Module, teacher: nn.Module, units) -> dict[str, torch.Tensor]:
    """Token tables that a copy does not give: factored ones, and a tied one of an untied teacher."""
    if not _is_language_model(student, teacher) or student.config.vocab_size != teacher.config.vocab_size:
        return {}
    embedding, output, bias = _token_tables(teacher)
    if units is not None:
        embedding, output = embedding[:, units], output[:, units]
    tied = "head.weight" not in dict(student.named_parameters())
    values = {"output_bias": bias} if tied else {"head.bias": bias}
    rank = student.config.embedding_rank
    for name, table in {"embedding": output if tied else embedding, "head": output}.items():
        if rank:
            left, singular, right = torch.linalg.svd(table, full_matrices=False)
            root = singular[:rank].sqrt()
            values[f"{name}.weight"] = left[:, :rank] * root
            small = root[:, None] * right[:rank]
            values |= {"embedding_up.weight": small.T} if name == "embedding" else {"head_down.weight": small}
        else:
            values[f"{name}.weight"] = table
    return {name: value for name, value in values.items() if value is not None}
