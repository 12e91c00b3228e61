"""ResNet-BK beside its peers: shapes of equal parameter count, and BK mixing timed against
attention."""

import bisect
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.core.measurement import STATUS, measure
from kit.models import BKMixer, ResNetBKConfig, build_model, parameter_count
from kit.models.bk_core import left_resolvent

MIXING = ("BK layer", "attention layer", "BK kernel", "attention kernel")


def equal_shape(name: str, parameters: int, field: str, **shape) -> dict:
    """`shape` with the integer `field` of model `name` chosen so that it has `parameters`
    parameters.

    Raises ValueError when no value comes within 3 % of that number.
    """

    def size(value: int) -> int:
        with torch.device("meta"):
            return parameter_count(build_model(name, {**shape, field: value}))

    at = bisect.bisect_left(range(2**14), parameters, lo=2, key=size)
    value = min(at - 1, at, key=lambda v: abs(size(v) - parameters))
    if abs(size(value) / parameters - 1) > 0.03:
        raise ValueError(
            f"No {field} gives {name} {parameters:,} parameters within 3 %: "
            f"{value} gives {size(value):,}."
        )
    return {**shape, field: value}


class Attention(nn.Module):
    """Causal multi-head attention with its projections, (B, N, D) -> (B, N, D), by torch's fused
    kernel."""

    def __init__(self, d_model: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        return self.output(causal_attention(q, k, v).transpose(1, 2).flatten(2))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mixing_seconds(
    lengths: Sequence[int],
    tokens: int,
    d_model: int = 64,
    channels: int = ResNetBKConfig.channels,
    heads: int = 4,
    seconds: float = 2.0,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """Seconds of one forward and backward over about `tokens` tokens, in windows of each of
    `lengths`.

    Columns: `MIXING`; a layer includes its projections (and the BK layer its convolution and gate),
    a kernel is the mixing alone. The four run in turn, the median counts; on a GPU under bfloat16
    autocast, so that attention runs in its flash kernel.
    """
    rows = {}
    for length in lengths:
        half = torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda")
        with torch.device(device), half:
            calls = _mixing_calls(max(1, tokens // length), length, d_model, channels, heads)
            found = measure(calls, seconds)
        rows[length] = {name: timing.median for name, timing in found.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=MIXING).rename_axis("window")


def _mixing_calls(
    batch: int, length: int, d_model: int, channels: int, heads: int
) -> dict[str, Callable]:
    def leaf(*shape: int) -> Tensor:
        return torch.rand(*shape, requires_grad=True)

    x, heads_shape = leaf(batch, length, d_model), (batch, heads, length, d_model // heads)
    diagonal, hopping, eta = (
        leaf(batch, length, channels),
        leaf(batch, length, channels),
        leaf(channels),
    )
    q, k, v = (leaf(*heads_shape) for _ in range(3))
    mixer, attention = BKMixer(d_model, channels), Attention(d_model, heads)
    calls = [
        forward_backward(mixer, [x], mixer.parameters()),
        forward_backward(attention, [x], attention.parameters()),
        forward_backward(left_resolvent, [diagonal, hopping, eta]),
        forward_backward(causal_attention, [q, k, v]),
    ]
    return dict(zip(MIXING, calls))


def forward_backward(
    function: Callable, inputs: list[Tensor], parameters=()
) -> Callable[[], object]:
    """A call that runs `function` on the inputs and forms the gradients of all inputs and
    parameters."""
    wanted = [*inputs, *parameters]
    with torch.no_grad():
        gradient = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), wanted, gradient)


def crossing(seconds: pd.DataFrame, ours: str, theirs: str) -> float | None:
    """Window length from which `ours` is the faster column, by straight lines between the points on
    log-log axes; 0 when it always is, None when it is not at the largest."""
    lead = (seconds[theirs] / seconds[ours]).map(math.log)
    slower = lead.index[lead <= 0]
    if not len(slower):
        return 0.0
    if slower[-1] == lead.index[-1]:
        return None
    left, right = slower[-1], lead.index[lead.index.get_loc(slower[-1]) + 1]
    share = -lead[left] / (lead[right] - lead[left])
    return left * (right / left) ** share


def added_memory(setup: str, work: str) -> int:
    """Bytes that the statements `work` add to the resident memory of a fresh process at their peak,
    where `setup` has run before (its own peak counts, but on Linux). Raises RuntimeError with the
    last line of the error when statements fail."""
    restart = 'open("/proc/self/clear_refs", "w").write("5")' if STATUS.exists() else ""
    lines = "from kit.core.measurement import peak_memory", setup, restart, "before = peak_memory()"
    script = "\n".join([*lines, work, "print(peak_memory() - before)"])
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measured process failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])
