"""python -m tests.kills: kills and simultaneous calls, a table, and perhaps a record."""

import argparse
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import torch

from kit.core.store import write_json
from kit.lab.batches import run_batch
from tests.kills.works import KILLED, TOGETHER, Batch, Work, notebook, started, wait_for_end

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
WRONG = ("errors", "lost", "different", "doubled", "strays", "left")
LIMIT = 300  # seconds that a call may take


def begun(work: Work, folder: Path, log: Path | None = None, gate: Path | None = None):
    """A process that does the work once: its exit code is 0 where the work ended well."""
    folder.mkdir(parents=True, exist_ok=True)
    if child := os.fork():
        return psutil.Process(child)
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        said = os.open(folder.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1), os.dup2(said, 2)
        torch.set_num_threads(1)
        if log:
            work.counted(log)
        while gate and not gate.exists():
            time.sleep(0.001)
        work.call(folder)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: psutil.Process) -> int:
    """Its exit code, after it was waited for; negative for a signal."""
    end = time.monotonic() + LIMIT
    while (found := os.waitpid(process.pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            process.kill()
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def reference(work: Work, folder: Path) -> dict:
    """What an unkilled run leaves, and how long it takes."""
    start = time.monotonic()
    if code := ended(begun(work, folder)):
        said = folder.with_suffix(".said").read_text()
        raise RuntimeError(f"{work.name} ends with {code} when nothing is killed: {said[-2000:]}")
    names = {str(f.relative_to(folder)) for f in work.files(folder)}
    return {"seconds": time.monotonic() - start, "final": work.final(folder), "names": names}


def compared(work: Work, folder: Path, whole: dict, found: Counter, notes: list) -> None:
    """Counts what the last call left otherwise than an unkilled one."""
    final = work.final(folder)
    names = {str(file.relative_to(folder)) for file in work.files(folder)}
    wrong = {
        "lost": sorted(whole["names"] - names), "strays": sorted(names - whole["names"]),
        "different": sorted(n for n in final if final[n] != whole["final"].get(n)),
    }  # fmt: skip
    for what, which in wrong.items():
        found[what] += len(which)
        notes += [f"{what}: {name}" for name in which]


def trial(work: Work, folder: Path, whole: dict, kills: int, rng, found: Counter, notes: list):
    """Kills call after call of one folder, then lets a call end."""
    for _ in range(kills):
        done, process = work.finished(folder), begun(work, folder)
        time.sleep(rng.uniform(0, whole["seconds"]))
        while not (victims := work.victims(process)) and process.status() != "zombie":
            time.sleep(0.01)
        kind = rng.choice(SIGNALS)
        if victims and process.status() != "zombie":
            rng.choice(victims).send_signal(getattr(signal, kind))
            found[kind] += 1
        ended(process)
        found["left"] += wait_for_end(folder)
        now = work.finished(folder)
        found["doubled"] += sum(now.get(unit) != when for unit, when in done.items())
    if code := ended(begun(work, folder)):
        found["errors"] += 1
        said = folder.with_suffix(".said").read_text()
        notes.append(f"the last call ended with {code}: {said[-1000:]}")
    else:
        compared(work, folder, whole, found, notes)


def killed(work: Work, kills: int, seed: int, place: Path, end: float) -> dict:
    """So many kills of this work, up to three a folder; none is begun after `end`."""
    rng, found, notes, trials = random.Random(f"{work.name}-{seed}"), Counter(), [], 0
    whole = reference(work, place / "whole")
    while sum(found[kind] for kind in SIGNALS) < kills and time.monotonic() < end:
        trials += 1
        left = kills - sum(found[kind] for kind in SIGNALS)
        trial(work, place / str(trials), whole, min(left, rng.choice([1, 1, 2, 3])), rng,
              found, notes)  # fmt: skip
    done = sum(found[kind] for kind in SIGNALS)
    return {"kills": done, "trials": trials, **{k: found[k] for k in SIGNALS + WRONG},
            "notes": notes[:20]}  # fmt: skip


def together(work: Work, times: int, place: Path, end: float) -> dict:
    """Two, and four, processes that do the work of one folder at the same moment."""
    found, notes = Counter(), []
    log, gate = place / "log", place / "gate"
    gate.touch()
    first = begun(work, place / "whole", log, gate)
    whole = {"code": ended(first), "final": work.final(place / "whole")}
    whole["names"] = {str(f.relative_to(place / "whole")) for f in work.files(place / "whole")}
    units = len(log.read_text().splitlines())
    assert whole["code"] == 0 and units == work.units, (work.name, whole["code"], units)
    done = 0
    while done < times and time.monotonic() < end:
        done += 1
        for several in (2, 4):
            folder = place / f"{done}-{several}"
            log, gate = folder.with_suffix(".log"), folder.with_suffix(".gate")
            processes = [begun(work, folder, log, gate) for _ in range(several)]
            gate.touch()
            failed = [code for code in map(ended, processes) if code]
            found["errors"] += len(failed)
            if failed:
                notes.append(f"{failed}: {folder.with_suffix('.said').read_text()[-1000:]}")
            found["doubled"] += max(0, len(log.read_text().splitlines()) - units)
            compared(work, folder, whole, found, notes)
    return {"times": done, **{k: found[k] for k in WRONG[:-1]}, "notes": notes[:20]}


def cluster(kills: int, seed: int, place: Path, runs: int = 12) -> dict:
    """A batch on three workers of Dask, some of which are killed while they run."""
    import distributed

    rng, done, count = random.Random(seed), threading.Event(), Counter()
    place.mkdir()
    book, grid = notebook(place / "tiny.ipynb"), {"seed": list(range(runs))}
    start, me = time.monotonic(), psutil.Process()

    def kill():
        while count["kills"] < kills and not done.wait(rng.uniform(0.5, 4)):
            if busy := [child.parent() for child in started(me, "kit.lab.child")]:
                kind = rng.choice(SIGNALS)
                rng.choice(busy).send_signal(getattr(signal, kind))
                count.update(["kills", kind])

    options = {"n_workers": 3, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**options, silence_logs=50) as workers:
        workers.adapt(minimum=3, maximum=3)  # one that ends in order is not started again else
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        frame, failed = run_batch(
            book, grid, folder=place / "runs", scheduler=workers.scheduler_address, retry=True
        )
        done.set()
        killer.join()
    work, records = Batch(seeds=runs), Counter(frame["seed"])
    names = [f for f in work.files(place / "runs") if f.suffix == ".partial"]
    return {
        "kills": count["kills"], **{kind: count[kind] for kind in SIGNALS}, "runs": runs,
        "records": len(records), "errors": len(failed), "lost": runs - len(records),
        "doubled": sum(records.values()) - len(records), "strays": len(names),
        "left": wait_for_end(place / "runs"), "different": len(work.final(place)) - 2 * runs,
        "seconds": time.monotonic() - start, "notes": [text[-500:] for text in failed.values()],
    }  # fmt: skip


SHARES = {  # of the kills
    "pipeline": 0.25, "teacher cache": 0.15, "corpus": 0.15, "dense model": 0.1, "batch": 0.12,
    "papermill": 0.08, "kernel": 0.08, "dask worker": 0.07,
}  # fmt: skip
NAMES = [*SHARES, *(work.name for work in TOGETHER if work.name not in SHARES)]


def table(found: dict) -> str:
    frame = pd.DataFrame(found).T.drop(columns="notes")
    return frame.astype(object).where(frame.notna(), "").to_string()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="in all, over every kind of work")
    parser.add_argument("--together", type=int, default=0, help="times, with two and four each")
    parser.add_argument("--work", action="append", choices=NAMES, help="all without it")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which none is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", default=None, help="JSON file for the outcomes")
    options = parser.parse_args()
    names = [name for name in options.work or SHARES if name in SHARES]
    total, end = sum(SHARES[name] for name in names), time.monotonic() + 60 * options.minutes
    found = {"kills": {}, "together": {}}
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        for work in TOGETHER if options.together else ():
            if options.work and work.name not in options.work:
                continue
            (Path(folder) / f"together {work.name}").mkdir()
            result = together(work, options.together, Path(folder) / f"together {work.name}", end)
            found["together"][work.name] = result
            print(work.name, result, flush=True)
        for name in names if options.kills else ():
            kills, place = max(1, round(options.kills * SHARES[name] / total)), Path(folder) / name
            start = time.monotonic()
            if name in KILLED:
                place.mkdir()
                result = killed(KILLED[name], kills, options.seed, place, end)
            else:
                result = cluster(kills, options.seed, place)
            found["kills"][name] = {**result, "seconds": round(time.monotonic() - start)}
            print(name, found["kills"][name], flush=True)
    for what, rows in found.items():
        if rows:
            print(what, table(rows), sep="\n")
    if options.record:
        said = {"seed": options.seed, "platform": platform.platform(), "load": os.getloadavg()}
        write_json(options.record, {**said, **found})
    return int(any(row[wrong] for rows in found.values() for row in rows.values()
                   for wrong in WRONG if wrong in row))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
