"""Batches of notebooks: a grid of parameters becomes a papermill process a run, each in its folder.

    python -m kit.lab.batches notebooks/05_full_pipeline.ipynb grid.yaml --jobs 2

where `grid.yaml` holds lists of which every combination is run (or a list of runs), and perhaps
seeds for each:

    grid: {target_compression: [30.0, 100.0], vocab_size: [2048, 4096]}
    seeds: [0, 1, 2]
"""

import argparse
import contextlib
import io
import itertools
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import yaml
from filelock import Timeout

from kit.core.settings import Count, Meta, checked, checks
from kit.core.store import digest, write_json
from kit.lab.records import RESULT, cores, quality_column, read_results
from kit.lab.runs import LOOK, STATUS, Run, plan


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
    wanted = ("new", "failed") if retry else ("new",)
    due = [run for run in runs if run.state() in wanted]
    with _machines(scheduler, jobs) as (jobs, execute), ThreadPoolExecutor(jobs) as pool:
        print(f"{len(runs)} runs, {len(runs) - len(due)} skipped; {jobs} at a time", flush=True)
        futures = [pool.submit(_attend, run, execute, wanted, stop) for run in due]
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


def _attend(run: Run, execute: Callable, wanted: Sequence[str], stop: threading.Event) -> str:
    """Runs what nobody else does; what to say of it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    begun, name = time.monotonic(), run.folder.name
    try:
        with run.claim(1):  # whoever asks for its state holds it for a moment
            if run.outcome() not in wanted:
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
        yield jobs, partial(_send, client, threading.Event(), max(1, int(threads)), needs)


def _send(
    client, alone: threading.Event, threads: int, needs: dict, run: Run, stopped: Callable[[], bool]
) -> int | None:
    """Executes a run on a worker and unpacks the folder that comes back."""
    import distributed

    task = run.notebook.name, run.notebook.read_bytes(), run.parameters, threads
    for _ in range(5):  # times that several workers died under it
        future = client.submit(_on_worker, *task, pure=False, resources=needs)
        try:
            for look in itertools.count():
                if future.done():
                    break
                if stopped():
                    return None
                if look % 25 == 24:
                    _say_if_alone(client, alone)
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


def _say_if_alone(client, alone: threading.Event) -> None:
    """Says once that a batch waits, since workers that end in order are not started again."""
    with contextlib.suppress(OSError):
        if client.scheduler_info(n_workers=-1)["workers"]:
            alone.clear()
        elif not alone.is_set():
            alone.set()
            there = client.scheduler.address
            print(f"No Dask worker is left: waiting for another (dask worker {there}).", flush=True)


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
