"""Records of runs, told to MLflow (a local store, no server) or TensorBoard too, where asked."""

import re
from pathlib import Path

from kit.core.store import read_json, to_json
from kit.lab import records


def write_result(folder: str | Path, record: dict, track: str | None = None) -> Path:
    """`kit.lab.records.write_result`; then parameters, figures and `curves` {name: rows with `step`
    and numbers} go to "mlflow" (mlflow.db beside `folder`) or "tensorboard" (in `folder`)."""
    path = records.write_result(folder, record)
    if track:
        tell(Path(folder), read_json(path), track)
    return path


def tell(folder: Path, record: dict, track: str) -> None:
    """A record, as it is in its file, to a tracker."""
    points = [(name, record.get(name), 0) for name in records.FIGURES]
    for curve, rows in record.get("curves", {}).items():
        points += [(f"{curve}/{name}", x, r["step"]) for r in rows for name, x in r.items()]
    points = [p for p in points if p[1] is not None and not p[0].endswith("/step")]
    if track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            writer.add_text("parameters", to_json(record["parameters"]).decode())
            for point in points:
                writer.add_scalar(*point)
        return
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder.parent.absolute() / 'mlflow.db'}")
    mlflow.set_experiment(record["notebook"])
    with mlflow.start_run(run_name=folder.name):
        mlflow.log_params(record["parameters"])
        for name, value, step in points:
            mlflow.log_metric(re.sub(r"[^\w/ .-]", "_", name), value, step)
