"""Batches of notebooks: a grid of parameters becomes one papermill process a run, each in its own folder.

    python -m kit.lab.batches notebooks/05_full_pipeline.ipynb grid.yaml --jobs 2

where ``grid.yaml`` holds a grid (every combination of its lists, or a list of runs) and the seeds for each:

    grid:
      target_compression: [30, 100]
      vocab_size: [2048, 4096]
    seeds: [0, 1, 2]
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import yaml

import kit
from kit.lab.grid import check_parameter, combinations, identify, notebook_defaults, profile_overrides, read_grid
from kit.core.store import write_json
from kit.lab.records import RESULT, quality_column, read_results

ROOT = Path(kit.__file__).resolve().parent.parent
STATUS, LOG, PARAMETERS = "status.json", "log.txt", "parameters.yaml"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS",
            "RAYON_NUM_THREADS")
_NO_START = ("Address already in use", "Kernel died before replying", "Kernel didn't respond")


@dataclass(frozen=True)
class Run:
    """A notebook, the parameters that differ from its own, and the folder for everything it writes."""

    notebook: Path
    parameters: dict
    folder: Path

    def command(self) -> list[str]:
        return [sys.executable, "-m", "papermill", str(self.notebook), str(self.folder / self.notebook.name),
                "-k", "python3", "-f", str(self.folder / PARAMETERS), "--log-output", "--no-progress-bar"]

    def prepare(self) -> None:
        """Write the parameters; remove the record of an earlier attempt, but not what it can resume from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, STATUS):
            (self.folder / name).unlink(missing_ok=True)
        text = yaml.safe_dump({**self.parameters, "out": str(self.folder)}, sort_keys=False)
        (self.folder / PARAMETERS).write_text(text, encoding="utf-8")

    def state(self) -> str:
        """"finished", "failed", "running" (in a living process) or "new" (also if it was cut short)."""
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
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return "\n".join(text.rstrip().splitlines()[-count:])


@dataclass(frozen=True)
class Batch:
    """What a batch gave.

    Attributes:
        frame: one row a finished run, as from `read_results`.
        axes: compression against quality; None if no record has both.
        failed: name of each failed run -> the end of its log.
    """

    frame: pd.DataFrame
    axes: object | None
    failed: dict[str, str]


def plan(notebook: str | Path, grid: Mapping | Sequence[Mapping], seeds: Sequence[int] = (),
         folder: str | Path = "runs") -> list[Run]:
    """The runs of a batch, checked against the notebook before anything starts.

    Args:
        grid: name -> list of values (every combination is run), or a list of dicts (each is run).
        seeds: values of the parameter ``seed``, each combined with each of those.
        folder: receives a folder a run, named by what differs from the notebook's own values and a hash of
            the notebook's code, the parameters and the kit's version.

    The profile named by ``$KIT_PROFILE`` applies before the grid.

    Raises:
        ValueError: a name is not a parameter of the notebook, or a value has another type than its default.
        FileNotFoundError: no such notebook.
    """
    notebook = Path(notebook).resolve()
    if not notebook.is_file():
        raise FileNotFoundError(f"There is no notebook {notebook}.")
    defaults = notebook_defaults(notebook)
    if "out" not in defaults:
        raise ValueError(f"{notebook.name} has no parameter 'out', which a batch sets to the run's folder.")
    runs = {}
    for chosen in combinations(grid, seeds):
        for name, value in chosen.items():
            check_parameter(notebook, name, value, defaults)
        values = {**profile_overrides({**defaults, "out": None}), **chosen}
        changed = {name: value for name, value in values.items() if defaults[name] != value}
        run = Run(notebook, changed, Path(folder).resolve() / identify(notebook, changed))
        runs[run.folder] = run
    return list(runs.values())


def run_batch(notebook: str | Path, grid: Mapping | Sequence[Mapping], seeds: Sequence[int] = (), *,
              jobs: int = 1, folder: str | Path = "runs", retry: bool = False) -> Batch:
    """Run a grid of parameters (see `plan`), `jobs` at a time, and read the records.

    Finished runs are skipped and those cut short start again in their folder, so a second call continues;
    failed ones start again with `retry`. A run has finished when papermill exits with 0 and ``result.json``
    is there. Each process may use cores / jobs threads.

    Raises:
        ValueError: see `plan`; also more jobs than cores.
        KeyboardInterrupt: passed on after ending the processes.
    """
    if not 1 <= jobs <= _cores():
        raise ValueError(f"jobs is {jobs}, expected 1 to {_cores()}, the cores of this machine.")
    runs = plan(notebook, grid, seeds, folder)
    _execute([run for run in runs if _is_due(run, retry)], len(runs), jobs)
    states = {run.folder: run.state() for run in runs}
    for path in (path for path, state in states.items() if state == "running"):
        print(f"{path.name} is still being run by another batch; call again when that has ended.")
    done = [path for path, state in states.items() if state == "finished"]
    frame = read_results(done)
    failed = {run.folder.name: run.last_lines() for run in runs if states[run.folder] == "failed"}
    return Batch(frame, _pareto(frame), failed)


