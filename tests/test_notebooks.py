"""Every notebook runs by papermill on the smoke profile, and as committed under nbval."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(arguments, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_runs_on_the_smoke_profile(notebook, tmp_path):
    source = nbformat.read(notebook, 4)
    parameters = next(c.source for c in source.cells if "parameters" in c.metadata.get("tags", []))
    arguments = ["papermill", "-k", "python3", str(notebook), str(tmp_path / notebook.name)]
    if "vocab_size" in parameters:
        arguments += ["-f", str(ROOT / "notebooks/params/smoke.yaml")]
    if "out = " in parameters:
        arguments += ["-p", "out", str(tmp_path / "run")]
    done = run(arguments, KIT_PROFILE="smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    if "out = " in parameters:
        record = json.loads((tmp_path / "run" / "result.json").read_text())
        assert record["notebook"] == notebook.stem


def test_committed_notebooks_still_say_what_they_said():
    done = run(["pytest", "--nbval-lax", "--nbval-current-env", "-q", "-c", os.devnull, "notebooks"], KIT_PROFILE="smoke")
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
