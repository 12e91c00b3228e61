"""Settings that check themselves: an annotation says what a field or an argument may be."""

import dataclasses
import functools
import inspect
import reprlib
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, dataclass_transform, get_args, get_origin

import msgspec
import numpy as np
from msgspec import Meta

MOST = 10**9  # of what is counted: more steps would never end, more units never fit
Count = Annotated[int, Meta(ge=1, le=MOST)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
NotNegative = Annotated[float, Meta(ge=0, le=1e30)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
_NAMES |= {type(None): "None", Any: "anything", list: "a list"}
_NAMES |= {tuple: "a tuple", dict: "a dict"}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_LIMITS |= {"min_length": "of a length not below"}


def checked(name: str, value, kind):
    """`value` as a `kind`: a number may be NumPy's, a list stands for a tuple, an integer for a
    float. Raises ValueError, in one sentence that names it, for any other type or range."""
    if dataclasses.is_dataclass(kind) and isinstance(value, kind):
        return value
    try:
        return msgspec.convert(value.item() if isinstance(value, np.generic) else value, kind)
    except msgspec.ValidationError:
        said = " ".join(reprlib.repr(value).split())
        raise ValueError(f"{name} is {said}; it must be {expected(kind)}.") from None


def expected(kind) -> str:
    """What a type annotation allows, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = {name: getattr(meta, name) for meta in parts[1:] for name in _LIMITS}
        said = [f"{_LIMITS[name]} {x:,.12g}" for name, x in limits.items() if x is not None]
        text = f"{expected(parts[0])} {' and '.join(said)}".strip()
        text = text.replace("at least", "from")
        return text.replace("and at most", "to") if "from" in text else text
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (tuple, list, dict):
        return f"a {origin.__name__} of which each is {expected(parts[origin is dict])}"
    return " or ".join(map(expected, parts)) or _NAMES.get(kind, getattr(kind, "__name__", "else"))


@dataclass_transform(frozen_default=True)
def settings(cls: type) -> type:
    """Decorator: a frozen dataclass whose fields are `checked` before its own `__post_init__`."""
    more = getattr(cls, "__post_init__", lambda self: None)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = checked(field.name, getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, value)
        more(self)

    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True)(cls)


def checks(function: Callable) -> Callable:
    """Decorator: arguments annotated by numbers, texts, flags and choices are `checked` first."""
    signature = inspect.signature(function)
    kinds = {n: p.annotation for n, p in signature.parameters.items() if _is_plain(p.annotation)}

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        found = {name: call.arguments[name] for name in kinds.keys() & call.arguments.keys()}
        call.arguments.update({n: checked(n, value, kinds[n]) for n, value in found.items()})
        return function(*call.args, **call.kwargs)

    return wrapper


def reason_of(error: Exception) -> str:
    """The first line of what an error says, cut; its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _is_plain(kind) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (tuple, list, Union, types.UnionType):
        return all(_is_plain(part) for part in parts if part is not ...)
    return kind in _NAMES or origin is Literal or (origin is Annotated and _is_plain(parts[0]))
