"""Some kills and simultaneous calls: `python -m tests.kills` has more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills.__main__ import SIGNALS, WRONG

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_nothing_is_lost_doubled_or_left_behind(tmp_path):
    works = [word for name in ("pipeline", "teacher cache", "corpus") for word in ("--work", name)]
    command = [sys.executable, "-m", "tests.kills", "--kills", "3", "--together", "1"]
    command += [*works, "--record", str(tmp_path / "kills.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "kills.json").read_text())
    assert len(record["kills"]) == 3 and len(record["together"]) == 3
    for one in record["kills"].values():
        assert sum(one[kind] for kind in SIGNALS) == one["kills"] >= 1
    for one in [*record["kills"].values(), *record["together"].values()]:
        assert not any(one.get(wrong) for wrong in WRONG), one
