"""Every notebook runs by papermill on the smoke profile; nbval compares what committed cells show.

Each execution is one process with one thread, and two are at work at a time.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from kit.lab.execute import clean
from tests.test_opened import saved

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMPARED = [path for path in NOTEBOOKS if "NBVAL_CHECK_OUTPUT" in path.read_text()]


def run(arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "KIT_PROFILE": "smoke"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def parameters_of(notebook):
    cells = nbformat.read(notebook, 4).cells
    return next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))


def papermill(notebook, folder, *more):
    parameters = parameters_of(notebook)
    arguments = ["papermill", "-k", "python3", str(notebook), str(folder / notebook.name)]
    if "vocab_size" in parameters:
        arguments += ["-f", str(ROOT / "notebooks/params/smoke.yaml")]
    if "out = " in parameters:
        arguments += ["-p", "out", str(folder / "run")]
    return run([*arguments, *more])


def nbval(notebook):
    options = ["--nbval-lax", "--nbval-current-env", "-q", "-c", os.devnull]
    return run(["pytest", *options, str(notebook)])


@pytest.fixture(scope="module")
def executions(request, tmp_path_factory):
    """What the chosen tests wait for, by function and notebook: (future, folder)."""
    made = {}
    with ThreadPoolExecutor(2) as pool:
        for item in request.session.items:
            if item.path != request.path or "executions" not in item.fixturenames:
                continue
            test, notebook = item.originalname, item.callspec.params["notebook"]
            folder = tmp_path_factory.mktemp(notebook.stem)
            if test == "test_papermill_runs_on_the_smoke_profile":
                made[test, notebook] = pool.submit(papermill, notebook, folder), folder
            else:
                made[test, notebook] = pool.submit(nbval, notebook), folder
        yield made
        for execution, _ in made.values():
            execution.cancel()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_runs_on_the_smoke_profile(notebook, executions):
    execution, folder = executions["test_papermill_runs_on_the_smoke_profile", notebook]
    done = execution.result()
    assert done.returncode == 0, done.stderr[-3000:]
    if "out = " in parameters_of(notebook):
        record = json.loads((folder / "run" / "result.json").read_text())
        assert record["notebook"] == notebook.stem


def test_a_pretrained_model_goes_through_the_pipeline(tmp_path):
    notebook, model = ROOT / "notebooks/05_full_pipeline.ipynb", saved(tmp_path / "model")
    done = papermill(notebook, tmp_path, "-p", "model", model, "-p", "train_bytes", "60000")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["parameters"]["model"] == model and record["curves"]["dense"] == []
    assert record["bytes"] <= record["dense"]["bytes"] / 6
    assert record["tied_bytes"] == record["dense"]["bytes"]  # GPT-2 has one table


@pytest.mark.parametrize("notebook", COMPARED, ids=lambda p: p.stem)
def test_committed_notebooks_still_say_what_they_said(notebook, executions):
    execution, _ = executions["test_committed_notebooks_still_say_what_they_said", notebook]
    done = execution.result()
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_executed_and_clean(notebook):
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type != "code":
            continue
        assert cell.execution_count, f"not executed: {cell.source[:60]}"
        tags = cell.metadata.get("tags", [])
        assert "parameters" in tags or len(cell.source.splitlines()) <= 25
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text[:200]


TOLD = [path for path in NOTEBOOKS if path.stem[:2] != "07"]
FORM = re.compile(r'(\w+) = (.*?)  #@param (\[.*?\])? ?(?:\{(?:type:"(\w+)"|allow-input: true)\})?')
FORMS = {bool: "boolean", int: "integer", float: "number", str: "string"}


@pytest.mark.parametrize("notebook", TOLD, ids=lambda p: p.stem)
def test_cells_are_short_and_forms_are_the_parameters(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert f"/notebooks/{notebook.name})" in cells[0].source, "the badge opens this notebook"
    code = [cell for cell in cells if cell.cell_type == "code"]
    for cell in code:
        lines = cell.source.splitlines()
        if "parameters" in cell.metadata.get("tags", []):
            lines = [line for line in lines if not line.startswith("#@markdown ")]
            for name, value, choices, kind in (FORM.fullmatch(line).groups() for line in lines):
                assert choices or kind == FORMS.get(type(eval(value)), "raw"), name
        else:
            assert len(lines) <= 15, cell.source[:60]
        assert all(len(line) <= 100 for line in lines if "#@param" not in line), cell.source[:60]
    assert code[0].source == nbformat.read(NOTEBOOKS[1], 4).cells[1].source, "one setup cell"


def numbers(text):
    return {float(n) for n in re.findall(r"(?<![\d.,])[+-]?\d+\.\d+", text)}


README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [r for r in README.split("## Measured")[1].splitlines() if re.search(r"\| \d\d \|$", r)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:30])
def test_the_readme_says_what_the_notebooks_show(row):
    *_, number, _ = (part.strip() for part in row.split("|"))
    cells = nbformat.read(next(ROOT.glob(f"notebooks/{number}_*.ipynb")), 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    if not all(cell.execution_count for cell in code):
        pytest.skip("the notebook waits for its execution")
    outputs = [output for cell in code for output in cell.outputs]
    texts = ["".join(o.get("text", "")) + str(o.get("data", "")) for o in outputs]
    if number == "09":  # it draws what this holds
        texts += [f.read_text() for f in ROOT.glob("notebooks/reference/pretrained/*.json")]
    shown = {sign * n for n in numbers(" ".join(texts)) for sign in (1, -1)}
    for stated in numbers(row):
        places = len(str(stated).split(".")[1])
        assert any(round(n, places) == stated for n in shown), (stated, "is in no output")


def test_the_readme_says_what_the_records_hold():
    folders = sorted((ROOT / "notebooks/reference").glob("*-100x-?"))
    runs = {f.name: json.loads((f / "result.json").read_text()) for f in folders}
    best = runs["docs-100x-0"]
    worse = {
        name: 100 * (r["perplexity"] / r["dense"]["perplexity"] - 1) for name, r in runs.items()
    }
    docs = [value for name, value in worse.items() if name.startswith("docs")]
    novels = max(value for name, value in worse.items() if name.startswith("novels"))
    tied = best["dense"]["bytes"] / best["bytes"]
    says = [f"{best['bytes']:,} bytes", f"{best['ratio']:.0f}x", f"{tied:.1f}x", f"{novels:.1f} %"]
    says += [f"+{min(docs):.1f} to +{max(docs):.1f} %"]
    assert [text for text in says if text not in README] == []
    assert len(README.splitlines()) <= 120


def test_what_execution_leaves_behind_is_cleaned():
    progress = {"output_type": "stream", "name": "stderr", "text": "\r 10%|#"}
    warning = {"output_type": "stream", "name": "stderr", "text": "Warning: old\n"}
    log = "step 10/90  loss 3.1\nhint: this machine is busy (x)\n"
    said = {"output_type": "stream", "name": "stdout", "text": f"{log}in {ROOT}/runs: 3 bytes\n"}
    mute = {"output_type": "stream", "name": "stdout", "text": log}
    widget = {"application/vnd.jupyter.widget-view+json": {}}
    shown = {"output_type": "display_data", "metadata": {}, "data": widget}
    source = nbformat.v4.new_code_cell("1", metadata={"tags": ["parameters"], "papermill": {}})
    source.outputs = [nbformat.from_dict(o) for o in (progress, warning, said, mute, shown)]
    notebook = nbformat.v4.new_notebook(cells=[source], metadata={"papermill": {"x": 1}})
    assert clean(notebook) == [(0, "Warning: old")]
    assert [output.text for output in source.outputs] == ["in runs: 3 bytes\n"]
    assert source.metadata == {"tags": ["parameters"]} and "papermill" not in notebook.metadata
