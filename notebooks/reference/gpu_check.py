"""What a GPU computes and how fast: agreement with float64 on the CPU, the BK layer against
attention, the training loop, a small pipeline from start to end, the coders. Prints a table and
writes DIR/gpu_check.json; at most 8 minutes on an H100.

    python -m notebooks.reference.gpu_check --out runs/gpu_check
    python -m notebooks.reference.gpu_check --out /tmp/check --device cpu --quick    # a dry run
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from kit.budget.rate import code_bits
from kit.core import ans, range_coder
from kit.core.measurement import measure, peak_memory, tune_process
from kit.core.protocols import pick_device
from kit.core.store import write_json
from kit.lab.records import environment
from kit.models import bk_core, bk_scan, build_model
from kit.models.moe import MoE
from kit.pipeline import CompressionPipeline
from kit.quantization import Format
from kit.quantization.fake import FakeQuantize
from kit.training.losses import linear_cross_entropy, next_token_loss
from notebooks.reference.baseline import load_or_train
from notebooks.reference.benchmarks import mixing_seconds
from notebooks.reference.plain import training_latency

BOUND = 2e-3  # largest error of float32, as a share of the largest entry
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)


def backends(device: torch.device) -> dict:
    """The BK-core's kernels for a device, by name."""
    found = {"scan": bk_scan}
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from notebooks.reference import bk_triton

        found["triton"] = bk_triton
    return found


def agreement(device: torch.device, quick: bool) -> list[dict]:
    """Values and gradients in float32 on the device beside float64 on the CPU: the largest
    difference as a share of the largest entry."""
    torch.manual_seed(0)
    size = (2, 200 if quick else 3000, 24)
    core = torch.randn(size), torch.rand(size), torch.rand(24) + 0.01
    layer = torch.randn(300, 16), torch.randn(700, 16), torch.randn(700)
    targets = torch.randint(0, 700, (300,))
    weight = (torch.randn(64, 64),)
    text = {"vocab_size": 300, "d_model": 32, "layers": 2, "experts": 3}
    model, batch = build_model("ResNetBK", text), torch.randint(0, 300, (2, 4, 64)).unbind()
    moe, rows = MoE(16, 32, 4, 2), (torch.randn(200, 16),)

    def whole(function: Callable, module: nn.Module):
        def call(*inputs):
            placed = module.to(inputs[0])
            value = function(placed, *inputs)
            return value, torch.autograd.grad(value.sum(), [*placed.parameters()])

        return call

    def loss(placed, like):
        return next_token_loss(placed, [tokens.to(like.device) for tokens in batch])

    def quantized(w):
        return FakeQuantize(w, Format(4), learned=True)(w)

    def bits(w):
        return code_bits(w, FakeQuantize(w, Format(8, granularity="tensor"), learned=True))

    def entropy(h, w, b):
        return linear_cross_entropy(h, w, b, targets.to(h.device))

    cases = [("cross-entropy", entropy, layer), ("INT4 weights", quantized, weight)]
    cases += [("experts", whole(lambda m, x: m(x), moe), rows), ("estimated bits", bits, weight)]
    cases += [("language model", whole(loss, model), (torch.zeros(1),))]
    found = [_compared(*case, device) for case in cases]
    for name, backend in backends(device).items():
        bk_core.on_device = backend
        for function in (bk_core.left_resolvent, bk_core.staggered_reflection):
            found.append(_compared(f"{function.__name__}, {name}", function, core, device))
    bk_core.on_device = bk_scan
    return found


def _compared(name: str, function: Callable, inputs: tuple, device: torch.device) -> dict:
    def run(place, dtype) -> list[Tensor]:
        leaves = [x.to(place, dtype).requires_grad_() for x in inputs]
        value = function(*leaves)
        value, more = value if isinstance(value, tuple) else (value, ())
        flat = torch.view_as_real(value) if value.is_complex() else value
        grads = torch.autograd.grad(flat.sum(), leaves, allow_unused=True) if not more else more
        return [t.detach().double().cpu() for t in (flat, *grads) if t is not None]

    pairs = zip(run(device, torch.float32), run("cpu", torch.float64))
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)
    return {"what": name, "error": error, "right": error < BOUND}


