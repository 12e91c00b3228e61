import pathlib
import platform
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from kit import artifact
from kit.core import measurement
from kit.core.measurement import (
    Latency,
    has_fast_bfloat16,
    macs,
    measure,
    oversubscribed,
    peak_memory,
)


def test_measure_takes_calls_in_turn_and_quartiles(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(measurement, "_now", lambda: clock[0])
    costs = {"a": iter([9, 9, 9, 9, 1, 2, 50]), "b": iter([9, 2, 2, 2, 2, 2, 2])}

    def call(name):
        order.append(name)
        clock[0] += next(costs[name])

    result = measure({name: lambda name=name: call(name) for name in costs}, seconds=0)
    assert order == ["a"] * 4 + ["b"] * 4 + ["a", "b"] * 3
    assert result == {"a": Latency(2, 1, 50), "b": Latency(2, 2, 2)}
    with pytest.raises(ValueError, match="no calls"):
        measure({})


def test_measure_repeats_short_calls_and_leaves_out_slow_ones(monkeypatch):
    clock, count = [0.0], {"short": 0, "long": 0, "slow": 0}
    monkeypatch.setattr(measurement, "_now", lambda: clock[0])

    def call(name, cost):
        count[name] += 1
        clock[0] += cost

    costs = {"short": 1 / 1024, "long": 1 / 512, "slow": 1 / 256}
    calls = {name: lambda name=name, cost=cost: call(name, cost) for name, cost in costs.items()}
    result = measure(calls, seconds=0, cutoff=3)
    assert {name: latency.median for name, latency in result.items()} == {
        "short": 1 / 1024,
        "long": 1 / 512,
    }
    assert count == {"short": 4 + 3 * (1 + 4), "long": 4 + 3 * (1 + 2), "slow": 4}


def test_measure_of_real_work():
    matrix = torch.randn(500, 500)
    result = measure({"short": lambda: None, "long": lambda: matrix @ matrix}, 0.1)
    assert 0 < result["short"].low <= result["short"].median <= result["short"].high
    assert result["short"].median < result["long"].median


def test_macs_are_exact():
    assert macs(nn.Linear(7, 5), torch.zeros(3, 7)) == 3 * 7 * 5
    assert macs(nn.Conv2d(2, 4, 3), torch.zeros(1, 2, 8, 8)) == 4 * 6 * 6 * 2 * 9

    class Routed(nn.Module):
        def forward(self, x, rows):
            return x[:rows] @ torch.ones(6, 2)

    model = Routed().train()
    assert macs(model, (torch.zeros(10, 6), 4)) == 4 * 6 * 2 and model.training


def test_float32_bytes_are_those_of_a_file():
    weights = 4 * (300 * 200 + 300)
    assert weights < artifact.float32_bytes(nn.Linear(200, 300)) < weights + 2000


def test_peak_memory_is_what_the_kernel_says():
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux")
    high_water = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    assert peak_memory() == pytest.approx(high_water, rel=0.05)


def test_fast_bfloat16_is_a_plain_answer():
    assert isinstance(has_fast_bfloat16(), bool)


def test_hint_only_when_busy():
    assert (
        oversubscribed(1.0, load=2.0, cores=2) is None
        and oversubscribed(0.9, load=0.5, cores=1) is None
    )
    assert "load 5.3 on 2 cores" in oversubscribed(1.8, load=5.3, cores=2)
    assert "this process gets 0.4" in oversubscribed(0.4, load=1.0, cores=4)


def test_process_keeps_freed_memory():
    """On glibc; a fresh process, as it cannot be undone."""
    code = "from kit.core.measurement import tune_process; assert tune_process() is True"
    if platform.libc_ver()[0] == "glibc":
        subprocess.run([sys.executable, "-c", code], check=True)
