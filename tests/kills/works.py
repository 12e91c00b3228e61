"""Work that can be killed and called again: what a call does, and what it must leave behind."""

import contextlib
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

import nbformat
import psutil
import torch
import torch._dynamo  # once, not in every process
from torch.utils.data import DataLoader, TensorDataset

from kit.core.store import atomic, code_digest
from kit.data import load_corpus
from kit.data.tokenization import BPETokenizer
from kit.distillation import cache as teacher_cache
from kit.lab import batches
from kit.lab.runs import MARK, Run, plan
from kit.models import build_model
from kit.pipeline import CODE, CompressionPipeline
from notebooks.reference import baseline

TOKENS = torch.randint(0, 64, (96, 17), generator=torch.Generator().manual_seed(0))
WORDS = "the resolvent of a chain is a continued fraction and each level pays one division".split()
code_digest(CODE)  # which is kept


def language_model():
    torch.manual_seed(0)
    return build_model("LSTMLM", {"vocab_size": 64, "d_model": 16, "layers": 1, "hidden": 12})


def loader(size=8):
    return DataLoader(TensorDataset(TOKENS[:, :-1], TOKENS[:, 1:]), size)


def content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Work:
    """`call` does the work in a folder, as a user's process would. `log` tells of units of work
    that were begun, so that what two processes do twice is seen."""

    name: str
    units: int  # of work in an unkilled run
    retry = False

    def call(self, folder: Path) -> None:
        raise NotImplementedError

    def final(self, folder: Path) -> dict[str, str]:
        """What must be the same whatever was killed: name -> digest."""
        return {str(f.relative_to(folder)): content(f) for f in self.files(folder)}

    def files(self, folder: Path) -> list[Path]:
        """Everything in the folder but locks, which stay by design."""
        return [f for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix != ".lock"]

    def finished(self, folder: Path) -> dict[str, int]:
        """When each unit that is finished was: none may be done again."""
        return {}

    def victims(self, process: psutil.Process) -> list[psutil.Process]:
        return [process]

    def counted(self, log: Path) -> None:
        """Has every unit of work in this process told of in `log`."""


def telling(owner, name: str, log: Path) -> None:
    """Adds a line to `log` at each call of owner.name."""
    whole = vars(owner)[name]
    function = whole.__func__ if isinstance(whole, classmethod) else whole

    def told(*args, **kwargs):
        with open(log, "a") as file:
            file.write(f"{name}\n")
        return function(*args, **kwargs)

    setattr(owner, name, classmethod(told) if isinstance(whole, classmethod) else told)


class Pipeline(Work):
    name, units = "pipeline", 3

    def call(self, folder):
        pipeline = CompressionPipeline(language_model(), 6.0, "cpu", lr=1e-2, log=False)
        pipeline.run_pipeline(loader(), loader(), 1, 1, 1, save_dir=folder / "run")

    def final(self, folder):
        return {file.name: content(file) for file in self.files(folder) if file.suffix == ".kit"}

    def finished(self, folder):
        done = [file.with_suffix(".kit") for file in folder.glob("run/[!.]*.training")]
        return {file.name: file.stat().st_mtime_ns for file in done}

    def counted(self, log):
        telling(CompressionPipeline, "_run_stage", log)


class TeacherCache(Work):
    name, units = "teacher cache", 1

    def call(self, folder):
        teacher_cache.build_cache(language_model().eval(), loader(1), folder / "cache", k=8)

    def counted(self, log):
        telling(teacher_cache, "_fill", log)


class Tokens(Work):
    name, units = "corpus", 1

    def call(self, folder):
        draw = random.Random(0)
        text = "".join(" ".join(draw.choices(WORDS, k=12)) + ".\n" for _ in range(20_000))
        with atomic(folder / "text.txt") as new:  # as several write it at once
            new.write_text(text)
        os.environ["KIT_CACHE"] = str(folder / "cache")
        load_corpus(f"text:{folder / 'text.txt'}", 300)

    def counted(self, log):
        telling(BPETokenizer, "train", log)


