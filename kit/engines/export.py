"""The float graph of a model in ONNX, at the sizes at which it gives what the model gives."""

import contextlib
import inspect
import io
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import sympy
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor, nn
from torch.onnx._internal.exporter._capture_strategies import CAPTURE_STRATEGIES

from kit.core.measurement import relative_error
from kit.core.protocols import Call, tensors_of, tree_map
from kit.core.settings import reason_of
from kit.engines.choice import ROUNDING
from kit.engines.layers import float_copy
from kit.engines.runtime import OnnxEngine

# Dimensions beside the batch that may change, by the number of dimensions, tried in this order:
# lengths and image sizes; the same, but features (B, F); lengths that come last; the batch alone.
LENGTHS = {"ids": (1,), 3: (1,), 4: (2, 3), 5: (2, 3, 4)}
FREE = ({2: (1,), **LENGTHS}, LENGTHS, {3: (2,)}, {})
LARGEST = 4096  # size at which a graph is tried
SIZES = dict.fromkeys(("input_size_limit", "output_size_limit"), 2**40)  # of constants to be folded
SEARCHED = 512  # choices of small sizes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and quantizers print progress, log advice and warn of their own deprecations."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def export_graph(model: nn.Module, call: Call) -> ModelProto:
    """The float graph of a model in evaluation mode, quantized weights multiplied out.

    Its inputs are the tensors of the call, its outputs those of the model's output, in order. The
    batch is free, and lengths, heights and widths (`FREE`), where the graph gives what the model
    gives at twice the size, at one more, and beyond the sizes that the exporter took a branch for.
    Where a mask leaves nothing to a row of attention, torch gives 0 and ONNX the mean of values.
    Raises ValueError if the model cannot be exported, or changes its buffers.
    """
    model, tensors, reason = float_copy(model), tensors_of(call), "the call has no tensor"
    name, forward, names = type(model).__name__, model.forward, input_names(model, call)

    def tensors_only(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = iter(inputs)
        return tuple(tensors_of(tree_map(lambda _: next(found), call)(forward)))

    model.forward = tensors_only
    plans = [tuple(_free(x, tensors[0], sizes) for x in tensors) for sizes in FREE if tensors]
    for free in dict.fromkeys([*plans, ((),) * len(tensors)] if tensors else []):
        shapes = (tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for dims in free),)
        settings = {"dynamo": True, "verbose": False, "input_names": names}
        try:
            with quiet(), torch.no_grad():
                larger = _resized(tensors, free, lambda size, *_: 2 * size)
                expected = model(*larger)  # some models have no other size
                inputs = larger if any(free) else tensors  # exporters take a size of 1 for fixed
                captured = _captured(model, tuple(inputs), shapes)
                program = torch.onnx.export(captured, **settings)
                changed = program.exported_program.graph_signature.buffers_to_mutate.values()
                if changed:
                    raise ValueError(f"each call changes its buffer {', '.join(changed)}")
                proto = _tidy(program.model_proto)
                engine = OnnxEngine(proto.SerializeToString(), expected)
                checks = [(larger, expected)] + [(tensors, model(*tensors))] * any(free)
                longer = [_resized(tensors, free, lambda size, *_: size + 1)] * any(free)
                others = itertools.chain(longer, _edges(tensors, free, proto, captured))
                fits = all(relative_error(engine(*x), y) < ROUNDING for x, y in checks)
                if fits and all(_same(model, engine, x) for x in others):
                    return proto
                reason = "the graph gives other values than the model"
        except Exception as error:  # the exporter raises anything, of any type
            reason = reason_of(error)
    raise ValueError(f"{name} cannot be exported to ONNX: {reason}")


def input_names(model: nn.Module, call: Call) -> list[str]:
    """A name for each tensor of a call, in its order: that of the argument, and a number where it
    has several."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*call.args).arguments | call.kwargs
    except (TypeError, ValueError):
        bound = {"input": call}
    counts = {name: len(tensors_of(value)) for name, value in bound.items()}
    if sum(counts.values()) != len(tensors_of(call)):
        counts = {"input": len(tensors_of(call))}
    return [f"{n}_{i}" if count > 1 else n for n, count in counts.items() for i in range(count)]


def _free(x: Tensor, first: Tensor, sizes: dict) -> tuple[int, ...]:
    """Dimensions of x that may change: the batch's, and those of `sizes`."""
    batch = x.ndim and first.ndim and len(x) == len(first)
    ids = x.ndim == 2 and not x.is_floating_point()
    return (0,) * bool(batch) + sizes.get("ids" if ids else x.ndim, ())


