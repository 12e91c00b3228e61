"""The kit's two entropy coders beside general compressors, and what coding costs as models grow.

python -m notebooks.reference.coder --out notebooks/reference/coder.json

Times are of this process's CPU, to which other processes add little. Compressors whose package is
missing (brotli, zstandard, nncodec) are left out.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import importlib.util
import json
import multiprocessing
import tempfile
import time
import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from torch import nn

from kit import artifact
from kit.budget import SampledLoss, rate, round_to_budget
from kit.core import ans, range_coder
from kit.core.measurement import measure, peak_memory
from kit.core.store import write_json
from kit.lab.records import environment
from kit.quantization import Format, quantize_weights
from kit.quantization.packing import pack
from kit.training import TrainConfig, train

KINDS = {"INT4": (7, 2.2), "INT8": (127, 30.0), "mostly zero": (7, 0.3)}  # largest code, its spread


def codes_of(kind: str, rows: int = 1024, columns: int = 1024) -> np.ndarray:
    """Normal codes whose rows differ in size as those of trained matrices do."""
    most, spread = KINDS[kind]
    rng = np.random.default_rng(0)
    sizes = spread * np.exp(0.3 * rng.normal(size=(rows, 1)))
    return np.rint(sizes * rng.normal(size=(rows, columns))).clip(-most, most).astype(np.int32)


def coders(codes: np.ndarray) -> dict:
    """Name -> (encode, decode), of packed codes for compressors that know bytes only."""
    bits = 8 if codes.max() > 7 else 4
    packed, found = pack(codes.reshape(-1), bits), {}
    found["adaptive"] = (
        lambda: range_coder.encode(codes),
        lambda data: range_coder.decode(data, codes.shape),
    )
    found["streams (rANS)"] = (
        lambda: ans.encode(codes),
        lambda data: ans.decode(data, codes.shape),
    )
    found["zlib 9"] = (lambda: zlib.compress(packed, 9), zlib.decompress)
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found["zstd 19"] = (
            lambda: zstandard.ZstdCompressor(19).compress(packed),
            zstandard.ZstdDecompressor().decompress,
        )
    if importlib.util.find_spec("brotli"):
        import brotli

        found["brotli 11"] = (lambda: brotli.compress(packed), brotli.decompress)
    if importlib.util.find_spec("nncodec"):
        found["NNCodec's CABAC"] = deep_cabac(codes)
    return found


def deep_cabac(codes: np.ndarray) -> tuple:
    """The arithmetic coder of NNCodec (ISO/IEC 15938-17), given the codes as they are."""
    from nncodec.extensions import deepCABAC as coder

    unary, off = 11, (coder.HdspMode.AlwaysOff, np.array([], np.int8), 0, 0)

    def encode():
        encoder = coder.Encoder()
        encoder.initCtxModels(unary, 0)
        encoder.encodeLayer(codes, 0, 0, 0, 0, 0, np.zeros(len(codes), np.int32), *off)
        return encoder.finish()

    def decode(data):
        decoder, found = coder.Decoder(), np.zeros_like(codes)
        decoder.setStream(data)
        decoder.initCtxModels(unary)
        decoder.decodeLayer(found, 0, 0, 0, 0, *off)
        return found

    return encode, decode


def compare(seconds: float) -> pd.DataFrame:
    """Bytes, and millions of codes a second that each coder writes and reads."""
    rows = []
    for kind in KINDS:
        codes = codes_of(kind)
        found = coders(codes)
        datas = {name: encode() for name, (encode, _) in found.items()}
        calls = {f"{n}, read": functools.partial(found[n][1], datas[n]) for n in found}
        calls |= {f"{name}, write": found[name][0] for name in found if "rotli" not in name}
        timings = measure(calls, seconds)
        counts = np.unique(codes, return_counts=True)[1]
        ideal = -(counts * np.log2(counts / codes.size)).sum() / 8
        rows.append({"codes": kind, "coder": "order-0 entropy", "bytes": round(ideal)})
        for name, data in datas.items():
            row = {"codes": kind, "coder": name, "bytes": len(data)}
            for what in ("read", "write"):
                if timing := timings.get(f"{name}, {what}"):
                    row[f"{what}, Mcodes/s"] = codes.size / timing.median / 1e6
            rows.append(row)
    return pd.DataFrame(rows)


class Decoder(nn.Module):
    """A transformer decoder of any size, for cost as it grows."""

    def __init__(self, width: int, layers: int, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.layers(self.embedding(ids), mask, is_causal=True) @ self.embedding.weight.T


SIZES = {1: (96, 4, 6000), 4: (192, 6, 8000), 16: (384, 6, 14000), 64: (640, 9, 32000)}
SIZES[124] = (768, 12, 50257)
SMALLEST = (64, 1, 500)


def timed(row: dict, what: str, call):
    """Notes CPU seconds of a call, and the peak of memory in it over what was held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, held = time.process_time(), peak_memory()
    result = call()
    row |= {f"{what}, s": time.process_time() - start, f"{what}, peak bytes": peak_memory() - held}
    return result


