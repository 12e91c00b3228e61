"""What the package promises about its own build: who imports whom, and how much of it there is."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kit

ROOT = Path(kit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LINES = 10_500
WIDTH = 100
FLOORS = [  # from the ground up: a room imports itself and what stands on lower floors
    {"core"},
    {"models", "data"},
    {"training"},
    {"quantization"},
    {"pruning"},
    {"artifact"},
    {"budget"},
    {"distillation", "engines"},
    {"pipeline"},
    {"production"},
    {"lab"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(file):
    """Name of the first folder or file below kit."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imported(file):
    """Dotted names below kit that a file imports, wherever in it, as tuples without `kit`."""
    package = ("kit", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name[1:]) for name in names if name[0] == "kit")


def wrong_imports(files):
    """Imports of a room that is not below the importing one, as `file:line imports room`."""
    for file in files:
        room = room_of(file)
        for line, name in imported(file):
            if name == ("__version__",):
                continue
            target = name[0] if name and name[0] in FLOOR else "kit"  # its face: as high as the top
            if target != room and FLOOR.get(target, FLOOR["production"]) >= FLOOR[room]:
                yield f"{file.relative_to(ROOT.parent)}:{line} imports {target}"


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} - {"__init__"} == set(FLOOR)


def test_the_face_of_the_package_imports_nothing_of_it():
    assert list(imported(ROOT / "__init__.py")) == []


@pytest.mark.parametrize("room", FLOOR)
def test_rooms_import_only_what_is_below_them(room):
    assert list(wrong_imports(file for file in FILES if room_of(file) == room)) == []


def test_imports_are_found_wherever_they_stand(tmp_path, monkeypatch):
    source = """
        import kit.lab.plots as plots
        from .. import artifact
        from . import store
        from kit import pipeline
        def f():
            from kit.models import build_model
    """
    file = tmp_path / "core" / "x.py"
    file.parent.mkdir()
    file.write_text("\n".join(line[8:] for line in source.splitlines()))
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = [line.split(" imports ")[1] for line in wrong_imports([file])]
    assert sorted(found) == ["artifact", "lab", "models", "pipeline"]


def test_imports_of_kit_are_absolute():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            relative = isinstance(node, ast.ImportFrom) and node.level
            assert not relative, f"{file.relative_to(ROOT.parent)}:{node.lineno}"


def test_models_are_not_recognized_by_the_names_of_their_attributes():
    asks = re.compile(r"\b(has|get)attr\([^)]*,\s*[\"'](hidden|output)[\"']")
    found = [str(file) for file in FILES if asks.search(file.read_text())]
    assert found == []


def test_lines_fit_the_width():
    wide = [
        f"{file.relative_to(ROOT.parent)}:{number}"
        for file in FILES
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert wide == []


def test_the_kit_is_thin():
    assert sum(len(file.read_text().splitlines()) for file in FILES) <= LINES


STATE = """
import os
environment = dict(os.environ)
import torch
def state():
    names = ("get_num_threads", "get_num_interop_threads", "get_default_dtype", "initial_seed",
             "is_grad_enabled", "get_float32_matmul_precision")
    return [getattr(torch, name)() for name in names] + [torch.backends.mkldnn.enabled]
before = state()
import kit, kit.production, kit.pipeline, kit.lab.baseline
assert state() == before, (before, state())
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
"""


def test_importing_changes_no_global_state():
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment["PYTHONPATH"] = str(ROOT.parent)
    run = [sys.executable, "-c", STATE]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
