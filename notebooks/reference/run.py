"""The reference model (30,000 words, 4.2 M parameters) on a corpus, and what the kit makes of it: a
folder a run, beside this file, with its record and its compressed file, which
`notebooks/08_reference.ipynb` reads.

The dense model is trained twice, with one matrix for input and output (tied) and with two. The tied
one, which is better after 3,000 steps each (54.0 against 56.3 on docs), is trained for 12,000 and
compressed; ratios are to the float32 file of the untied one, degradations to the tied one.

    python -m notebooks.reference.run docs                  # 100x: QAT, pruning, distillation
    python -m notebooks.reference.run text:../shared/data/novels --steps 8000
    python -m notebooks.reference.run docs --target-compression 40 --stages distillation
    python -m notebooks.reference.run docs --pointer  # that file and the dense model, pointing
    python -m notebooks.reference.run docs --controls       # rounding and rivals
    python -m notebooks.reference.remeasure notebooks/reference/docs-100x-0
"""

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kit import artifact
from kit.core import range_coder
from kit.core.measurement import tune_process
from kit.core.weights import weight_of
from kit.data import token_loaders
from kit.lab.records import write_result
from kit.pipeline import STAGES, CompressionPipeline
from kit.quantization.fake import FakeQuantize
from notebooks.reference import frontier
from notebooks.reference.baseline import Baseline, load_or_train
from notebooks.reference.ngram import KneserNey
from notebooks.reference.pointer import fit_pointer
from notebooks.reference.sampling import continue_text

HERE = Path(__file__).resolve().parent
RUNS = HERE.parents[1] / "runs"
SHAPE = {"d_model": 64, "layers": 4, "experts": 4, "dropout": 0.1}
WEIGHT_DECAY = 0.3  # chosen on validation, like dropout: these texts are small for 4.2 M parameters
ROUNDING = (8, 16, 24, 40, 60, 100)
SMALL_VOCABULARY = 2048
UNTIED_STEPS = 3000  # of a model that counts by its bytes
LEARNING_RATE = 4e-3  # chosen on validation
WINDOWS = 16  # of 128 tokens, a step of the compression; more of them in fewer steps were worse


def main() -> None:
    tune_process()
    help_text, raw = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=help_text, formatter_class=raw)
    add = parser.add_argument
    add("corpus", help="docs, or text:<file, folder or glob>")
    add("--vocab-size", type=int, default=30000)
    add("--dense-steps", type=int, default=12000, help="of the tied model, of 32 windows")
    more = "; QAT and pruning take a twentieth each, and 8,000 are better"
    add("--steps", type=int, default=4600, help="of distillation, of 16 windows of 128" + more)
    add("--target-compression", type=float, default=100.0)
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add(
        "--device", default="auto", help="auto, cpu, cuda, mps; torchrun gives each process its own"
    )
    add("--seed", type=int, default=0, help="of the compression; the dense model's is 0")
    add("--pointer", action="store_true", help="to the run of these settings, already there")
    add("--controls", action="store_true")
    settings = vars(parser.parse_args())
    untied = dense_model(settings, False, min(UNTIED_STEPS, settings["dense_steps"]))
    tied = dense_model(settings, True, settings["dense_steps"], final_lr=0.0)
    dense = replace(tied, bytes=untied.bytes)  # ratios are to the larger file
    name = settings["corpus"].rsplit("/", 1)[-1].removesuffix(".txt")
    stages = [] if settings["stages"] == list(STAGES) else settings["stages"]
    run = f"{settings['target_compression']:g}x-{settings['seed']}"
    name = "-".join([name, *stages, "controls" if settings["controls"] else run])
    place = HERE / (f"{name}-pointer" if settings["pointer"] else name)
    place.mkdir(exist_ok=True)
    if settings["controls"]:
        record = controls(dense, place)
    elif settings["pointer"]:
        record = pointing(dense, HERE / name / "model.kit", place)
    else:
        record = compression(dense, place, settings)
    fixed = {"train_bytes": None, "batch_size": 32, "seq_len": 128}
    fixed |= {"compression_batch_size": WINDOWS, "lr": LEARNING_RATE}
    about = {"notebook": "reference/run.py", "seed": settings["seed"]}
    about |= {"parameters": {**settings, **fixed}, "threads": torch.get_num_threads()}
    about |= {"untied": frontier.dense_row(untied), "dense": frontier.dense_row(dense)}
    about |= {"corpus": {"name": dense.corpus.name, "sha256": dense.corpus.sha256}}
    write_result(place, {**about, **record})


def dense_model(settings: dict, tied: bool, steps: int, **training) -> Baseline:
    data = {name: settings[name] for name in ("corpus", "vocab_size", "device")} | {"seq_len": 128}
    training |= {"steps": steps, "weight_decay": WEIGHT_DECAY, "batch_size": 32}
    return load_or_train(**data, **training, tied=tied, **SHAPE)