def mixing(device: torch.device, quick: bool) -> list[dict]:
    """Milliseconds of forward and backward of the BK layer and of attention, and their ratio."""
    lengths, tokens, found = (LENGTHS, 65536, []) if not quick else ((256, 512), 1024, [])
    for name, backend in backends(device).items():
        bk_core.on_device = backend
        table = mixing_seconds(lengths, tokens, seconds=2.0 if not quick else 0.1, device=device)
        for window, row in table.iterrows():
            times = {f"{what}, ms": 1000 * value for what, value in row.items()}
            ratio = row["attention layer"] / row["BK layer"]
            found.append({"kernels": name, "window": window, **times, "times attention": ratio})
    bk_core.on_device = bk_scan
    return found


def training(device: torch.device, quick: bool) -> list[dict]:
    """Tokens a second of the plain loop and of kit.training."""
    size = (4, 64) if quick else (32, 128)
    vocabulary = 500 if quick else 30000
    model = build_model("ResNetBK", {"vocab_size": vocabulary, "tied": True}).to(device)
    batches = [torch.randint(0, vocabulary, (2, *size), device=device).unbind() for _ in range(4)]
    timings = training_latency(model, batches, 0.1 if quick else 10.0)
    tokens = len(batches) * size[0] * size[1]
    rates = {name: tokens / timing.median for name, timing in timings.items()}
    return [{"loop": n, "tokens/s": r, "times plain": r / rates["plain"]} for n, r in rates.items()]


def pipeline(device: torch.device, quick: bool, out: Path) -> list[dict]:
    """A dense model and what the pipeline makes of it: minutes, and the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start, folder = time.perf_counter(), out / f"pipeline-{time.time_ns()}"
    readme = Path(__file__).parents[2] / "kit" / "README.md"
    data = {
        "corpus": f"text:{readme}",
        "vocab_size": 300,
        "seq_len": 32,
        "d_model": 16,
        "layers": 1,
    }
    data = data if quick else {"corpus": "docs"}
    steps = 10 if quick else 300
    dense = load_or_train(**data, steps=steps, device=str(device), log=False)
    trained = time.perf_counter() - start
    compression = CompressionPipeline(dense.model, 3.0 if quick else 20.0, str(device), log=False)
    loaders, epochs = dense.loaders, steps / len(dense.loaders.train)
    own = epochs / 4, epochs / 4, epochs
    _, metrics = compression.run_pipeline(loaders.train, loaders.validation, *own, save_dir=folder)
    row = {"dense, s": trained, "all, s": time.perf_counter() - start}
    row |= {"peak memory, MB": peak_memory(device) / 1e6, "ratio": metrics["compression_ratio"]}
    return [row | {"target met": metrics["target_met"]}]


def coders(quick: bool) -> list[dict]:
    """Millions of codes a second, on the CPU."""
    found, rng = [], np.random.default_rng(0)
    for bits, scale in ((4, 1.5), (8, 20.0)):
        shape = (100, 200) if quick else (2000, 1000)
        codes = rng.laplace(0, scale, shape).round().clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes = codes.astype(np.int32)
        for name, coder in (("adaptive", range_coder), ("static", ans)):
            data = coder.encode(codes)
            calls = {"encode": partial(coder.encode, codes)}
            calls["decode"] = partial(coder.decode, data, shape)
            speed = {k: codes.size / t.median / 1e6 for k, t in measure(calls, 0.1).items()}
            row = {"coder": name, "bits": bits, **speed}
            found.append(row | {"bits a code": 8 * len(data) / codes.size})
    return found


def show(title: str, rows: list[dict]) -> None:
    table = pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format)
    print(f"\n{title}\n{table}", flush=True)


def main() -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    options = parser.parse_args()
    device, quick, start = pick_device(options.device), options.quick, time.perf_counter()
    tune_process()
    record = {**environment(), "device": str(device), "quick": quick}
    parts = {
        "agreement": lambda: agreement(device, quick),
        "mixing": lambda: mixing(device, quick),
        "training": lambda: training(device, quick),
        "coders": lambda: coders(quick),
        "pipeline": lambda: pipeline(device, quick, options.out),
    }
    for name, part in parts.items():
        record[name] = part()
        record["seconds"] = time.perf_counter() - start
        show(name, record[name])
        write_json(options.out / "gpu_check.json", record)  # after each part: what is known is kept
    return record


if __name__ == "__main__":
    main()
