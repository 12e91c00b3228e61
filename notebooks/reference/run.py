"""The 4.2 M-parameter model on two CPU cores: the dense model, the file it makes by rounding alone, and the one it makes by
rate-distortion distillation. Writes its record beside this file.

    python notebooks/reference/run.py docs --target-compression 100 --steps 1300
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from kit import artifact
from kit.baseline import load_or_train
from kit.data import token_loaders
from kit.evaluation import evaluate
from kit.losses import next_token_loss
from kit.measurement import peak_memory
from kit.models.ngram import KneserNey
from kit.pipeline import CompressionPipeline
from kit.quantization.rate import RateLoss, row_sensitivity, set_rate_formats
from kit.results import write_result

SHAPE = {"d_model": 64, "layers": 4, "experts": 4, "tied": False}
ROUNDING = (8.0, 12.0, 16.0, 24.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="docs, or text:<file, folder or glob>")
    parser.add_argument("--vocab-size", type=int, default=30000)
    parser.add_argument("--dense-steps", type=int, default=3600, help="at most, of 32 windows of 128 tokens")
    parser.add_argument("--steps", type=int, default=1300, help="of distillation, of 16 windows")
    parser.add_argument("--target-compression", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    settings = vars(parser.parse_args())
    dense = load_or_train(corpus=settings["corpus"], vocab_size=settings["vocab_size"], batch_size=32, seq_len=128,
                          steps=settings["dense_steps"], seed=settings["seed"], **SHAPE)
    text, name = dense.corpus, settings["corpus"].rsplit("/", 1)[-1].removesuffix(".txt")
    folder = HERE.parents[1] / "runs" / f"reference-{name}-{settings['target_compression']:g}x-{settings['seed']}"
    folder.mkdir(parents=True, exist_ok=True)

    def row(name: str, path: Path, test, **more) -> dict:
        low, high = test.interval()
        return {"name": name, "bytes": path.stat().st_size, "ratio": dense.bytes / path.stat().st_size,
                "perplexity": test.perplexity, "low": low, "high": high,
                "bits_per_byte": test.bits_per_byte(text.utf8_bytes["test"]), **more}

    stages = [row("dense float32", dense.path, dense.test, tokens=dense.tokens, seconds=dense.seconds)]
    rounded = []
    for ratio in ROUNDING:
        model, batches = artifact.load(dense.path), list(itertools.islice(dense.loaders.train, 4))
        set_rate_formats(model, row_sensitivity(model, batches, next_token_loss), 0.9 * dense.bytes / ratio)
        RateLoss(next_token_loss, model, int(dense.bytes / ratio), batches[:1]).finish()
        artifact.save(model, path := folder / f"rounded-{ratio:g}x.kit")
        rounded.append(row(f"rounding {ratio:g}x", path, evaluate(artifact.load(path), dense.loaders.test)))

    loaders = token_loaders(text, 16, 128)
    pipeline = CompressionPipeline(dense.model, settings["target_compression"], stages=("distillation",), seed=settings["seed"])
    _, metrics = pipeline.run_pipeline(loaders.train, loaders.validation, save_dir=folder / f"{settings['steps']}-steps",
                                       distillation_epochs=settings["steps"] / len(loaders.train))
    stage = metrics["stage_metrics"]["distillation"]
    path, start = Path(stage["path"]), time.perf_counter()
    loaded = artifact.load(path)
    load_seconds = time.perf_counter() - start
    final = row("distillation", path, evaluate(loaded, dense.loaders.test), tokens=stage["tokens"], seconds=stage["seconds"])
    kneser_ney = {order: KneserNey.fit(text.train, order, text.tokenizer.vocab_size).perplexity(text.test) for order in (2, 4)}
    record = write_result(folder, {
        "notebook": "reference/run.py", "parameters": settings, "seed": settings["seed"],
        "stages": [*stages, final], "alternatives": rounded,
        "corpus": {"name": text.name, "sha256": text.sha256}, "kneser_ney": kneser_ney, "load_seconds": load_seconds,
        "degradation": final["perplexity"] / dense.test.perplexity - 1, "peak_memory": peak_memory(), **final})
    (HERE / f"{folder.name.removeprefix('reference-')}.json").write_text(record.read_text())
    print(json.dumps({key: final[key] for key in ("bytes", "ratio", "perplexity")}), f"dense {dense.test.perplexity:.2f}")


if __name__ == "__main__":
    main()
