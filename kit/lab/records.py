"""Records of runs: one ``result.json`` a run folder, and all of them as a DataFrame."""

import glob
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kit.core.store import write_json

RESULT = "result.json"
_CORE = ["run", "notebook", "seed", "bytes", "ratio", "perplexity", "low", "high", "bits_per_byte",
         "bits_per_byte_low", "bits_per_byte_high", "accuracy", "corpus.name", "corpus.sha256", "comparable"]


def write_result(folder: str | Path, record: dict) -> Path:
    """Write the record of a finished run to ``folder/result.json``, atomically: the last act of a run.

    Args:
        record: ``notebook``, ``parameters`` (dict) and ``seed`` are required. Tables and plots read
            ``corpus`` ``{name, sha256}``, ``stages`` (a list of ``{name, bytes, ratio, perplexity, low, high,
            bits_per_byte, seconds, tokens}``) and the run's own ``bytes``, ``ratio``, ``perplexity`` or
            ``accuracy``, ``low``, ``high``, ``bits_per_byte``. Anything else is kept. Versions and machine
            (`kit.core.measurement.environment`) are added.

    Raises:
        ValueError: a required key is missing, or ``corpus`` or ``stages`` lacks what the comparison needs.
    """
    missing = [key for key in ("notebook", "parameters", "seed") if key not in record]
    if missing:
        raise ValueError(f"The record of {folder} lacks {', '.join(missing)}; add it before writing.")
    if "corpus" in record and not {"name", "sha256"} <= set(record["corpus"]):
        raise ValueError(f"The corpus of {folder} is {record['corpus']!r}, expected its name and sha256.")
    if any("name" not in stage for stage in record.get("stages", [])):
        raise ValueError(f"A stage of {folder} has no name; give each stage a dict with a name.")
    from kit.core.measurement import environment  # loads torch, which reading records does not need

    return write_json(Path(folder) / RESULT, {**environment(), **record})


def read_results(where: str | Path | Iterable[str | Path] = "runs") -> pd.DataFrame:
    """All records under a folder, a glob pattern or a list of those: a row a run, nested keys dotted.

    Column ``run`` names the folder; ``comparable`` is False where the corpus hash differs from that of most
    runs, as perplexities on different texts cannot be compared. No records give an empty frame.

    Raises:
        ValueError: a record is not readable JSON.
    """
    rows = [{"run": name, **{key: value for key, value in record.items() if key != "stages"}}
            for name, record in _records(where)]
    frame = pd.json_normalize(rows)
    frame = frame.reindex(columns=_CORE + [column for column in frame if column not in _CORE])
    return _flag(_bits_interval(frame))


def read_stages(where: str | Path | Iterable[str | Path] = "runs") -> pd.DataFrame:
    """The stages of all records found as by `read_results`: a row a stage, numbered by ``order`` from 0."""
    shared = ("notebook", "seed")
    rows = [{"run": name, **{key: record.get(key) for key in shared}, "corpus": record.get("corpus"),
             "order": order, **stage}
            for name, record in _records(where) for order, stage in enumerate(record.get("stages", []))]
    frame = pd.json_normalize(rows)
    core = ["run", "order", "name", *_CORE[1:]]
    frame = frame.reindex(columns=core + [column for column in frame if column not in core])
    return _flag(_bits_interval(frame)).drop(columns="corpus", errors="ignore")


def quality_column(frame: pd.DataFrame) -> str:
    """The column that orders these runs by quality: ``accuracy`` where there is no perplexity,
    ``bits_per_byte`` where vocabularies differ, else ``perplexity``.
    """
    if frame["perplexity"].isna().all() and frame["accuracy"].notna().any():
        return "accuracy"
    several = "parameters.vocab_size" in frame and frame["parameters.vocab_size"].nunique() > 1
    return "bits_per_byte" if several and frame["bits_per_byte"].notna().any() else "perplexity"


def dominated_by(frame: pd.DataFrame, minimize: Sequence[str] = ("bytes", "perplexity"),
                 maximize: Sequence[str] = ()) -> pd.Series:
    """For each row the index label of one that dominates it (no worse in any column, better in one) or None.

    Of several dominating rows the one best in the last column is named. Rows with a missing value dominate
    nothing and are dominated by nothing.

    Raises:
        ValueError: a column is absent.
    """
    absent = [column for column in (*minimize, *maximize) if column not in frame]
    if absent:
        raise ValueError(f"There is no column {absent[0]!r} to compare, only {', '.join(map(str, frame))}.")
    costs = np.hstack([frame[list(minimize)].to_numpy(float), -frame[list(maximize)].to_numpy(float)])
    names = []
    for cost in costs:
        better = np.flatnonzero((costs <= cost).all(axis=1) & (costs < cost).any(axis=1))
        names.append(frame.index[better[costs[better, -1].argmin()]] if len(better) else None)
    return pd.Series(names, index=frame.index, dtype=object)


def pareto_front(frame: pd.DataFrame, minimize: Sequence[str] = ("bytes", "perplexity"),
                 maximize: Sequence[str] = ()) -> pd.Series:
    """True for the complete rows that no other row dominates (see `dominated_by`)."""
    complete = frame[[*minimize, *maximize]].notna().all(axis=1)
    return complete & dominated_by(frame, minimize, maximize).isna()


def _records(where) -> list[tuple[str, dict]]:
    """(folder, record) of each result file; the folder is relative to the working directory if inside it."""
    places = [where] if isinstance(where, (str, Path)) else list(where)
    files = set()
    for place in places:
        found = [place] if Path(place).exists() else glob.glob(str(place), recursive=True)
        for path in map(Path, found):
            files.update([path] if path.name == RESULT else path.rglob(RESULT) if path.is_dir() else [])
    return [(_relative(file.parent), _read(file)) for file in sorted(files)]


def _relative(folder: Path) -> str:
    folder = folder.resolve()
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _read(file: Path) -> dict:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it and run its notebook again.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{file} holds no record but a {type(record).__name__}; run its notebook again.")
    return record


def _flag(frame: pd.DataFrame) -> pd.DataFrame:
    hashes = frame["corpus.sha256"].dropna()
    usual = hashes.value_counts().index[0] if len(hashes) else None
    return frame.assign(comparable=(frame["corpus.sha256"] == usual) if usual else frame["run"].notna())


def _bits_interval(frame: pd.DataFrame) -> pd.DataFrame:
    """Bits per byte is log-perplexity times a constant of the text: the interval of one gives the other's."""
    numbers = ["bytes", "ratio", "perplexity", "low", "high", "bits_per_byte", "accuracy"]
    numeric = frame[numbers].apply(pd.to_numeric)
    constant = numeric["bits_per_byte"] / np.log(numeric["perplexity"])
    return frame.assign(**numeric, bits_per_byte_low=constant * np.log(numeric["low"]),
                        bits_per_byte_high=constant * np.log(numeric["high"]))
