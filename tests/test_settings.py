"""Settings check themselves: every public class of them, and what the checks say."""

import dataclasses
import importlib
import math
import pkgutil
import subprocess
import sys
from typing import Annotated, Literal

import numpy as np
import pytest

import kit
from kit.core.settings import Count, Meta, Seed, Share, checked, checks, expected, settings
from kit.data import load_digits, token_loaders
from kit.pipeline import CompressionPipeline

WRONG = ("3", None, 2.5, math.inf, -math.inf, math.nan, True, -1, 10**12, [], {}, b"1", object())


def classes():
    for info in pkgutil.walk_packages(kit.__path__, "kit."):
        for kind in vars(importlib.import_module(info.name)).values():
            own = isinstance(kind, type) and kind.__module__ == info.name
            after = getattr(kind, "__post_init__", None)
            if own and getattr(after, "__module__", "") == "kit.core.settings":
                yield kind


CLASSES = sorted(classes(), key=lambda kind: kind.__qualname__)


def made(kind, **values):
    needed = {"TrainConfig": {"steps": 3}, "LinearSchedule": {"start": 1.0, "end": 2.0}}
    return kind(**{**needed.get(kind.__name__, {}), **values})


def test_the_settings_are_found():
    names = {kind.__name__ for kind in CLASSES}
    assert {"TrainConfig", "PipelineSettings", "Format", "QuantizationConfig"} <= names
    assert len(names) >= 13


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_wrong_values_are_one_sentence(kind):
    for field in dataclasses.fields(kind):
        refused = 0
        for value in WRONG:
            try:
                made(kind, **{field.name: value})
            except ValueError as error:
                refused += 1
                text = str(error)
                assert "\n" not in text and len(text) < 300, text
                assert field.name in text or "dtype" in text, text
        assert refused >= 8, (field.name, refused)


def test_values_take_the_type_of_their_field():
    @settings
    class Some:
        count: Count | tuple[Count, ...] = 1
        share: Share = 0

        def __post_init__(self):
            if self.share == 0.5:
                raise ValueError("half")

    assert Some([2, 3]).count == (2, 3) and Some(np.int32(4)).count == 4
    assert type(Some(share=1).share) is float and type(Some(np.int64(4)).count) is int
    with pytest.raises(ValueError, match="half"):
        Some(share=np.float32(0.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Some().share = 1.0
    with pytest.raises(ValueError, match="share is 2"):
        dataclasses.replace(Some(), share=2)


@pytest.mark.parametrize(
    "kind, says",
    [
        (Count, "a whole number from 1 to 1,000,000,000"),
        (Share | None, "a number from 0 to 1 or None"),
        (Annotated[float, Meta(gt=0)], "a number above 0"),
        (Literal["a", 3], "one of 'a', 3"),
        (bool, "True or False"),
        (tuple[Count, ...], "a tuple of which each is a whole number from 1 to 1,000,000,000"),
    ],
)
def test_what_is_expected_is_said_in_words(kind, says):
    assert expected(kind) == says
    with pytest.raises(ValueError, match="^x is {'a': 1}; it must be ") as error:
        checked("x", {"a": 1}, kind)
    assert says in str(error.value)


def test_arguments_are_checked_before_the_call():
    calls = []

    @checks
    def function(model, steps: Count, *, seed: Seed = 0, where: "object" = None, **more):
        calls.append((model, steps, seed, more))
        return steps

    assert function("m", np.int64(3), seed=-5, other=1) == 3 and calls == [
        ("m", 3, -5, {"other": 1})
    ]
    for bad in ({"steps": "3"}, {"steps": 3, "seed": 2.5}):
        with pytest.raises(ValueError, match="; it must be a whole number"):
            function(None, **bad)
    with pytest.raises(TypeError, match="steps"):
        function("m")
    assert len(calls) == 1


def test_public_calls_check_their_arguments():
    for call, name in (
        (lambda v: load_digits(v), "batch_size"),
        (lambda v: token_loaders(None, v, 8), "batch_size"),
        (lambda v: CompressionPipeline(None, v), "target_compression"),
        (lambda v: CompressionPipeline(None, lr=v), "lr"),
        (lambda v: CompressionPipeline.run_pipeline(None, [], [], qat_epochs=v), "qat_epochs"),
    ):
        for value in ("3", None, math.inf, math.nan, True, -1):
            with pytest.raises(ValueError, match=f"^{name} is .*; it must be ") as error:
                call(value)
            assert "\n" not in str(error.value)


def test_the_check_imports_little():
    code = "import sys, kit.core.settings; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
