import json
import sys

import torch

from kit.models import bk_core, bk_scan
from notebooks.reference import gpu_check


def test_the_check_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    arguments = ["--out", str(tmp_path / "check"), "--device", "cpu", "--quick"]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    record = gpu_check.main()
    assert json.loads((tmp_path / "check" / "gpu_check.json").read_text())["seconds"] > 0
    assert len(record["agreement"]) == 7 and all(row["right"] for row in record["agreement"])
    assert {row["loop"] for row in record["training"]} == {"plain", "float32", "bfloat16"}
    assert record["pipeline"][0]["target met"] and record["pipeline"][0]["ratio"] > 3
    assert "times attention" in (table := capsys.readouterr().out) and "tokens/s" in table
    assert bk_core.on_device is bk_scan


def test_a_wrong_kernel_is_seen(monkeypatch):
    def drifting(x, p, eta):
        return torch.complex(x, p) * (eta + (0.01 if x.dtype == torch.float32 else 0.0))

    drifting.__name__ = "left_resolvent"
    monkeypatch.setattr(bk_core, "left_resolvent", drifting)
    rows = gpu_check.agreement(torch.device("cpu"), quick=True)
    wrong = [row["what"] for row in rows if not row["right"]]
    assert wrong == ["left_resolvent, scan"]
