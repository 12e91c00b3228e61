"""The reference model (30,000 words, 4.2 M parameters) on a corpus, and what the kit makes of it; a folder a run, beside
this file, with its record and its compressed file. `notebooks/08_reference.ipynb` reads them.

It is trained twice, with one matrix for input and output (tied) and with two. The tied one, which is better after 3,000 steps each
(54.0 against 56.3 on docs), is trained for 12,000 and compressed; ratios are to the float32 file of the untied one, degradations to the
perplexity of the tied one.

    python notebooks/reference/run.py docs                                         # 100x: QAT, pruning, distillation
    python notebooks/reference/run.py text:../shared/data/novels --steps 8000
    python notebooks/reference/run.py docs --target-compression 40 --stages distillation
    python notebooks/reference/run.py docs --pointer                               # that file and the dense model, pointing
    python notebooks/reference/run.py docs --controls                              # rounding and rivals
    python -m kit.lab.remeasure notebooks/reference/docs-100x-0                        # the file again, in a fresh process
"""

import argparse
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = HERE.parents[1] / "runs"
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np
import torch

from kit import artifact
from kit.core import range_coder as coding
from kit.core.measurement import tune_process
from notebooks.reference import frontier
from kit.lab.baseline import Baseline, load_or_train
from kit.data import token_loaders
from notebooks.reference.pointer import fit_pointer
from notebooks.reference.ngram import KneserNey
from kit.lab.sampling import continue_text
from kit.pipeline import STAGES, CompressionPipeline
from kit.quantization import quantizers
from kit.quantization.fake import seen_by
from kit.lab.records import write_result

SHAPE = {"d_model": 64, "layers": 4, "experts": 4, "dropout": 0.1}
WEIGHT_DECAY = 0.3  # chosen on validation, like dropout: these texts are small for 4.2 M parameters
ROUNDING = (8, 16, 24, 40, 60, 100)
SMALL_VOCABULARY = 2048
UNTIED_STEPS = 3000  # of a model that counts by its bytes
LEARNING_RATE = 4e-3  # chosen on validation
WINDOWS = 16  # of 128 tokens, a step of the compression; chosen on validation, where more steps of fewer windows did better


def main() -> None:
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="docs, or text:<file, folder or glob>")
    parser.add_argument("--vocab-size", type=int, default=30000)
    parser.add_argument("--dense-steps", type=int, default=12000, help="of the tied model, of 32 windows of 128 tokens")
    parser.add_argument("--steps", type=int, default=4600, help="of distillation, of 16 windows; QAT and pruning: a twentieth each. 8,000 are better")
    parser.add_argument("--target-compression", type=float, default=100.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0, help="of the compression; the dense model's is 0")
    parser.add_argument("--pointer", action="store_true", help="to the run of these settings, which is there already")
    parser.add_argument("--controls", action="store_true")
    settings = vars(parser.parse_args())
    untied = dense_model(settings, False, min(UNTIED_STEPS, settings["dense_steps"]))
    tied = dense_model(settings, True, settings["dense_steps"], final_lr=0.0)
    dense = replace(tied, bytes=untied.bytes)  # the better model is compressed; ratios are to the larger file
    name = settings["corpus"].rsplit("/", 1)[-1].removesuffix(".txt")
    stages = [] if settings["stages"] == list(STAGES) else settings["stages"]
    run = "controls" if settings["controls"] else f"{settings['target_compression']:g}x-{settings['seed']}"
    name = "-".join([name, *stages, run])
    place = HERE / (f"{name}-pointer" if settings["pointer"] else name)
    place.mkdir(exist_ok=True)
    if settings["controls"]:
        record = controls(dense, place)
    elif settings["pointer"]:
        record = pointing(dense, HERE / name / "model.kit", place)
    else:
        record = compression(dense, place, settings)
    write_result(place, {
        "notebook": "reference/run.py", "parameters": {**settings, "train_bytes": None, "batch_size": 32, "compression_batch_size": WINDOWS, "lr": LEARNING_RATE, "seq_len": 128},
        "seed": settings["seed"], "untied": frontier.dense_row(untied), "dense": frontier.dense_row(dense), "threads": torch.get_num_threads(),
        "corpus": {"name": dense.corpus.name, "sha256": dense.corpus.sha256}, **record})