def _is_due(run: Run, retry: bool) -> bool:
    return run.state() in (("new", "failed") if retry else ("new",))


def _execute(runs: list[Run], total: int, jobs: int) -> None:
    """Run all, `jobs` at a time, with a line of progress whenever one ends."""
    waiting, running, seconds = list(runs), [], []
    print(f"{total} runs, {total - len(runs)} skipped; {jobs} at a time", flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Process(waiting.pop(0), _cores() // jobs))
                running[-1].start()
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                seconds.append(process.seconds)
                left = (len(waiting) + len(running) / 2) * sum(seconds) / len(seconds) / jobs
                print(f"[{total - len(waiting) - len(running)}/{total}] {process.run.state()} in "
                      f"{process.seconds:.0f} s: {process.run.folder.name}; {left:.0f} s left", flush=True)
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()


class _Process:
    """The papermill process of a run. A kernel that did not start is started once more."""

    def __init__(self, run: Run, threads: int):
        self.run, self.process, self.attempts, self.seconds = run, None, 0, 0.0
        self.begun = time.monotonic()
        self.environment = {**os.environ, **{name: str(threads) for name in _THREADS}}
        self.environment.pop("KIT_PROFILE", None)  # its values are among the run's parameters

    def start(self) -> None:
        self.attempts += 1
        self.run.prepare()
        with open(self.run.folder / LOG, "w") as log:
            self.process = psutil.Popen(self.run.command(), cwd=ROOT, env=self.environment, stdout=log,
                                        stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
        identity = {"pid": self.process.pid, "started": self.process.create_time()}
        write_json(self.run.folder / STATUS, identity)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        code = self.process.poll()
        if code and self.attempts == 1 and any(text in self.run.last_lines(50) for text in _NO_START):
            self.start()
            return None
        if code is not None:
            self.seconds = time.monotonic() - self.begun
            write_json(self.run.folder / STATUS, {"exit_code": code, "seconds": self.seconds})
        return code

    def kill(self) -> None:
        """End it and the kernel it started; the run counts as cut short."""
        if self.process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [*self.process.children(recursive=True), self.process]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)


def _alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _pareto(frame: pd.DataFrame):
    from kit.lab import plots  # matplotlib is loaded only when there is something to draw

    drawable = frame["bytes"].notna() & frame[quality_column(frame)].notna()
    return plots.pareto(frame[drawable]) if drawable.any() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 if a run failed, 2 for bad input, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m kit.lab.batches",
                                     description="Run a notebook over a grid of parameters.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("grid", type=Path, help="YAML file with grid and seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="for all runs (default runs)")
    parser.add_argument("--retry", action="store_true", help="run failed ones again")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        grid, seeds = read_grid(options.grid)
        if options.dry_run:
            return _show(plan(options.notebook, grid, seeds, options.folder), options.retry)
        return _report(run_batch(options.notebook, grid, seeds, jobs=options.jobs, folder=options.folder,
                                 retry=options.retry), options)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command continues.", file=sys.stderr)
        return 130


def _show(runs: list[Run], retry: bool) -> int:
    for run in runs:
        skipped = "" if _is_due(run, retry) else ", skipped"
        print(f"# {run.state()}{skipped}: {run.parameters}\n{shlex.join(run.command())}")
    return 0


def _report(batch: Batch, options: argparse.Namespace) -> int:
    """Print the table, save it and the picture, and give the end of each failed run's log."""
    if len(batch.frame):
        table = options.folder / f"{options.notebook.stem}.csv"
        batch.frame.to_csv(table, index=False)
        columns = ["run", "bytes", "ratio", quality_column(batch.frame), "low", "high"]
        print(f"{batch.frame[columns].to_string(index=False)}\nAll columns: {table}")
    if batch.axes is not None:
        picture = options.folder / f"{options.notebook.stem}.png"
        batch.axes.figure.savefig(picture)
        print(f"Picture: {picture}")
    for name, lines in batch.failed.items():
        print(f"\nFailed: {name}\n{lines}")
    if batch.failed:
        print(f"\n{len(batch.failed)} failed; --retry runs them again.")
    return 1 if batch.failed else 0


if __name__ == "__main__":
    sys.exit(main())
