"""Records of runs: one `result.json` a run folder, and all of them as a DataFrame."""

import contextlib
import glob
import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import pandas as pd
import psutil
import torch

import kit
from kit.core.store import read_json, to_json, write_json

RESULT = "result.json"
ROOT = Path(kit.__file__).resolve().parents[1]
FIGURES = ["bytes", "ratio", "perplexity", "low", "high", "bits_per_byte", "accuracy"]
PACKAGES = "torch numpy numba tokenizers safetensors scikit-learn pandas papermill".split()
Places = str | Path | Iterable[str | Path]
Figure = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)] | None
Figures = msgspec.defstruct("Figures", [(f, Figure, None) for f in FIGURES], kw_only=True)


class Stage(Figures, kw_only=True):
    name: str


class Record(Figures, kw_only=True):
    """What tables and plots rely on in a record; other fields are its notebook's own."""

    notebook: str
    parameters: dict
    seed: int | None
    corpus: msgspec.defstruct("Corpus", [("name", str), ("sha256", str)]) | None = None
    stages: list[Stage] = []


def write_result(folder: str | Path, record: dict) -> Path:
    """Writes the record of a finished run to `folder/result.json`, whole: the last act of a run.

    A record needs `notebook`, `parameters` (dict) and `seed`. Tables and plots read `corpus` {name,
    sha256}, `stages` (a list of {name, seconds, tokens} and FIGURES) and the run's own FIGURES.
    Anything else is kept, such as `curves` {name: rows with `step` and numbers}; `environment` is
    added. Raises ValueError as `checked`.
    """
    checked(msgspec.json.decode(to_json(record)), folder)
    return write_json(Path(folder) / RESULT, {**environment(), **record})


def commit() -> str | None:
    """The commit of the code, with "+" where files differ from it; $KIT_COMMIT, if set, is it."""
    git = f"git -C {shlex.quote(str(ROOT))} describe --always --abbrev=40 --exclude=* --dirty=+"
    if told := os.environ.get("KIT_COMMIT"):
        return told
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.check_output(shlex.split(git), stderr=subprocess.DEVNULL, text=True)
        return done.strip()


def environment() -> dict:
    """When, from which commit, in how long (seconds since this process began), and what a timing
    depends on: versions, processor, cores, threads, accelerator."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
    began = psutil.Process().create_time()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "duration": round(time.time() - began, 1),
        "versions": {"python": platform.python_version(), "kit": kit.__version__, **versions},
        "platform": platform.platform(),
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_results(where: Places = "runs") -> pd.DataFrame:
    """All records under a folder, a glob pattern or a list of these: a row a run, keys dotted.

    Column `run` names the folder; `comparable` is False where the corpus hash differs from that
    of most runs, as perplexities on different texts do not compare. No records: an empty frame.
    Raises ValueError for a record that is not readable JSON.
    """
    return _frame([{"run": run, **record, "stages": None} for run, record in _records(where)])


def read_stages(where: Places = "runs") -> pd.DataFrame:
    """The stages of all records that `read_results` finds: a row a stage, numbered by `order`."""
    rows = []
    for run, record in _records(where):
        shared = {key: record.get(key) for key in ("notebook", "seed", "corpus")}
        for order, stage in enumerate(record.get("stages", [])):
            rows.append({"run": run, "order": order, **shared, **stage})
    return _frame(rows)


def _frame(rows: list[dict]) -> pd.DataFrame:
    """A table of rows, with `comparable` and with the interval in bits per byte."""
    frame = pd.json_normalize(rows).drop(columns=["stages", "corpus"], errors="ignore")
    core = ["run", "notebook", "seed", "corpus.name", "corpus.sha256", *FIGURES]
    frame = frame.reindex(columns=[*core, *frame.columns.difference(core, sort=False)])
    numbers = frame[FIGURES].apply(pd.to_numeric)
    logs = np.log(numbers[["perplexity", "low", "high"]].astype(float))
    constant = numbers["bits_per_byte"] / logs["perplexity"]  # of the text
    limits = {f"bits_per_byte_{end}": constant * logs[end] for end in ("low", "high")}
    hashes, usual = frame["corpus.sha256"], frame["corpus.sha256"].mode()
    same = hashes == usual[0] if len(usual) else hashes.isna()
    return frame.assign(**numbers, **limits, comparable=same)


def _records(where: Places) -> list[tuple[str, dict]]:
    """(folder, record) of each result file; folders are relative to the working directory."""
    files = set()
    for place in [where] if isinstance(where, (str, Path)) else where:
        found = [place] if Path(place).exists() else glob.glob(str(place), recursive=True)
        for path in map(Path, found):
            files.update([path] if path.name == RESULT else path.rglob(RESULT))
    here = f"{Path.cwd()}{os.sep}"
    return [(str(f.parent.resolve()).removeprefix(here), _read(f)) for f in sorted(files)]


def _read(file: Path) -> dict:
    return checked(read_json(file), file)


def checked(record: dict, where) -> dict:
    """The record. Raises ValueError, which names the field, for one that tables could not read."""
    try:
        msgspec.convert(record, Record)
    except ValueError as error:
        raise ValueError(f"{where} holds no record ({error}): run its notebook again.") from None
    return record


def quality_column(frame: pd.DataFrame) -> str:
    """The column that orders these runs by quality: `accuracy` where there is no perplexity,
    `bits_per_byte` where vocabularies differ, else `perplexity`."""
    if frame["perplexity"].isna().all() and frame["accuracy"].notna().any():
        return "accuracy"
    several = frame.get("parameters.vocab_size", pd.Series(dtype=float)).nunique() > 1
    return "bits_per_byte" if several and frame["bits_per_byte"].notna().any() else "perplexity"
