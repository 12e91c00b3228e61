"""What the package promises of its own build: who imports whom, how much of it there is, and that
the examples of kit/README.md do what they say."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kit
from kit import artifact
from kit.artifact.layouts import Entries
from kit.core.protocols import LanguageModel, call_with
from kit.core.steps import STEPS
from kit.core.weights import copy_model, weights
from kit.data import load_corpus
from kit.data.corpus import CORPORA
from kit.distillation.divergences import DIVERGENCES, soft_loss
from kit.engines import build_engine
from kit.pruning import MagnitudePruner
from kit.pruning.criteria import CRITERIA
from kit.quantization import Format, pack_layers, quantize_weights

ROOT = Path(kit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LINES = 13_940
WIDTH = 100
README = (ROOT / "README.md").read_text()
FLOORS = [  # from the ground up: a room imports itself and what stands on lower floors
    {"core"},
    {"models", "data"},
    {"training"},
    {"quantization"},
    {"pruning"},
    {"artifact"},
    {"budget", "hub"},
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


@pytest.mark.parametrize("room", sorted(FLOOR))
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
import kit, kit.production, kit.pipeline, kit.lab.records
assert state() == before, (before, state())
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
"""


def test_importing_changes_no_global_state():
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment["PYTHONPATH"] = str(ROOT.parent)
    run = [sys.executable, "-c", STATE]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_file():
    named, room = set(), ""
    for line in README.split("```")[1].splitlines():
        if line[:1].strip():
            room = line.split()[0]
        if room.endswith("/"):
            named |= {f"{room}{name}.py" for name in line[15:45].split()}
        elif room:
            named.add(room)
    assert named == {str(f.relative_to(ROOT)) for f in FILES if f.stem != "__init__"}


@pytest.fixture
def readme(monkeypatch, tmp_path):
    """What the examples of kit/README.md define."""
    monkeypatch.chdir(tmp_path)
    for registry in (STEPS, CORPORA, DIVERGENCES, CRITERIA):
        for name in list(registry):
            monkeypatch.setitem(registry, name, registry[name])  # so that what is added goes again
    before = [(registry, set(registry)) for registry in (STEPS, CORPORA, DIVERGENCES, CRITERIA)]
    made = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, made)
    yield made
    for registry, names in before:
        for name in set(registry) - names:
            del registry[name]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(72, 6)).eval()


def test_the_readme_s_quantizer_is_stored_trained_and_resized(readme, tmp_path):
    model, x = small_model(), torch.randn(3, 2, 5, 5)
    MagnitudePruner(model).prune(0.5)
    readme["quantize_signs"](model)
    assert len(model[2].weight[0].unique()) == 3
    size = artifact.save(model, tmp_path / "signs.kit")
    assert size < 0.25 * artifact.float32_bytes(model)
    for trainable in (False, True):
        again = artifact.load(tmp_path / "signs.kit", small_model(), trainable=trainable)
        assert torch.equal(again(x), model(x))
    assert artifact.save(again, tmp_path / "again.kit") == size
    again(x).sum().backward()
    assert again[2].parametrizations.weight.original.grad.abs().sum() > 0
    (weight,) = weights(again, "2.weight")
    before = weight.value
    weight.select(lambda tensor: tensor[::2])
    assert torch.equal(weight.value, before[::2])


def test_the_readme_s_everyday_calls(readme):
    x = torch.randn(3, 8)
    assert (readme["model"][0].weight == 0).sum() >= 24 and readme["size"] < 600
    assert torch.equal(readme["trained_on"](x), readme["model"](x))
    assert torch.equal(readme["floats"](x), readme["model"](x))
    assert not torch.equal(readme["original"](x), readme["model"](x))


def test_the_readme_s_quantizer_keeps_the_dtype(readme, tmp_path):
    model = small_model().bfloat16()
    readme["quantize_signs"](model)
    assert model[2].weight.dtype == torch.bfloat16
    artifact.save(model, tmp_path / "half.kit")
    again = artifact.load(tmp_path / "half.kit", small_model().bfloat16())
    assert torch.equal(again[2].weight, model[2].weight)


def test_the_readme_s_column_scales_help_are_stored_and_resized(readme, tmp_path):
    torch.manual_seed(0)
    scaled, format, path = readme["scaled_rounding"], Format(4), tmp_path / "scaled.kit"
    layer, x = nn.Linear(128, 16), torch.randn(64, 128)
    x[:, 5] *= 30.0  # a loud input
    nn.init.normal_(layer.weight)
    ways = scaled(copy_model(layer), [x], format), quantize_weights(copy_model(layer), format)
    errors = [(way(x) - layer(x)).square().mean() for way in ways]
    assert errors[0] < 0.6 * errors[1]

    conv = nn.Conv2d(4, 8, 3, groups=2)
    blank = nn.Sequential(conv, nn.Flatten(), nn.Linear(72, 6)).eval()
    x = torch.randn(64, 4, 5, 5)
    model = scaled(copy_model(blank), [x], format)
    for trainable in (False, True):
        artifact.save(model, path)
        again = artifact.load(path, copy_model(blank), trainable=trainable)
        assert torch.equal(again(x), model(x))
    assert torch.allclose(build_engine(model, "float32", call_with(x))(x), model(x), atol=1e-4)
    with pytest.raises(ValueError, match="no Linear or Conv2d for INT8 kernels"):
        build_engine(model, "torch-int8", call_with(x))
    assert torch.equal(pack_layers(model)(x), model(x))
    for name, select in (
        ("2.weight", lambda t: t[:, ::2]),
        ("0.weight", lambda t: t[[0, 1, 4, 5]]),
    ):
        (weight,) = weights(model, name)
        before = weight.value
        weight.select(select)
        assert torch.allclose(weight.value, select(before), rtol=0.3, atol=0.05)
        assert torch.equal(weight.steps[-1].scale, weight.steps[-1].scale.half().float())


def test_the_readme_s_other_doors(readme, tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_CACHE", str(tmp_path))
    model = MagnitudePruner(small_model(), score="relative", scope="global").prune(0.5)
    assert sum(int((w.value == 0).sum()) for w in weights(model, matrices=True)) == 288
    logits = torch.randn(2, 5, 7)
    loss = soft_loss(logits, torch.randn(2, 5, 7), kind="squared", temperature=1.0)
    assert loss.shape == (2, 5) and (soft_loss(logits, logits, kind="squared") == 0).all()
    assert load_corpus("numbers", 300).test.size > 100
    layout, kind = readme["AllZero"](), Entries((2, 3), torch.float32)
    assert layout.encode(kind, kind.array(torch.eye(2, 3))) is None
    zeros = kind.array(torch.zeros(2, 3))
    assert np.array_equal(layout.decode(kind, layout.encode(kind, zeros)), zeros)
    gpt = nn.Module()
    gpt.transformer = lambda ids: (embedding(ids),)
    embedding, gpt.lm_head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    adapted = readme["as_language_model"](gpt)
    assert isinstance(adapted, LanguageModel)
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(adapted(ids), gpt.lm_head(embedding(ids)))
