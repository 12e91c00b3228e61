"""The runs of a batch: a notebook with parameters in a folder each, and how to execute it."""

import ast
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import yaml
from filelock import Timeout
from msgspec import defstruct

import kit
from kit.core.settings import Meta, Seed, checked
from kit.core.store import digest, lock, read_json
from kit.lab.parameters import assigned, chosen, profile_overrides, unknown
from kit.lab.records import RESULT, ROOT

STATUS, LOG, PARAMETERS = "status.json", "log.txt", "parameters.yaml"
THREADS = [f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA", "RAYON")]
NO_START = "Address already in use|Kernel died before replying|Kernel didn't respond"
MARK = "KIT_RUN"  # names a run's folder in the environment of its processes
LOOK = 0.2  # seconds between two looks at a process
Grid = dict[str, Annotated[list, Meta(min_length=1)]] | Annotated[list[dict], Meta(min_length=1)]
Tags = defstruct("Tags", [("tags", list[str], [])])
Cell = defstruct("Cell", [("cell_type", str), ("source", str | list[str]), ("metadata", Tags)])
Notebook = defstruct("Notebook", [("cells", list[Cell])])


@dataclass(frozen=True)
class Run:
    """A notebook, the parameters that differ from its own, the folder for what it writes, and the
    parameters that the grid gave."""

    notebook: Path
    parameters: dict
    folder: Path
    swept: dict

    def command(self) -> list[str]:
        files = [str(self.notebook), str(self.folder / self.notebook.name)]
        options = ["-f", str(self.folder / PARAMETERS), "--log-output", "--no-progress-bar"]
        return [sys.executable, "-m", "kit.lab.child", *files, "-k", "python3", *options]

    def claim(self, seconds: float = 0):
        """The lock of who runs it, gone with its process. Raises Timeout when another has it."""
        return lock(self.folder / "run").acquire(timeout=seconds)

    def state(self) -> str:
        """One of "running" (by anybody), "new" (also when it was cut short), "finished" with exit
        code 0 and a record, and "failed"."""
        try:
            with self.claim() if self.folder.exists() else contextlib.nullcontext():
                return self.outcome()
        except Timeout:
            return "running"

    def outcome(self) -> str:
        """The state of a run that nobody runs. Raises ValueError for a damaged status."""
        if not (file := self.folder / STATUS).exists():
            return "new"
        try:
            code = checked("exit_code", json.loads(file.read_bytes())["exit_code"], int)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{file} is damaged: delete it to run this again.") from None
        done = code == 0 and (self.folder / RESULT).exists()
        return "new" if code < 0 else "finished" if done else "failed"

    def last_lines(self, count: int = 12) -> str:
        """The end of its log."""
        file = self.folder / LOG
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        return "\n".join(text.rstrip().splitlines()[-count:])

    def execute(self, stopped: Callable[[], bool], threads: int) -> int | None:
        """Runs the notebook in its folder; the exit code, or None when it was stopped. An earlier
        record goes; what the run can resume from stays."""
        _end(self.folder)  # a kernel outlives a killed papermill by a second
        for file in (RESULT, STATUS):
            (self.folder / file).unlink(missing_ok=True)
        text = yaml.safe_dump({**self.parameters, "out": str(self.folder)}, sort_keys=False)
        (self.folder / PARAMETERS).write_text(text, encoding="utf-8")
        environment = {**os.environ, **dict.fromkeys(THREADS, str(threads)), MARK: str(self.folder)}
        environment.pop("KIT_PROFILE", None)  # its values are among the parameters
        for _ in range(2):  # a kernel that did not start is started once more
            with open(self.folder / LOG, "w") as log:
                files = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
                options = {"cwd": ROOT, "env": environment, "start_new_session": True}
                process = subprocess.Popen(self.command(), **files, **options)
            while (code := process.poll()) is None and not stopped():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK)
            process.stdin.close()  # which ends it
            process.wait()
            if not code or not re.search(NO_START, self.last_lines(50)):
                break
        return code


def _end(folder: Path) -> None:
    """Ends the processes of the run in this folder."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder) and process.pid != os.getpid():
                process.kill()


def plan(notebook: str | Path, grid: Grid, seeds: Sequence[int] = (), folder="runs") -> list[Run]:
    """The runs of a batch, checked against the notebook before anything starts.

    grid: name -> list of values, of which every combination is run, or a list of dicts; each with
    each of the seeds, after what the profile `$KIT_PROFILE` sets. A run's folder in `folder` is
    named by what the grid gave and a hash of code, all parameters and version. Raises ValueError or
    FileNotFoundError for a notebook, name or value (`parameters.chosen`) that does not fit.
    """
    notebook, runs = Path(notebook).resolve(), {}
    if not notebook.is_file():
        raise FileNotFoundError(f"There is no notebook {notebook}.")
    defaults = _defaults(notebook)
    if "out" not in defaults:
        raise ValueError(f"{notebook.name} has no parameter 'out', which a batch sets.")
    for given in _combinations(grid, seeds):
        if "out" in given:
            raise ValueError("The batch sets 'out' itself, a folder for each run: remove it.")
        for name in given.keys() - defaults.keys():
            raise ValueError(unknown(notebook.name, name, defaults))
        given = {name: chosen(name, value, defaults[name]) for name, value in given.items()}
        values = {**profile_overrides({**defaults, "out": None}), **given}
        changed = {name: value for name, value in values.items() if defaults[name] != value}
        name, key = _name(notebook, changed, given)
        place = next(Path(folder).glob(f"*-{key}"), Path(folder) / f"{name}-{key}").resolve()
        runs.setdefault(key, Run(notebook, changed, place, given))
    return list(runs.values())


def _combinations(grid: Grid, seeds: Sequence[int]) -> list[dict]:
    grid = checked("grid", grid, Grid)
    if isinstance(grid, dict):
        grid = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    seeds = checked("seeds", list(seeds) if isinstance(seeds, range) else seeds, list[Seed])
    return [{**run, **seed} for run in grid for seed in [{"seed": seed} for seed in seeds] or [{}]]


def _cells(notebook: Path) -> list[Cell]:
    try:
        return read_json(notebook, Notebook).cells
    except ValueError as error:
        raise ValueError(f"{notebook} is not a notebook of format 4 ({error}).") from None


def _defaults(notebook: Path) -> dict:
    """Names and values of a notebook's parameters cell; ... for a value that is not a literal."""
    tagged = [cell for cell in _cells(notebook) if "parameters" in cell.metadata.tags]
    try:
        found = {n: x for cell in tagged for n, x in assigned("".join(cell.source)).items()}
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"the parameters of {notebook} are not Python ({error}).") from None
    values = dict.fromkeys(found, ...)
    for name, node in found.items():
        with contextlib.suppress(ValueError):
            values[name] = ast.literal_eval(node)
    return values


def _name(notebook: Path, changed: Mapping, given: Mapping) -> tuple[str, str]:
    """A folder's name: readable beginning, and a hash of code, parameters and version."""
    code = ["".join(cell.source) for cell in _cells(notebook) if cell.cell_type == "code"]
    said = [f"{name}={value}" for name, value in given.items()]
    readable = re.sub("[^A-Za-z0-9._=-]+", "_", "-".join([notebook.stem, *said]))
    every = sorted(f"{name}={value!r}" for name, value in changed.items())
    return readable[:70], digest(code, every, kit.__version__)[:10]
