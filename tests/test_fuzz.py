"""Some mutants of every file that the kit reads, with a fixed seed: `python -m tests.fuzz` has
more. Each loads right or is refused in one sentence, in time and memory."""

import random

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.mutations import mutated_bytes, mutated_json
from tests.fuzz.readers import READERS, Base, Contradiction, Reader
from tests.fuzz.workers import BAD, Worker

MUTANTS = {"artifact": 150, "checkpoint": 40, "text": 20, "token cache": 10}


@pytest.fixture(scope="module")
def found():
    names = [reader.name for reader in READERS]
    return run(names, 60, 7, {name: MUTANTS.get(name, 60) for name in names})


@pytest.mark.parametrize("name", [reader.name for reader in READERS])
def test_mutants_load_right_or_are_refused_in_one_sentence(name, found):
    one = found[name]
    assert one["mutants"] >= 10 and one["mutants"] > sum(one[outcome] for outcome in BAD)
    assert one["examples"] == []
    assert one["refused"] or name == "token cache"  # which is made again


def test_mutants_are_reproducible_and_differ():
    data, value = bytes(range(100)), {"a": [1, 2.5, {"b": "c"}], "d": None}
    made = [mutated_bytes(data, random.Random(seed)) for seed in range(50)]
    assert made == [mutated_bytes(data, random.Random(seed)) for seed in range(50)]
    assert len({*made}) > 40 and sum(one == data for one in made) < 10
    texts = [repr(mutated_json(value, random.Random(seed))) for seed in range(50)]
    assert len({*texts}) > 25 and value == {"a": [1, 2.5, {"b": "c"}], "d": None}


class Wrong(Reader):
    """A reader that fails in every way."""

    name, kinds = "wrong", ("bytes",)
    ways = "hang memory killed exception lines contradiction refused".split()
    bases = [Base(way, {"file": way.encode()}) for way in ways]

    def write(self, folder, base, kind, rng):
        (folder / "file").write_bytes(base.data)
        self.honest = kind is None

    def read(self, folder, base):
        if self.honest:
            return "equal"
        while base.name == "hang":
            pass
        if base.name == "memory":
            self.held = bytearray(b"x") * 2**26
        if base.name == "killed":
            import os

            os.abort()
        errors = {"exception": KeyError("a"), "lines": ValueError("a\nb")}
        errors |= {"contradiction": Contradiction("no"), "refused": ValueError("a sentence")}
        if base.name in errors:
            raise errors[base.name]
        return "other"


def test_the_harness_sees_what_goes_wrong():
    worker = Worker({"wrong": Wrong()})
    said = {base.name: worker("wrong", i, i)["outcome"] for i, base in enumerate(Wrong.bases)}
    worker.close()
    assert said == {
        name: {"lines": "exception"}.get(name, name) for name in (base.name for base in Wrong.bases)
    }
