"""Every notebook runs by papermill on the smoke profile; nbval compares what committed cells show.

Each execution is one process with one thread, and two are at work at a time.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

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


def papermill(notebook, folder):
    parameters = parameters_of(notebook)
    arguments = ["papermill", "-k", "python3", str(notebook), str(folder / notebook.name)]
    if "vocab_size" in parameters:
        arguments += ["-f", str(ROOT / "notebooks/params/smoke.yaml")]
    if "out = " in parameters:
        arguments += ["-p", "out", str(folder / "run")]
    return run(arguments)


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
        assert len(cell.source.splitlines()) <= 25
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text[:200]
