"""Every parameter of every notebook is checked in the first cell after the parameters."""

import math
from pathlib import Path

import nbformat
import pytest

from kit.lab import parameters
from kit.lab.parameters import KINDS, assigned

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
WRONG = ("abc", "", None, 2.5, math.nan, math.inf, True, -1, 10**12, [], ["x"], {}, 0)


@pytest.fixture(autouse=True)
def no_profile(monkeypatch):
    monkeypatch.delenv("KIT_PROFILE", raising=False)


def first_cells(notebook):
    """Source of the parameters cell, and what of the next one checks it."""
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags", []) for cell in cells]
    at = next(i for i, names in enumerate(tags) if "parameters" in names)
    checks = [line for line in cells[at + 1].source.splitlines() if "parameters(" in line]
    assert len(checks) == 1, "the cell after the parameters checks them"
    return cells[at].source, f"from kit.lab.parameters import MODELS, OWN, parameters\n{checks[0]}"


def run(notebook, injected=""):
    source, check = first_cells(notebook)
    namespace = {"In": ["", source, injected]}
    exec(source, namespace)
    exec(injected, namespace)
    exec(check, namespace)
    return namespace


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_wrong_values_are_one_sentence(notebook, capsys):
    names = assigned(first_cells(notebook)[0])
    run(notebook)
    printed = capsys.readouterr().out
    for name in names:
        assert name in KINDS and f"{name}=" in printed
        refused = 0
        for value in WRONG:
            namespace = {"value": value}
            source, check = first_cells(notebook)
            exec(source, namespace)
            namespace[name] = value
            try:
                exec(check, namespace)
            except ValueError as error:
                refused += 1
                assert str(error).startswith(f"{name} is ") and "; it must be " in str(error)
                assert "\n" not in str(error)
        assert refused >= 6, (name, refused)


FIVE = next(path for path in NOTEBOOKS if path.stem == "05_full_pipeline")


def test_what_papermill_was_given_wins_over_the_profile(monkeypatch, capsys):
    monkeypatch.setenv("KIT_PROFILE", "smoke")
    given = run(FIVE, "# Parameters\ntarget_compression = 12\nsteps = 1000\n")
    assert (given["target_compression"], given["steps"]) == (12.0, 1000)
    assert given["vocab_size"] == 512 and given["out"] == "runs-smoke/05_full_pipeline"
    assert "target_compression=12.0" in capsys.readouterr().out
    assert run(FIVE)["target_compression"] == 6.0


def test_a_parameter_that_there_is_not_is_told():
    with pytest.raises(ValueError, match="no parameter 'step'; did you mean 'steps'"):
        run(FIVE, "# Parameters\nstep = 3\n")


def test_a_name_that_means_something_else_has_the_type_of_its_default():
    assert parameters.chosen("seeds", [1, 2], [0]) == [1, 2]
    assert parameters.chosen("steps", 3, 1) == 3
    for name, value, default in (("seeds", 3, [0]), ("steps", -1, 1), ("other", "x", 1)):
        with pytest.raises(ValueError, match=f"^{name} is "):
            parameters.chosen(name, value, default)


def test_a_model_that_a_notebook_is_not_for_is_refused_in_one_sentence(tmp_path):
    own, folder, empty = tmp_path / "mine.py", tmp_path / "model", tmp_path / "empty"
    own.write_text("")
    folder.mkdir()
    empty.mkdir()
    (folder / "config.json").write_text("{}")
    known = parameters.MODELS
    for model in ("lstm", f"{own}:make", f"hf:{folder}", "hf:gpt2", "hf:org/some-model.1"):
        assert parameters.parameters({"model": model}, known)["model"] == model
    for model, models in (
        ("gru", known),
        ("gpt2", known),
        ("lstm", ["resnet_bk"]),
        (f"{own}:make", known[:3]),
        (f"hf:{folder}", ["resnet_bk"]),
        (f"{own}x:make", known),
        (f"{own}", known),
        (f"{folder}", known),
        (f"hf:{empty}", known),
        (f"hf:{tmp_path / 'nothing'}", known),
        (f"hf:{folder / 'config.json'}", known),
        ("hf:", known),
        ("hf:a/b/c", known),
        (parameters.PRETRAINED, known),
    ):
        with pytest.raises(ValueError, match="^model is .*; it must be one of [^\n]*09_pretrained"):
            parameters.parameters({"model": model}, models)
    for model, says in (
        (f"{own}:", "names no function"),
        ("none.py:make", "none.py is not there"),
        (parameters.OWN, "file.py is not there"),
    ):
        with pytest.raises(ValueError, match=f"^model is .*; it must be one of [^\n]*{says}"):
            parameters.parameters({"model": model}, known)


def test_a_tracker_that_is_not_installed_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="track is 'mlflow', which is not installed: pip install"):
        parameters.parameters({"track": "mlflow"})
