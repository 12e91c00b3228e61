"""What a number of bytes buys: ways to spend it on a trained language model, each a file that is
reloaded and measured.

The kit's own ways (rounding by sensitivity, distillation under a rate) and those they are compared
with. Every function returns a row: name, bytes, ratio, perplexity on the test split with its 95 %
interval, bits per byte.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kit import artifact
from kit.budget.rate import RateLoss, row_sensitivity, set_rate_formats
from kit.core.weights import copy_model
from kit.data import load_corpus, token_loaders
from kit.distillation.students import config_for_parameters
from kit.models import ResNetBK
from kit.pipeline import CompressionPipeline, arrange_for_coding
from kit.quantization import INT8, Format, quantize_weights, uniform
from kit.training import TrainConfig, train
from kit.training.evaluation import Evaluation, evaluate
from kit.training.losses import training_loss
from notebooks.reference.baseline import Baseline

# Of what the rivals do not compress themselves.
BODY = Format(4, granularity="group", group_size=64, range="mse")


def token_parts(dense: Baseline) -> np.ndarray | None:
    """What each token was merged from, (V, 2), if it was."""
    return dense.corpus.tokenizer.parts


def row(name: str, size: int, test: Evaluation, dense: Baseline, **more) -> dict:
    """What a model that came out of `size` bytes reached on the test split."""
    low, high = test.interval()
    return {
        "name": name,
        "bytes": size,
        "ratio": dense.bytes / size,
        "perplexity": test.perplexity,
        "low": low,
        "high": high,
        "bits_per_byte": test.bits_per_byte(dense.corpus.utf8_bytes["test"]),
        **more,
    }


def measured(name: str, path: Path, dense: Baseline, **more) -> dict:
    """The row of an artifact made of the dense model, loaded from its file."""
    test = evaluate(dense.load(path), dense.loaders.test)
    return row(name, Path(path).stat().st_size, test, dense, **more)


def dense_row(dense: Baseline) -> dict:
    """The row of the dense model itself."""
    more = {"seconds": dense.seconds, "tokens": dense.tokens}
    return row("dense float32", dense.path.stat().st_size, dense.test, dense, **more)


def rounded(dense: Baseline, ratio: float, folder: Path) -> dict:
    """No training: composed and ordered tables, steps by the sensitivity of rows, as wide as the
    bytes ask for."""
    model, batches = copy_model(dense.model), list(itertools.islice(dense.loaders.train, 8))
    loss = training_loss(model)
    arrange_for_coding(model, batches, loss, token_parts(dense), dense.corpus.token_counts)
    budget, sensitivity = int(dense.bytes / ratio), row_sensitivity(model, batches, loss)
    set_rate_formats(model, sensitivity, budget)
    codes = 2 * budget - artifact.nbytes(model)  # what is not codes needs its room
    set_rate_formats(model, sensitivity, codes)
    RateLoss(loss, model, budget, batches[:1]).finish()
    artifact.save(model, path := Path(folder) / f"rounded_{ratio:g}x.kit")
    return measured(f"rounding {ratio:g}x", path, dense)


def compressed(
    dense: Baseline, pipeline: CompressionPipeline, loader, folder: Path, **steps: int
) -> list[dict]:
    """A row for each stage of a pipeline, `steps` optimizer steps of each on the batches of
    `loader`."""
    epochs = {f"{stage}_epochs": count / len(loader) for stage, count in steps.items()}
    _, metrics = pipeline.run_pipeline(loader, dense.loaders.validation, save_dir=folder, **epochs)
    rows, costs = [], ("seconds", "tokens", "peak_memory")
    for name, stage in metrics["stage_metrics"].items():
        spent = {key: stage.get(key) for key in costs}
        rows.append(measured(name, Path(stage["path"]), dense, **spent))
    return rows


def small_model(
    dense: Baseline, size: int, folder: Path, steps: int, vocab_size: int | None = None
) -> dict:
    """A model of at most about `size` bytes trained directly on the labels in INT8, on as many
    windows a step as the dense model; with another vocabulary than the dense model's only its bits
    per byte compare."""
    if vocab_size:
        text = load_corpus(dense.corpus.name, vocab_size)
        batch = next(iter(dense.loaders.train))[0]
        dense = replace(dense, corpus=text, loaders=token_loaders(text, *batch.shape))
    torch.manual_seed(0)
    model = ResNetBK(config_for_parameters(int(0.95 * size), dense.corpus.tokenizer.vocab_size))
    quantize_weights(model, uniform(model, INT8))
    train(
        model,
        dense.loaders.train,
        TrainConfig(steps, lr=1e-2),
        loss=training_loss(model),
        log=False,
    )
    words = dense.corpus.tokenizer.vocab_size
    size = artifact.save(model, path := Path(folder) / f"small_{words}.kit")
    test = evaluate(artifact.load(path), dense.loaders.test)
    return row(f"small model, {words:,} words", size, test, dense)


# Rivals: the two token tables in another way, everything else in BODY; no training, like `rounded`


def _rival(
    name: str,
    dense: Baseline,
    encode: Callable[[Tensor], tuple[Tensor, Sequence[np.ndarray]]],
    folder: Path,
) -> dict:
    """encode(table (V, D)) -> the table as it comes back, and the arrays it comes back from,
    counted after zlib."""
    model, size = quantize_weights(copy_model(dense.model), uniform(dense.model, BODY)), 0
    path = Path(folder) / "rival.kit"
    tables = {
        n: p
        for n, p in dense.model.named_parameters()
        if p.ndim == 2 and len(p) == dense.corpus.tokenizer.vocab_size
    }
    quantize_weights(model, {n: None for n in tables})
    decoded = {}
    for table, weight in tables.items():
        decoded[table], arrays = encode(weight.detach().cpu())
        size += sum(len(zlib.compress(np.ascontiguousarray(a).tobytes(), 9)) for a in arrays)
        model.get_parameter(table).data.zero_()
    size += artifact.save(model, path)
    model = dense.load(path)
    for table, rows in decoded.items():
        model.get_parameter(table).data.copy_(rows)
    return row(name, size, evaluate(model, dense.loaders.test), dense)


def product_quantized(dense: Baseline, pieces: int, folder: Path, centroids: int = 256) -> dict:
    """Each row in `pieces`, each piece one of 256 centroids in half precision (Jegou et al. 2011;
    k-means weighted by token counts, 12 rounds)."""
    weights = torch.from_numpy(dense.corpus.token_counts).float() + 1

    def encode(table):
        parts = [_k_means(part, weights, centroids) for part in table.chunk(pieces, 1)]
        rows = torch.cat([centres.half().float()[codes] for centres, codes in parts], 1)
        return rows, [
            a
            for centres, codes in parts
            for a in (centres.half().numpy(), codes.numpy().astype(np.uint8))
        ]

    return _rival(f"product quantization {pieces} x 8 bits", dense, encode, folder)


def _k_means(x: Tensor, weights: Tensor, k: int, rounds: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = x[torch.multinomial(weights, k, generator=generator)].clone()
    for _ in range(rounds):
        codes = torch.cat([torch.cdist(block, centres).argmin(1) for block in x.split(4096)])
        mass = torch.zeros(k).index_add_(0, codes, weights)
        sums = torch.zeros_like(centres).index_add_(0, codes, x * weights[:, None])
        centres = torch.where(mass[:, None] > 0, sums / mass.clamp(min=1e-9)[:, None], centres)
    return centres, codes


def low_rank(dense: Baseline, rank: int, bits: int, folder: Path) -> dict:
    """Tables as products (V, rank) (rank, D) of `bits`-bit codes, the singular value decomposition
    weighted by token counts."""
    weights = (torch.from_numpy(dense.corpus.token_counts).float() + 1).sqrt()[:, None]
    format = Format(bits, granularity="channel", range="mse")

    def encode(table):
        _, _, right = torch.linalg.svd(weights * table, full_matrices=False)
        thin = nn.Linear(rank, len(table), bias=False)
        thin.weight.data = table @ right[:rank].T
        quantizer = quantize_weights(nn.Sequential(thin), format)[0].parametrizations.weight[0]
        codes, scale, _ = quantizer.codes(thin.parametrizations.weight.original)
        basis = right[:rank].half()
        return thin.weight.detach() @ basis.float(), [
            codes.numpy(),
            scale.half().numpy(),
            basis.numpy(),
        ]

    return _rival(f"rank {rank} x {bits} bits + zlib", dense, encode, folder)


def uniform_zlib(dense: Baseline, bits: int, folder: Path) -> dict:
    """One format for every matrix, in groups of 64, the packed file after zlib."""
    format = Format(bits, granularity="group", group_size=64, range="mse")
    model = quantize_weights(copy_model(dense.model), uniform(dense.model, format))
    artifact.save(model, path := Path(folder) / "uniform.kit", layouts=("dense",))
    return row(
        f"uniform {bits} bits + zlib",
        len(zlib.compress(path.read_bytes(), 9)),
        evaluate(dense.load(path), dense.loaders.test),
        dense,
    )


def hashed(dense: Baseline, buckets: int, folder: Path) -> dict:
    """Each row the sum of two of `buckets` shared rows in half precision, chosen by hash (Svenstrup
    et al. 2017, without importance weights), fitted by twenty steps of weighted alternating least
    squares."""
    weights = torch.from_numpy(dense.corpus.token_counts).float() + 1
    hashes = torch.randint(
        0, buckets, (2, len(weights)), generator=torch.Generator().manual_seed(0)
    )

    def encode(table):
        shared = torch.zeros(2, buckets, table.shape[1])
        for turn in range(20):
            own, other = hashes[turn % 2], hashes[1 - turn % 2]
            left = (table - shared[1 - turn % 2][other]) * weights[:, None]
            mass = torch.zeros(buckets).index_add_(0, own, weights).clamp(min=1e-9)
            shared[turn % 2] = (
                torch.zeros(buckets, table.shape[1]).index_add_(0, own, left) / mass[:, None]
            )
        shared = shared.half().float()
        return shared[0][hashes[0]] + shared[1][hashes[1]], [shared.half().numpy()]

    return _rival(f"hashed into 2 x {buckets:,} rows", dense, encode, folder)
