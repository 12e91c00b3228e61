"""Batches of notebooks: a grid of parameters becomes a papermill process a run, each in its folder.

    python -m kit.lab.batches notebooks/05_full_pipeline.ipynb grid.yaml --jobs 2

where `grid.yaml` holds lists of which every combination is run (or a list of runs), and perhaps
seeds for each:

    grid: {target_compression: [30.0, 100.0], vocab_size: [2048, 4096]}
    seeds: [0, 1, 2]
"""

import argparse
import ast
import contextlib
import difflib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import yaml

import kit
from kit.core.store import digest, write_json
from kit.lab.records import RESULT, cores, quality_column, read_results

ROOT = Path(kit.__file__).resolve().parents[1]
PROFILES = ROOT / "notebooks" / "params"
STATUS, LOG, PARAMETERS = "status.json", "log.txt", "parameters.yaml"
THREADS = [f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA", "RAYON")]
NO_START = "Address already in use|Kernel died before replying|Kernel didn't respond"
Grid = Mapping[str, Sequence] | Sequence[Mapping]


@dataclass(frozen=True)
class Run:
    """A notebook, the parameters that differ from its own, and the folder for what it writes."""

    notebook: Path
    parameters: dict
    folder: Path

    def command(self) -> list[str]:
        files = [str(self.notebook), str(self.folder / self.notebook.name)]
        options = ["-f", str(self.folder / PARAMETERS), "--log-output", "--no-progress-bar"]
        return [sys.executable, "-m", "papermill", *files, "-k", "python3", *options]

    def state(self) -> str:
        """One of "new" (also when it was cut short), "running" in a living process, "finished" with
        exit code 0 and a record, and "failed"."""
        if not (self.folder / STATUS).exists():
            return "new"
        status = json.loads((self.folder / STATUS).read_text(encoding="utf-8"))
        if "exit_code" not in status:
            return "running" if _alive(**status) else "new"
        done = status["exit_code"] == 0 and (self.folder / RESULT).exists()
        return "finished" if done else "failed"

    def last_lines(self, count: int = 12) -> str:
        """The end of its log."""
        text = (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.rstrip().splitlines()[-count:])

    def start(self, threads: int) -> psutil.Popen:
        """Starts its process. An earlier record goes; what the run can resume from stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / RESULT).unlink(missing_ok=True)
        text = yaml.safe_dump({**self.parameters, "out": str(self.folder)}, sort_keys=False)
        (self.folder / PARAMETERS).write_text(text, encoding="utf-8")
        environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
        environment.pop("KIT_PROFILE", None)  # its values are among the parameters
        with open(self.folder / LOG, "w") as log:
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            options = {"cwd": ROOT, "env": environment, "start_new_session": True}
            process = psutil.Popen(self.command(), **files, **options)
        identity = {"pid": process.pid, "started": process.create_time()}
        write_json(self.folder / STATUS, identity)
        return process


def _alive(pid: int, started: float) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    return False


def plan(notebook: str | Path, grid: Grid, seeds: Sequence[int] = (), folder="runs") -> list[Run]:
    """The runs of a batch, checked against the notebook before anything starts.

    grid: name -> list of values, of which every combination is run, or a list of dicts; each with
    each of the seeds, after what the profile `$KIT_PROFILE` sets. A run's folder in `folder` is
    named by what differs from the notebook's own values and a hash of code, these and version.
    Raises ValueError for a name that is no parameter of the notebook, a value of another type than
    its default, and a grid or notebook that is none; FileNotFoundError for one that is not there.
    """
    notebook, runs = Path(notebook).resolve(), {}
    if not notebook.is_file():
        raise FileNotFoundError(f"There is no notebook {notebook}.")
    defaults = _defaults(notebook)
    if "out" not in defaults:
        raise ValueError(f"{notebook.name} has no parameter 'out', which a batch sets.")
    for chosen in _combinations(grid, seeds):
        for name, value in chosen.items():
            _check(notebook.name, name, value, defaults)
        values = {**profile_overrides({**defaults, "out": None}), **chosen}
        changed = {name: value for name, value in values.items() if defaults[name] != value}
        place = Path(folder).resolve() / _name(notebook, changed)
        runs[place] = Run(notebook, changed, place)
    return list(runs.values())


def profile_overrides(namespace: Mapping) -> dict:
    """The values of `notebooks/params/$KIT_PROFILE.yaml` for names in `namespace`; {} without it.

    An `out` under `runs/` goes to `runs-$KIT_PROFILE/`, so that a test never replaces a record.
    Raises ValueError for a profile that is not there.
    """
    name = os.environ.get("KIT_PROFILE")
    if not name:
        return {}
    known = {path.stem: path for path in sorted(PROFILES.glob("*.yaml"))}
    if name not in known:
        raise ValueError(f"KIT_PROFILE is {name!r}, expected one of {', '.join(known)}.")
    profile = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    if str(namespace.get("out")).startswith("runs/"):
        profile["out"] = namespace["out"].replace("runs/", f"runs-{name}/", 1)
    return {key: value for key, value in profile.items() if key in namespace}


def _combinations(grid: Grid, seeds: Sequence[int]) -> list[dict]:
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if not isinstance(values, (list, tuple)) or not values:
                raise ValueError(f"The grid gives {name} as {values!r}, expected a list of values.")
        grid = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    if not (isinstance(grid, list) and grid and all(isinstance(run, Mapping) for run in grid)):
        need = "a mapping of names to lists or a list of mappings"
        raise ValueError(f"The grid is {grid!r}, expected {need}.")
    if not isinstance(seeds, (list, tuple, range)):
        raise ValueError(f"The seeds are {seeds!r}, expected a list of integers.")
    return [{**run, **seed} for run in grid for seed in [{"seed": seed} for seed in seeds] or [{}]]


def _cells(notebook: Path) -> list[dict]:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError):
        raise ValueError(f"{notebook} is not a notebook of format 4.") from None


def _defaults(notebook: Path) -> dict:
    """Names and values of a notebook's parameters cell; ... for a value that is not a literal."""
    tagged = [cell for cell in _cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    nodes = [node for cell in tagged for node in ast.parse("".join(cell["source"])).body]
    return {n.targets[0].id: _literal(n.value) for n in nodes if isinstance(n, ast.Assign)}


def _literal(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...


def _check(notebook: str, name: str, value, defaults: Mapping) -> None:
    """Raises ValueError unless the notebook has this parameter, with a default of the value's type.
    An integer passes for a float, and anything where the default is None or not a literal."""
    if name == "out":
        raise ValueError("The batch sets 'out' itself, a folder for each run: remove it.")
    if name not in defaults:
        near = difflib.get_close_matches(str(name), defaults, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(defaults)}."
        raise ValueError(f"{notebook} has no parameter {name!r}; {hint}")
    kind, default = type(defaults[name]).__name__, defaults[name]
    allowed = {"float": ("float", "int"), "tuple": ("tuple", "list")}.get(kind, (kind,))
    if default not in (None, ...) and type(value).__name__ not in allowed:
        hint = {"float": "; YAML reads 1e-3 as text, write 1.0e-3"}.get(kind, "")
        like = f"expected {kind} like the {default!r} of {notebook}"
        raise ValueError(f"{name} is {value!r}, {like}{hint}.")


def _name(notebook: Path, changed: Mapping) -> str:
    """A folder's name: readable beginning, and a hash of code, parameters and version."""
    code = ["".join(cell["source"]) for cell in _cells(notebook) if cell["cell_type"] == "code"]
    said = [f"{name}={value}" for name, value in changed.items()]
    readable = re.sub("[^A-Za-z0-9._=-]+", "_", "-".join([notebook.stem, *said]))
    return f"{readable[:70]}-{digest(code, sorted(said), kit.__version__)[:10]}"


def run_batch(notebook, grid, seeds=(), *, jobs=1, folder="runs", retry=False):
    """Runs a grid of parameters (see `plan`), `jobs` at a time. Returns a table of finished runs,
    as `read_results` does, and a dict: name of a failed run -> the end of its log.

    Finished runs are skipped and those cut short start again in their folder, so that a second call
    continues; failed ones start again with `retry`. Each may use cores / jobs threads. Raises
    ValueError as `plan` does and for more jobs than cores. An interrupt ends the processes first.
    """
    if not 1 <= jobs <= cores():
        raise ValueError(f"jobs is {jobs}, expected 1 to {cores()}, the cores of this machine.")
    runs = plan(notebook, grid, seeds, folder)
    _execute([run for run in runs if _is_due(run, retry)], len(runs), jobs)
    ended = [(run, run.state()) for run in runs]
    for run, state in ended:
        if state == "running":
            print(f"{run.folder.name} is still being run by another batch; call again after it.")
    failed = {run.folder.name: run.last_lines() for run, state in ended if state == "failed"}
    return read_results([run.folder for run, state in ended if state == "finished"]), failed


def _is_due(run: Run, retry: bool) -> bool:
    return run.state() in (("new", "failed") if retry else ("new",))


def _execute(runs: list[Run], total: int, jobs: int) -> None:
    """Runs all of them and prints a line whenever one ends."""
    print(f"{total} runs, {total - len(runs)} skipped; {jobs} at a time", flush=True)
    pool, living, stop = ThreadPoolExecutor(jobs), set(), threading.Event()
    futures = {pool.submit(_attend, run, cores() // jobs, living, stop): run for run in runs}
    try:
        for number, future in enumerate(as_completed(futures), total - len(runs) + 1):
            run, seconds = futures[future], future.result()
            said = f"{run.state()} in {seconds:.0f} s: {run.folder.name}"
            print(f"[{number}/{total}] {said}", flush=True)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            for process in list(living):
                _kill(process)
            time.sleep(0.05)


def _attend(run: Run, threads: int, living: set, stop: threading.Event) -> float:
    """Starts a run and waits for it; seconds. A kernel that did not start is started once more."""
    begun = time.monotonic()
    for _ in range(2):
        living.add(process := run.start(threads))
        code = process.wait()
        living.discard(process)
        if stop.is_set() or not code or not re.search(NO_START, run.last_lines(50)):
            break
    seconds = time.monotonic() - begun
    if not stop.is_set():  # else it counts as cut short
        write_json(run.folder / STATUS, {"exit_code": code, "seconds": seconds})
    return seconds


def _kill(process: psutil.Popen) -> None:
    """Ends a process and the kernel that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*process.children(recursive=True), process]:
            member.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 if a run failed, 2 for bad input, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m kit.lab.batches", description="Run a grid.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("grid", type=Path, help="YAML file with grid and seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--folder", type=Path, default="runs", help="for all runs (default runs)")
    parser.add_argument("--retry", action="store_true", help="run failed ones again")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    options = vars(parser.parse_args(arguments))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        options["grid"], options["seeds"] = _read(options["grid"])
        if not options.pop("dry_run"):
            return _report(*run_batch(**options))
        for run in plan(*(options[name] for name in ("notebook", "grid", "seeds", "folder"))):
            skipped = "" if _is_due(run, options["retry"]) else ", skipped"
            print(f"# {run.state()}{skipped}: {run.parameters}\n{shlex.join(run.command())}")
        return 0
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command continues.", file=sys.stderr)
        return 130


def _read(path: Path) -> tuple[Grid, list]:
    """Grid and seeds of a YAML file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no grid file {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or "grid" not in content or set(content) - {"grid", "seeds"}:
        raise ValueError(f"{path} holds {content!r}, expected the key grid and, if wanted, seeds.")
    return content["grid"], content.get("seeds") or []


def _report(frame: pd.DataFrame, failed: dict[str, str]) -> int:
    """Prints the table and the end of each failed run's log."""
    if len(frame):
        columns = ["run", "bytes", "ratio", quality_column(frame), "low", "high"]
        print(frame[columns].to_string(index=False))
    for run, lines in failed.items():
        print(f"\nFailed: {run}\n{lines}")
    if failed:
        print(f"\n{len(failed)} failed; --retry runs them again.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