def dense_model(settings: dict, tied: bool, steps: int, **training) -> Baseline:
    return load_or_train(corpus=settings["corpus"], vocab_size=settings["vocab_size"], batch_size=32, seq_len=128,
                         steps=steps, weight_decay=WEIGHT_DECAY, tied=tied, **training, **SHAPE)


def compression(dense: Baseline, place: Path, settings: dict) -> dict:
    steps = settings["steps"]
    folder = RUNS / f"reference-{place.name}-{steps}"
    own = settings["target_compression"] * dense.path.stat().st_size / dense.bytes
    pipeline = CompressionPipeline(dense.model, own, stages=settings["stages"], lr=LEARNING_RATE, seed=settings["seed"],
                                   token_parts=frontier.token_parts(dense), token_counts=dense.corpus.token_counts)
    loader = token_loaders(dense.corpus, WINDOWS, 128).train
    stages = frontier.compressed(dense, pipeline, loader, folder, qat=steps // 20, pruning=steps // 20, distillation=steps)
    file, start = folder / f"{settings['stages'][-1]}.kit", time.perf_counter()
    model = artifact.load(file, parts=frontier.token_parts(dense))
    seconds, last = time.perf_counter() - start, stages[-1]
    print({key: last[key] for key in ("bytes", "ratio", "perplexity")}, f"dense {dense.test.perplexity:.2f}")
    shutil.copy(file, place / "model.kit")
    prompt = dense.corpus.tokenizer.decode(dense.corpus.test[:12])
    return {"stages": stages, "load_seconds": seconds, "degradation": last["perplexity"] / dense.test.perplexity - 1,
            "artifact": "model.kit", **{key: last[key] for key in ("bytes", "ratio", "perplexity", "low", "high", "bits_per_byte")},
            "components": artifact.describe(file)[["tensor", "bytes"]].to_dict("records"), "row_bits": row_bits(dense, file),
            "texts": {who: continue_text(m, dense.corpus.tokenizer, prompt, 60) for who, m in
                      {"dense": dense.model, "compressed": model}.items()}}


def pointing(dense: Baseline, file: Path, place: Path) -> dict:
    """The compressed and the dense model, each mixed with a pointer fitted on validation."""
    folder, rows = RUNS / f"reference-{place.name}", {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in {"dense": dense.model, "compressed": artifact.load(file, trainable=True, parts=frontier.token_parts(dense))}.items():
        pointer = fit_pointer(model, dense.loaders.validation)
        artifact.save(pointer, path := folder / f"{name}.kit")
        numbers = {key: value.tolist() for key, value in pointer.named_parameters() if not key.startswith("model.")}
        rows[name] = frontier.measured(f"{name}, pointing", path, dense, pointer=numbers)
        print(rows[name])
    shutil.copy(path, place / "model.kit")
    return {"artifact": "model.kit", "rows": rows, **{key: rows["compressed"][key] for key in ("bytes", "ratio", "perplexity")}}


def row_bits(dense: Baseline, file: Path) -> list[tuple[int, float]]:
    """Mean bits of an embedding row by rank of its token in frequency: (last rank, bits), a pair a bin."""
    model = artifact.load(file, trainable=True, parts=frontier.token_parts(dense))
    quantizer = quantizers(model)["embedding.weight"]
    codes = quantizer.codes(seen_by(quantizer, model.embedding, "weight"))[0].numpy()
    edges = np.unique(np.geomspace(16, len(codes), 20).astype(int))
    return [(int(b), 8 * len(coding.encode(codes[a:b])) / (b - a)) for a, b in zip([0, *edges], edges)]


def controls(dense: Baseline, place: Path) -> dict:
    folder, text = RUNS / f"reference-{place.name}", dense.corpus
    folder.mkdir(parents=True, exist_ok=True)
    rivals = [*(frontier.product_quantized(dense, pieces, folder) for pieces in (8, 16)), frontier.low_rank(dense, 32, 4, folder),
              frontier.hashed(dense, 2000, folder), *(frontier.uniform_zlib(dense, bits, folder) for bits in (2, 4))]
    orders = (1, 2, 4)
    small = [frontier.small_model(dense, dense.bytes // 100, folder, 2000, SMALL_VOCABULARY)]
    return {"rounding": [frontier.rounded(dense, ratio, folder) for ratio in ROUNDING], "rivals": rivals, "small": small,
            "kneser_ney": {n: KneserNey.fit(text.train, n, text.tokenizer.vocab_size).perplexity(text.test) for n in orders}}


if __name__ == "__main__":
    main()