def compression(dense: Baseline, place: Path, settings: dict) -> dict:
    """The pipeline's stages, and what its last file holds and says."""
    steps, text, parts = settings["steps"], dense.corpus, frontier.token_parts(dense)
    folder = RUNS / f"reference-{place.name}-{steps}"
    own = settings["target_compression"] * dense.path.stat().st_size / dense.bytes
    options = {name: settings[name] for name in ("stages", "seed", "device")}
    options |= {"lr": LEARNING_RATE}
    options |= {"token_parts": parts, "token_counts": text.token_counts}
    pipeline, loader = (
        CompressionPipeline(dense.model, own, **options),
        token_loaders(text, WINDOWS, 128).train,
    )
    of = {"qat": steps // 20, "pruning": steps // 20, "distillation": steps}
    stages = frontier.compressed(dense, pipeline, loader, folder, **of)
    file, start = folder / f"{settings['stages'][-1]}.kit", time.perf_counter()
    model = artifact.load(file, parts=parts)
    seconds, last = time.perf_counter() - start, stages[-1]
    shutil.copy(file, place / "model.kit")
    figures = ("bytes", "ratio", "perplexity", "low", "high", "bits_per_byte")
    record = {"stages": stages, "load_seconds": seconds, **{key: last[key] for key in figures}}
    record["degradation"] = last["perplexity"] / dense.test.perplexity - 1
    print({key: record[key] for key in ("bytes", "ratio", "perplexity", "degradation")})
    prompt, models = (
        text.tokenizer.decode(text.test[:12]),
        {"dense": dense.model, "compressed": model},
    )
    texts = {who: continue_text(m, text.tokenizer, prompt, 60) for who, m in models.items()}
    components = artifact.describe(file)[["tensor", "bytes"]].to_dict("records")
    more = {"components": components, "row_bits": row_bits(dense, file), "texts": texts}
    return {**record, **more, "artifact": "model.kit"}


def pointing(dense: Baseline, file: Path, place: Path) -> dict:
    """The compressed and the dense model, each mixed with a pointer fitted on validation."""
    folder, rows = RUNS / f"reference-{place.name}", {}
    folder.mkdir(parents=True, exist_ok=True)
    compressed = artifact.load(file, trainable=True, parts=frontier.token_parts(dense))
    for name, model in {"dense": dense.model, "compressed": compressed}.items():
        pointer = fit_pointer(model, dense.loaders.validation)
        artifact.save(pointer, path := folder / f"{name}.kit")
        numbers = {
            key: getattr(pointer, key).tolist() for key in ("similarity", "match", "sentinel")
        }
        rows[name] = frontier.measured(f"{name}, pointing", path, dense, pointer=numbers)
        print(rows[name])
    shutil.copy(path, place / "model.kit")
    last = {key: rows["compressed"][key] for key in ("bytes", "ratio", "perplexity")}
    return {"artifact": "model.kit", "rows": rows, **last}


def row_bits(dense: Baseline, file: Path) -> list[tuple[int, float]]:
    """Mean bits of an embedding row by frequency of its token: (last rank, bits) of each bin."""
    model = artifact.load(file, trainable=True, parts=frontier.token_parts(dense))
    weight = weight_of(model.embedding)
    quantizer = weight.find(FakeQuantize)
    codes = quantizer.codes(weight.before(FakeQuantize.rank))[0].numpy()
    edges = np.unique(np.geomspace(16, len(codes), 20).astype(int))
    sizes = {(a, b): len(range_coder.encode(codes[a:b])) for a, b in zip([0, *edges], edges)}
    return [(int(b), 8 * size / (b - a)) for (a, b), size in sizes.items()]


def controls(dense: Baseline, place: Path) -> dict:
    """Rounding without training, and what the compressed model is compared with."""
    folder, text = RUNS / f"reference-{place.name}", dense.corpus
    folder.mkdir(parents=True, exist_ok=True)
    dense.model.cpu()  # codes are made in NumPy
    rivals = [frontier.product_quantized(dense, pieces, folder) for pieces in (8, 16)]
    rivals += [frontier.low_rank(dense, 32, 4, folder), frontier.hashed(dense, 2000, folder)]
    rivals += [frontier.uniform_zlib(dense, bits, folder) for bits in (2, 4)]
    small = frontier.small_model(dense, dense.bytes // 100, folder, 2000, SMALL_VOCABULARY)
    rounding = [frontier.rounded(dense, ratio, folder) for ratio in ROUNDING]
    ngrams = {n: KneserNey.fit(text.train, n, text.tokenizer.vocab_size) for n in (1, 2, 4)}
    perplexity = {n: ngram.perplexity(text.test) for n, ngram in ngrams.items()}
    return {"rounding": rounding, "rivals": rivals, "small": [small], "kneser_ney": perplexity}


if __name__ == "__main__":
    main()
