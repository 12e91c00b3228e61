"""Measures the file of a finished run again, in a process that has seen nothing else: python -m kit.lab.remeasure FOLDER"""

import argparse
import json
import math
from pathlib import Path

from kit import artifact
from kit.data import load_corpus, token_loaders
from kit.training.evaluation import evaluate
from kit.lab.records import RESULT


def remeasure(folder: str | Path) -> dict:
    """Bytes and test perplexity of `folder`'s artifact, beside those in its record.

    Raises ValueError when the corpus that this machine builds is not the one of the record.
    """
    record = json.loads((Path(folder) / RESULT).read_text())
    settings = record["parameters"]
    corpus = load_corpus(settings["corpus"], settings["vocab_size"], train_bytes=settings["train_bytes"])
    if corpus.sha256 != record["corpus"]["sha256"]:
        raise ValueError(f"{folder} was measured on text {record['corpus']['sha256'][:12]}, this machine has "
                         f"{corpus.sha256[:12]}: install the versions in its record")
    path = Path(folder) / record["artifact"]
    loaded = artifact.load(path, parts=getattr(corpus.tokenizer, "parts", None))
    test = evaluate(loaded, token_loaders(corpus, settings["batch_size"], settings["seq_len"]).test)
    return {"bytes": path.stat().st_size, "bytes in the record": record["bytes"], "perplexity": test.perplexity,
            "perplexity in the record": record["perplexity"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of a run of 05_full_pipeline")
    found = remeasure(parser.parse_args().folder)
    for name, value in found.items():
        print(f"{name:<26}{value:,.4f}" if isinstance(value, float) else f"{name:<26}{value:,}")
    same = math.isclose(found["perplexity"], found["perplexity in the record"], rel_tol=1e-5)
    if found["bytes"] != found["bytes in the record"] or not same:
        raise SystemExit("The file does not reproduce its record.")
    print("The file reproduces its record.")


if __name__ == "__main__":
    main()