class Dense(Work):
    """The dense model that notebooks share."""

    name, units = "dense model", 1

    def call(self, folder):
        Tokens().call(folder)
        baseline.load_or_train(
            corpus=f"text:{folder / 'text.txt'}", vocab_size=300, train_bytes=40_000, batch_size=8,
            seq_len=32, model="LSTMLM", device="cpu", log=False, steps=30, eval_every=10,
            d_model=16, layers=1, hidden=12,
        )  # fmt: skip

    def final(self, folder):
        return {file.name: content(file) for file in folder.rglob("*.kit")}

    def counted(self, log):
        telling(baseline, "_train", log)


BODY = """\
import fcntl, json, pathlib
folder = pathlib.Path(out)
alone = open(folder.parent / f".{seed}.lock", "w")
fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where two run it at once
total = sum(i * seed for i in range(2 * 10**6))
record = {"notebook": "tiny", "parameters": {}, "seed": seed, "bytes": total % 997, "perplexity": 2.0}
(folder / "more.bin").write_bytes(bytes(10**5))
(folder / "result.json").write_text(json.dumps(record))
"""  # noqa: E501
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def notebook(path: Path) -> Path:
    cells = [
        nbformat.v4.new_code_cell(
            "seed = 0\nout = ''\n", id="parameters", metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_code_cell(BODY, id="body"),
    ]
    if not path.exists():
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    return path


class Batch(Work):
    """A batch through papermill; `whom` is what is killed: the batch itself, or what it started."""

    retry = True  # a kernel that dies is a failed run

    def __init__(self, name="batch", whom="", seeds=2):
        self.name, self.whom, self.units = name, whom, seeds

    def call(self, folder):
        grid = folder / "grid.yaml"
        grid.write_text(f"grid: {{seed: {list(range(self.units))}}}\n")
        options = ["--folder", str(folder / "runs"), "--retry", "--jobs", "2"]
        sys.exit(batches.main([str(notebook(folder / "tiny.ipynb")), str(grid), *options]))

    def runs(self, folder) -> list[Run]:
        grid = {"seed": list(range(self.units))}
        return plan(notebook(folder / "tiny.ipynb"), grid, folder=folder / "runs")

    def final(self, folder):
        kept = [f for f in self.files(folder) if f.name in ("result.json", "more.bin")]
        return {f"{file.parent.name}/{file.name}": content(file) for file in kept}

    def finished(self, folder):
        done = {}
        for file in folder.glob("runs/*/status.json"):
            with contextlib.suppress(ValueError, OSError):
                if json.loads(file.read_text())["exit_code"] == 0:
                    done[file.parent.name] = file.stat().st_mtime_ns
        return done

    def victims(self, process):
        return started(process, self.whom) if self.whom else [process]


class Shared(Batch):
    """A batch whose runs are a script in place of papermill, for several batches at once."""

    SCRIPT = "import sys, time; time.sleep(0.3); open(sys.argv[2], 'a').write('run\\n');" \
             "open(sys.argv[1] + '/result.json', 'w').write(sys.argv[3])"  # fmt: skip

    def counted(self, log):
        record = {"notebook": "tiny", "parameters": {}, "seed": 0, "bytes": 5, "perplexity": 2.0}
        tail = str(log), json.dumps(record)
        command = [sys.executable, "-S", "-c", self.SCRIPT]
        Run.command = lambda run: [*command, str(run.folder), *tail]


KILLED = {
    "pipeline": Pipeline(), "teacher cache": TeacherCache(), "corpus": Tokens(),
    "dense model": Dense(), "batch": Batch(), "papermill": Batch("papermill", "kit.lab.child"),
    "kernel": Batch("kernel", "ipykernel_launcher"),
}  # fmt: skip
TOGETHER = (Tokens(), Dense(), TeacherCache(), Pipeline(), Shared("batch folder", seeds=3))


def started(process: psutil.Process, what: str) -> list[psutil.Process]:
    """What the process has started, directly or not, with these words in its command."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if what in " ".join(child.cmdline()):
                found.append(child)
    return found


def living(folder: Path) -> list[psutil.Process]:
    """Processes of runs in the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(str(folder)):
                found.append(process)
    return found


def wait_for_end(folder: Path, seconds: float = 20) -> int:
    """Processes of runs in the folder that outlive their batch by so long."""
    end = time.monotonic() + seconds
    while (left := living(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return len(left)
