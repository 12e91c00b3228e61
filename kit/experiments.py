"""Batches of notebooks: a grid of parameters becomes one papermill process a run, each in its own folder.

    python -m kit.experiments notebooks/05_full_pipeline.ipynb grid.yaml --jobs 2

where ``grid.yaml`` holds a grid (every combination) or a list of runs, and the seeds each is run with:

    grid:
      target_compression: [30, 100]
      vocab_size: [2048, 4096]
    seeds: [0, 1, 2]
"""

import argparse
import ast
import difflib
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

import kit
from kit.results import RESULT, read_results, write_json

ROOT = Path(kit.__file__).resolve().parent.parent
PROFILES = ROOT / "notebooks" / "params"
STATUS, LOG, PARAMETERS = "status.json", "log.txt", "parameters.yaml"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
_NO_START = ("Address already in use", "Kernel died before replying", "Kernel didn't respond")


def profile_overrides(namespace: Mapping) -> dict:
    """The values of ``notebooks/params/$KIT_PROFILE.yaml`` whose names exist in `namespace`; {} when it is not set.

    Raises:
        ValueError: there is no such profile.
    """
    name = os.environ.get("KIT_PROFILE")
    if not name:
        return {}
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"KIT_PROFILE is {name!r}, expected one of {', '.join(known)} (the files in {PROFILES}).")
    profile = yaml.safe_load((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in profile.items() if key in namespace}


@dataclass(frozen=True)
class Run:
    """One notebook with the parameters that differ from its own, and the folder that receives everything it writes."""

    notebook: Path
    parameters: dict
    folder: Path

    def command(self) -> list[str]:
        return [sys.executable, "-m", "papermill", str(self.notebook), str(self.folder / self.notebook.name),
                "-k", "python3", "-f", str(self.folder / PARAMETERS), "--log-output", "--no-progress-bar"]

    def prepare(self) -> None:
        """Write the parameters; remove the results of an earlier attempt, but not what it can resume from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, STATUS):
            (self.folder / name).unlink(missing_ok=True)
        text = yaml.safe_dump({**self.parameters, "out": str(self.folder)}, sort_keys=False)
        (self.folder / PARAMETERS).write_text(text, encoding="utf-8")

    def state(self) -> str:
        """"finished", "failed", "running" (in some living process) or "new" (also: cut short)."""
        try:
            status = json.loads((self.folder / STATUS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "new"
        if "exit_code" not in status:
            return "running" if _alive(status["pid"], status["started"]) else "new"
        return "finished" if status["exit_code"] == 0 and (self.folder / RESULT).exists() else "failed"

    def last_lines(self, count: int = 12) -> str:
        """The end of its log."""
        log = self.folder / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines() if log.exists() else []
        return "\n".join(lines[-count:])


@dataclass(frozen=True)
class Batch:
    """What a batch gave: a row a finished run, the plot of compression against quality (None where the records hold no
    sizes), and for each failed run the end of its log."""

    frame: pd.DataFrame
    axes: object | None
    failed: dict = field(default_factory=dict)


def plan(notebook: str | Path, grid: Mapping | Sequence[Mapping], seeds: Sequence[int] = (),
         folder: str | Path = "runs") -> list[Run]:
    """The runs of a batch, checked against the notebook before anything starts.

    Args:
        grid: name -> list of values (every combination is run), or a list of dicts (each is run).
        seeds: each is combined with each of those as the parameter ``seed``.
        folder: receives a folder a run, named by what differs from the notebook's own values and a hash of the
            notebook's code, all its parameters and the version of the kit. A profile in ``$KIT_PROFILE`` applies first.

    Raises:
        ValueError: a name that is not a parameter of the notebook, or a value of another type than its default.
        FileNotFoundError: no such notebook.
    """
    notebook = Path(notebook).resolve()
    if not notebook.is_file():
        raise FileNotFoundError(f"There is no notebook {notebook}.")
    defaults = notebook_defaults(notebook)
    if "out" not in defaults:
        raise ValueError(f"{notebook.name} has no parameter 'out', which a batch sets to the folder of the run.")
    runs = {}
    for chosen in combinations(grid, seeds):
        for name, value in chosen.items():
            check_parameter(notebook.name, name, value, defaults)
        runs_as = {**profile_overrides(defaults), **chosen}
        run = Run(notebook, runs_as, Path(folder).resolve() / _folder_name(notebook, runs_as, defaults))
        runs[run.folder] = run
    return list(runs.values())


def run_batch(notebook: str | Path, grid: Mapping | Sequence[Mapping], seeds: Sequence[int] = (), *, jobs: int = 1,
              folder: str | Path = "runs", retry: bool = False) -> Batch:
    """Run a grid of parameters (see `plan`), `jobs` at a time, and read the records.

    Finished runs are skipped and runs that were cut short start again in their folder, so a second call continues.
    Failed runs are started again with `retry`. A run has finished when papermill exits with 0 and ``result.json`` is
    there. Each process may use cores / jobs threads.

    Raises:
        ValueError: see `plan`; also more jobs than cores.
        KeyboardInterrupt: passed on after ending the processes.
    """
    if not 1 <= jobs <= _cores():
        raise ValueError(f"jobs is {jobs}, expected 1 to {_cores()}, the cores of this machine.")
    runs = plan(notebook, grid, seeds, folder)
    _execute([run for run in runs if run.state() == "new" or (retry and run.state() == "failed")], len(runs), jobs)
    states = {run: run.state() for run in runs} if False else [(run, run.state()) for run in runs]
    frame = read_results([run.folder for run, state in states if state == "finished"])
    failed = {run.folder.name: run.last_lines() for run, state in states if state == "failed"}
    return Batch(frame, _pareto(frame), failed)
