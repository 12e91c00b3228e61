"""What a second process buys: training in two processes of one thread each beside one process of
two threads, in tokens a second, and a batch of notebooks on two Dask workers beside one (seconds).

python -m notebooks.reference.data_parallel --out runs/data_parallel
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from kit.core.store import write_json
from kit.lab.batches import run_batch
from kit.lab.records import environment
from kit.models import build_model
from kit.training import TrainConfig, parallel, train

BATCH, WINDOW, VOCABULARY = 32, 128, 4096
NOTEBOOK = Path(__file__).resolve().parents[1] / "05_full_pipeline.ipynb"


def launch(module: str, *arguments: str, processes: int) -> None:
    """torchrun for notebooks: runs a module in so many processes of this machine and prints what
    they print. Raises CalledProcessError when one fails."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", module, *arguments]
    run.insert(4, f"--nproc-per-node={processes}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(run, **pipes) as started:
        for line in started.stdout:
            print(line, end="", flush=True)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, run)


def work(steps: int, threads: int, file: Path) -> None:
    """Trains the model of notebook 01 on random tokens; rank 0 adds its tokens/s to a file."""
    device = parallel.join("cpu")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build_model("ResNetBK", {"vocab_size": VOCABULARY}).to(device)
    batches = [torch.randint(0, VOCABULARY, (2, BATCH, WINDOW)).unbind() for _ in range(4)]
    train(model, batches, TrainConfig(3), log=False)  # compiled code is read, memory is mapped
    result = train(model, batches, TrainConfig(steps), log=False)
    if parallel.rank() == 0:
        with file.open("a") as lines:
            print(result.tokens / result.seconds, file=lines)


def batch(workers: int, runs: int = 4) -> float:
    """Seconds of a batch of the pipeline's notebook, in the smoke profile, on so many workers of
    one thread; a run before it reads the corpus and compiles."""
    import distributed

    with tempfile.TemporaryDirectory() as place, patch.dict(os.environ, KIT_CACHE=place):
        options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": ":0"}
        with distributed.LocalCluster(**options, memory_limit=None) as cluster:
            once = partial(run_batch, NOTEBOOK, folder=place, scheduler=cluster.scheduler_address)
            once({"seed": [runs]})
            start = time.perf_counter()
            found, failed = once({"seed": list(range(runs))})
            assert len(found) == runs and not failed, failed
            return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="the two take turns; medians count")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        return work(options.steps, options.threads, options.file)
    options.out.mkdir(parents=True, exist_ok=True)
    files = {"2 processes x 1 thread": (2, 1), "1 process x 2 threads": (1, 2)}
    for name in files:
        (options.out / f"{name}.txt").unlink(missing_ok=True)
    for _ in range(options.rounds):
        for name, (processes, threads) in files.items():
            os.environ["OMP_NUM_THREADS"] = str(threads)
            own = ["--threads", str(threads), "--file", str(options.out / f"{name}.txt")]
            own += ["--steps", str(options.steps), "--out", str(options.out)]
            launch("notebooks.reference.data_parallel", *own, processes=processes)
    found = {}
    for name in files:
        rates = [float(line) for line in (options.out / f"{name}.txt").read_text().split()]
        found[name] = {"tokens/s": statistics.median(rates), "rounds": rates}
    two, one = (row["tokens/s"] for row in found.values())
    with patch.dict(os.environ, KIT_PROFILE="smoke"):
        seconds = [[batch(workers) for workers in (1, 2)] for _ in range(options.rounds)]
    found["batch of 4 on 1 and 2 workers, seconds"] = seconds
    found["batch's speed-up"] = statistics.median(alone / both for alone, both in seconds)
    load = os.getloadavg()[0]
    record = {**environment(), **found, "ratio": two / one, "load": load, "batch": [BATCH, WINDOW]}
    print(record)
    write_json(options.out / "data_parallel.json", record)


if __name__ == "__main__":
    main()
