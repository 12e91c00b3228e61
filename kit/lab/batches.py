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
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, TypedDict

import pandas as pd
import psutil
import yaml
from filelock import Timeout

import kit
from kit.core.settings import Count, Meta, Seed, checked, checks
from kit.core.store import digest, lock, read_json, write_json
from kit.lab.parameters import assigned, chosen, profile_overrides, unknown
from kit.lab.records import RESULT, cores, quality_column, read_results

ROOT = Path(kit.__file__).resolve().parents[1]
STATUS, LOG, PARAMETERS = "status.json", "log.txt", "parameters.yaml"
THREADS = [f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA", "RAYON")]
NO_START = "Address already in use|Kernel died before replying|Kernel didn't respond"
MARK = "KIT_RUN"  # names a run's folder in the environment of its processes
LOOK = 0.2  # seconds between two looks at a process
Grid = dict[str, Annotated[list, Meta(min_length=1)]] | Annotated[list[dict], Meta(min_length=1)]


class Tags(TypedDict, total=False):
    tags: list[str]


class Cell(TypedDict):
    cell_type: str
    source: str | list[str]
    metadata: Tags


class Notebook(TypedDict):
    cells: list[Cell]


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


def _cells(notebook: Path) -> list[dict]:
    try:
        return read_json(notebook, Notebook)["cells"]
    except ValueError as error:
        raise ValueError(f"{notebook} is not a notebook of format 4 ({error}).") from None


def _defaults(notebook: Path) -> dict:
    """Names and values of a notebook's parameters cell; ... for a value that is not a literal."""
    tagged = [cell for cell in _cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    try:
        found = {n: x for cell in tagged for n, x in assigned("".join(cell["source"])).items()}
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"the parameters of {notebook} are not Python ({error}).") from None
    values = dict.fromkeys(found, ...)
    for name, node in found.items():
        with contextlib.suppress(ValueError):
            values[name] = ast.literal_eval(node)
    return values


def _name(notebook: Path, changed: Mapping, given: Mapping) -> tuple[str, str]:
    """A folder's name: readable beginning, and a hash of code, parameters and version."""
    code = ["".join(cell["source"]) for cell in _cells(notebook) if cell["cell_type"] == "code"]
    said = [f"{name}={value}" for name, value in given.items()]
    readable = re.sub("[^A-Za-z0-9._=-]+", "_", "-".join([notebook.stem, *said]))
    every = sorted(f"{name}={value!r}" for name, value in changed.items())
    return readable[:70], digest(code, every, kit.__version__)[:10]


@checks
def run_batch(
    notebook, grid, seeds=(), *, jobs: Count | None = None, folder="runs", retry: bool = False,
    scheduler: str | None = None,
) -> tuple[pd.DataFrame, dict[str, str]]:  # fmt: skip
    """Runs a grid of parameters (see `plan`), `jobs` at a time. Returns a table of finished runs,
    as `read_results` does, with what the grid gave, also written to a CSV file in `folder`; and a
    dict: name of a failed run -> the end of its log.

    Finished runs are skipped and those cut short start again in their folder, so that a second call
    continues; failed ones start again with `retry`. Two batches on one folder share its runs. Each
    run may use threads / jobs threads. An interrupt ends the processes first.

    scheduler: None, or the address of a Dask scheduler ("tcp://..."), whose workers can import this
        kit and need no disk in common: notebook and parameters go there, the folder comes back. A
        worker that dies costs a retry. With `--resources "threads=8 memory=32e9"` on each worker, a
        run takes its share of both. `jobs` is by default 1, there the workers' threads. "local": a
        scheduler in this process, for its dashboard.

    Raises ValueError as `plan` does, for more jobs than cores, and where no scheduler answers.
    """
    runs, stop = plan(notebook, grid, seeds, folder), threading.Event()
    due = [run for run in runs if _is_due(run.state(), retry)]
    with _machines(scheduler, jobs) as (jobs, execute), ThreadPoolExecutor(jobs) as pool:
        print(f"{len(runs)} runs, {len(runs) - len(due)} skipped; {jobs} at a time", flush=True)
        futures = [pool.submit(_attend, run, execute, retry, stop) for run in due]
        try:
            for number, future in enumerate(as_completed(futures), len(runs) - len(due) + 1):
                print(f"[{number}/{len(runs)}] {future.result()}", flush=True)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    ended = [(run, run.state()) for run in runs]
    failed = {run.folder.name: run.last_lines() for run, state in ended if state == "failed"}
    return _table([run for run, state in ended if state == "finished"], runs), failed


def _table(finished: list[Run], runs: list[Run]) -> pd.DataFrame:
    """Records of the runs, beside what the grid gave; also a CSV file, another for each grid."""
    frame = read_results([run.folder for run in finished])
    given = {str(run.folder): run.swept for run in finished}
    given = pd.DataFrame([given[str(Path(place).resolve())] for place in frame["run"]])
    frame = frame.drop(columns=given.columns, errors="ignore").join(given)
    frame = frame[["run", *given, *frame.columns.difference(["run", *given], sort=False)]]
    if len(frame):
        folder, grid = runs[0].folder.parent, digest(sorted(run.folder.name for run in runs))[:10]
        frame.to_csv(folder / f"{runs[0].notebook.stem}-{grid}.csv", index=False)
    return frame


def _is_due(state: str, retry: bool) -> bool:
    return state == "new" or (retry and state == "failed")


def _attend(run: Run, execute: Callable, retry: bool, stop: threading.Event) -> str:
    """Runs what nobody else does; what to say of it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    begun, name = time.monotonic(), run.folder.name
    try:
        with run.claim(1):  # whoever asks for its state holds it for a moment
            if not _is_due(run.outcome(), retry):
                return f"{run.outcome()} by another batch: {name}"
            code = None if stop.is_set() else execute(run, stop.is_set)
            seconds = time.monotonic() - begun
            if code is not None:
                write_json(run.folder / STATUS, {"exit_code": code, "seconds": seconds})
            outcome = run.outcome().replace("new", "cut short")
            return f"{outcome} in {seconds:.0f} s: {name}"
    except Timeout:
        return f"still being run by another batch, call again after it: {name}"


@contextlib.contextmanager
def _machines(scheduler: str | None, jobs: int | None) -> Iterator[tuple[int, Callable]]:
    """How many runs at a time, and what executes one: (run, stopped) -> exit code."""
    if scheduler in (None, "local"):
        jobs = checked("jobs", jobs or 1, Annotated[int, Meta(ge=1, le=cores())])
    if scheduler is None:
        yield jobs, partial(Run.execute, threads=cores() // jobs)
        return
    import distributed

    with contextlib.ExitStack() as stack:
        if scheduler == "local":
            options = {"processes": False, "n_workers": 1, "threads_per_worker": jobs}
            options |= {"resources": {"threads": cores()}, "dashboard_address": "127.0.0.1:0"}
            options |= {"host": "127.0.0.1", "protocol": "tcp://"}
            scheduler = stack.enter_context(distributed.LocalCluster(**options, memory_limit=None))
        try:
            client = stack.enter_context(distributed.Client(scheduler, timeout=10))
            client.wait_for_workers(1, timeout=10)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            raise ValueError(f"No Dask workers answer at {scheduler!r} ({error}).") from None
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        jobs = jobs or sum(worker["nthreads"] for worker in workers)
        each, needs = -(-jobs // len(workers)), {}  # runs on a worker, and what each takes
        for name in ("threads", "memory"):
            if all(name in worker["resources"] for worker in workers):
                needs[name] = min(worker["resources"][name] for worker in workers) // each
        threads = needs.get("threads", min(worker["nthreads"] for worker in workers) // each)
        print(f"Dask: {len(workers)} workers, dashboard {client.dashboard_link}", flush=True)
        yield jobs, partial(_send, client, max(1, int(threads)), needs)


def _send(client, threads: int, needs: dict, run: Run, stopped: Callable[[], bool]) -> int | None:
    """Executes a run on a worker and unpacks the folder that comes back."""
    import distributed

    task = run.notebook.name, run.notebook.read_bytes(), run.parameters, threads
    for _ in range(5):  # times that several workers died under it
        future = client.submit(_on_worker, *task, pure=False, resources=needs)
        try:
            while not future.done():
                if stopped():
                    return None
                time.sleep(LOOK)
            code, folder = future.result()
        except (distributed.KilledWorker, distributed.client.FutureCancelledError):
            continue
        finally:
            future.cancel()
        if code is not None:
            (run.folder / RESULT).unlink(missing_ok=True)
            zipfile.ZipFile(io.BytesIO(folder)).extractall(run.folder)
        return code
    return None


def _on_worker(name: str, notebook: bytes, parameters: dict, threads: int) -> tuple:
    """Exit code of a run on this worker, in a folder of its own, and the folder as a zip file."""
    import distributed

    worker = distributed.get_worker()
    key, tasks = worker.get_current_task(), worker.state.tasks
    with tempfile.TemporaryDirectory(dir=worker.local_directory) as place:
        path, folder, packed = Path(place) / name, Path(place) / "run", io.BytesIO()
        path.write_bytes(notebook)
        folder.mkdir()
        run = Run(path, parameters, folder, {})
        code = run.execute(lambda: key not in tasks or tasks[key].state != "executing", threads)
        with zipfile.ZipFile(packed, "w") as archive:
            for file in folder.rglob("*"):
                archive.write(file, file.relative_to(folder))
        return code, packed.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 if a run failed, 2 for bad input, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m kit.lab.batches", description="Run a grid.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("grid", type=Path, help="YAML file with grid and seeds")
    parser.add_argument("--jobs", type=int, help="runs at a time (default 1)")
    parser.add_argument("--folder", type=Path, default="runs", help="for all runs (default runs)")
    parser.add_argument("--retry", action="store_true", help="run failed ones again")
    parser.add_argument("--scheduler", help="of Dask: local, or an address tcp://...")
    parser.add_argument("--status", action="store_true", help="print how far the runs are, only")
    options = vars(parser.parse_args(arguments))
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        options |= _read(options["grid"])
        if not options.pop("status"):
            return _report(*run_batch(**options))
        names = {"notebook", "grid", "seeds", "folder"} & options.keys()
        for run in plan(**{name: options[name] for name in names}):
            print(f"{run.state():<9}{run.folder.name}  {run.last_lines(1)[:100]}".rstrip())
        return 0
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command continues.", file=sys.stderr)
        return 130


def _read(path: Path) -> dict:
    """Grid and perhaps seeds of a YAML file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no grid file {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or "grid" not in content or set(content) - {"grid", "seeds"}:
        raise ValueError(
            f"{path} holds {content!r:.200}, expected the key grid and, if wanted, seeds."
        )
    return content


def _report(frame: pd.DataFrame, failed: dict[str, str]) -> int:
    """Prints the table and the end of each failed run's log."""
    if len(frame):
        shown = [*frame.columns[1 : frame.columns.get_loc("notebook")], "bytes", "ratio"]
        print(frame[[*shown, quality_column(frame), "low", "high", "run"]].to_string(index=False))
    for run, lines in failed.items():
        print(f"\nFailed (--retry runs it again): {run}\n{lines}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