def cost(shape: tuple[int, int, int], path: Path) -> dict:
    """What each step takes (`timed`) for a Decoder of this width, layers and vocabulary, saved as
    `path`; of training under a rate, the share of its time that coding takes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Decoder(*shape).eval()
    ids = torch.randint(shape[2], (4, 32))
    row = {"parameters": sum(p.numel() for p in model.parameters())}

    def step():
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        torch.optim.AdamW(model.parameters()).step()

    timed(row, "training step", step)
    model.zero_grad(set_to_none=True)
    quantized = quantize_weights(copy.deepcopy(model), Format(4))
    row["bytes"] = timed(row, "save", lambda: artifact.save(quantized, path))
    batches = [(torch.randint(shape[2], (4, 32)), None) for _ in range(8)]
    rounded, target = copy.deepcopy(model), artifact.float32_bytes(model) // 8
    timed(row, "rounding", lambda: round_to_budget(rounded, batches, target, SampledLoss()))
    return {**row, "share of coding": coding_share(model, shape[2])}


def loading(shape: tuple[int, int, int], path: Path, packed: bool) -> dict:
    """What loading takes in a process that does nothing else, and the bytes that it leaves."""
    torch.set_num_threads(1)
    with artifact.without_values():
        model, row = Decoder(*shape), {}
    name = "load packed" if packed else "load"
    timed(row, name, lambda: artifact.load(path, model, packed=packed))
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {**row, f"{name}, held bytes": held}


def grown(shape: tuple[int, int, int]) -> dict:
    """All of it, each part in a process of its own that has read its compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        row, small, path = {}, Path(folder) / "small.kit", Path(folder) / "model.kit"
        for work, *more in ((cost,), (loading, False), (loading, True)):
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                if work is cost:
                    fresh.apply(cost, (SMALLEST, small))
                fresh.apply(loading, (SMALLEST, small, True))
                row |= fresh.apply(work, (shape, path, *more))
        return row


def coding_share(model: nn.Module, vocabulary: int, steps: int = 200, seen: int = 40) -> float:
    """Of the CPU time of training under a rate, to a twelfth of the float32 bytes, in steps of 256
    tokens: what the coder takes. Measured in the first steps, where it codes most."""
    ids = torch.randint(vocabulary, (4, 64))
    target = artifact.float32_bytes(model) // 12

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    spent, coded = 0.0, rate.RateLoss.coded

    def counted(term):
        nonlocal spent
        start = time.process_time()
        size = coded(term)
        spent += time.process_time() - start
        return size

    def until(step: int, *_) -> None:
        if step == seen:
            raise KeyboardInterrupt

    rate.set_rate_formats(model, rate.row_sensitivity(model, [ids], loss), 2.5 * target)
    term = rate.RateLoss(loss, model, target, [ids])
    more = {"extra_parameters": term.parameters(), "hooks": [term.step, until], "log": False}
    with patch.object(rate.RateLoss, "coded", counted):
        start = time.process_time()
        with contextlib.suppress(KeyboardInterrupt):
            train(model, [ids], TrainConfig(steps), loss=term, **more)
        return spent / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    options = parser.parse_args()
    table = compare(options.seconds)
    print(table.to_string(index=False))
    record = {**environment(), "coders": table.to_dict("records"), "growth": []}
    for millions in options.sizes:
        record["growth"].append(grown(SIZES[millions]))
        print(json.dumps(record["growth"][-1]), flush=True)
        write_json(options.out, record)


if __name__ == "__main__":
    main()
