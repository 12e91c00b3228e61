"""Units to arms by hashing, and the file in which observations survive restarts."""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd


def assign(unit, arms: Sequence[str] | Mapping[str, float], salt: str = "") -> str:
    """Name of the arm that `unit` belongs to: always the same one, on any machine, without a table.

    Weighted rendezvous hashing (Thaler & Ravishankar 1998; weights: Schindelhauer & Schomaker 2005): each
    arm scores -ln(u) / weight with u uniform from a hash of (salt, arm, unit), and the smallest score
    wins. When an arm joins, leaves or changes weight, only units that move to or from *that* arm move.
    Another `salt` is another experiment.

    Raises ValueError if there is no arm of positive weight, or a weight is negative or not finite.
    """
    scores = {
        arm: -np.log(_uniform(salt, arm, unit)) / weight for arm, weight in _weights(arms).items() if weight
    }
    return min(scores, key=scores.get)


def _weights(arms) -> dict[str, float]:
    weights = dict(arms) if isinstance(arms, Mapping) else {arm: 1.0 for arm in arms}
    for arm, weight in weights.items():
        if not (np.isfinite(weight) and weight >= 0):
            raise ValueError(f"arm {arm!r} has weight {weight}; give a finite number that is not negative")
    if not any(weights.values()):
        raise ValueError(f"arms {list(weights)} hold none with a positive weight; give at least one")
    return weights


def _uniform(*parts) -> float:
    """Uniform in (0, 1), 53 bits of a hash of the parts; their lengths are hashed too, so that no two mix
    up.
    """
    text = "".join(f"{len(part)}:{part}" for part in map(str, parts))
    return ((int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 11) + 0.5) / 2**53


class Log:
    """Append-only file of JSON records, one a line, that survives kills: a half-written last line is
    dropped.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)

    def append(self, **record):
        """Writes one record to disk (synced) before it returns."""
        with open(self.path, "ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict]:
        """All records in order. Raises ValueError naming the line that is not JSON."""
        records = []
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                raise ValueError(
                    f"{self.path} line {number} is not JSON; restore it or delete that line"
                ) from None
        return records

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.records())