def _captured(model: nn.Module, inputs: tuple, shapes) -> torch.export.ExportedProgram:
    """What `torch.onnx.export` makes a graph of, with the conditions on sizes that it drops."""
    for strategy in CAPTURE_STRATEGIES:
        if (result := strategy()(model, inputs, None, shapes)).success:
            break
    else:
        raise result.exception
    return result.exported_program


def _resized(tensors: list[Tensor], free, size_of: Callable[[int, int, int], int]) -> list[Tensor]:
    """The tensors, repeated along their free dimensions up to size_of(size, tensor, dimension)."""
    found = []
    for index, (x, dims) in enumerate(zip(tensors, free)):
        for dim in dims:
            size = size_of(x.shape[dim], index, dim)
            x = x.index_select(dim, torch.arange(size, device=x.device) % max(x.shape[dim], 1))
        found.append(x)
    return found


def _edges(tensors, free, proto: ModelProto, program) -> Iterator[list[Tensor]]:
    """The tensors in other sizes, nearest to theirs, for which a branch that the exporter took
    would not be taken: where one of its conditions on sizes fails, a size lies outside of its
    range, or of sizes that it takes for one only a single one changes."""
    shapes = [[d.dim_param for d in x.type.tensor_type.shape.dim] for x in proto.graph.input]
    places = {(i, dim): shapes[i][dim] for i, dims in enumerate(free) for dim in dims}
    places = {place: name for place, name in places.items() if name}
    now = {name: tensors[i].shape[dim] for (i, dim), name in places.items()}
    ends = [(str(s), end + step) for s, held in program.range_constraints.items()
            for end, step in ((held.lower, -1), (held.upper, 1)) if end.is_Integer]  # fmt: skip
    changes = [{name: int(n)} for name, n in ends if name in now and 0 < n <= LARGEST]
    asserts = [n for n in program.graph.nodes if n.target is torch.ops.aten._assert_scalar.default]
    for condition in dict.fromkeys(n.args[0].meta["val"].node.expr for n in asserts):
        changes += _exceptions(condition, now)
    for place, name in places.items():
        if list(places.values()).count(name) > 1:
            changes += [{place: 1}, {place: now[name] + 1}]
    for change in changes:
        sizes = {p: change.get(p, change.get(name, now[name])) for p, name in places.items()}
        yield _resized(tensors, free, lambda n, i, d, new=sizes: new.get((i, d), n))


def _exceptions(condition, now: dict[str, int]) -> list[dict[str, int]]:
    """Up to two choices of sizes, nearest to those of `now`, for which a condition fails."""
    symbols = {str(symbol): symbol for symbol in condition.free_symbols}
    if not symbols or not symbols.keys() <= now.keys():  # of sizes that the model computes
        return []
    small = range(1, 1 + round(SEARCHED ** (1 / len(symbols))))
    powers = [2**k + more for k in range(4, 13) for more in (0, 1)] * (len(symbols) < 3)
    tried = ({*small, *powers, *(now[name] + more for more in (-1, 0, 1))} for name in symbols)
    choices = itertools.product(*(sizes - {0} for sizes in tried))

    def far(sizes: tuple[int, ...]) -> float:
        return sum(abs(math.log(size / max(now[name], 1))) for name, size in zip(symbols, sizes))

    fails = (
        sizes
        for sizes in sorted(choices, key=far)
        if not condition.xreplace(dict(zip(symbols.values(), map(sympy.Integer, sizes))))
    )
    return [dict(zip(symbols, sizes)) for sizes in itertools.islice(fails, 2)]


def _same(model: nn.Module, engine: OnnxEngine, tensors: list[Tensor]) -> bool:
    """Whether both agree, where both can compute."""
    with contextlib.suppress(Exception):  # of any type
        expected = model(*tensors)
        return relative_error(engine(*tensors), expected) < ROUNDING
    return True


def _tidy(proto: ModelProto) -> ModelProto:
    """Without the exporter's notes (stack traces, source lines), most of a small model's file, and
    with constants computed: an LSTM's weights, whose gates exporters reorder, are weights again."""
    if any(node.op_type in ("LSTM", "GRU") for node in proto.graph.node):
        from onnxscript.optimizer import optimize

        proto = optimize(proto, **SIZES)
    del proto.graph.value_info[:], proto.graph.metadata_props[:], proto.metadata_props[:]
    for node in nodes_of(proto.graph.node):
        del node.metadata_props[:]
        node.doc_string = ""
    return proto


def nodes_of(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those inside their loops and branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g.node)
