"""Measures the file of a finished run again, from nothing:

python -m notebooks.reference.remeasure FOLDER
"""

import argparse
import importlib
import math
import sys
from pathlib import Path

from kit import artifact
from kit.core.store import read_json
from kit.data import token_loaders
from kit.lab.records import RESULT
from kit.models import recipe
from kit.training.evaluation import evaluate
from notebooks.reference.baseline import opened


def remeasure(folder: str | Path) -> tuple[dict, dict]:
    """Bytes and test perplexity of the artifact in a run's folder, and those in its record.

    Raises ValueError when the corpus that this machine builds is not the one of the record.
    """
    record = read_json(Path(folder) / RESULT)
    settings, path = record["parameters"], Path(folder) / record["artifact"]
    data = (settings[name] for name in ("corpus", "vocab_size", "train_bytes", "seq_len"))
    corpus, module, _ = opened(settings.get("model", ""), *data)
    if corpus.sha256 != record["corpus"]["sha256"]:
        raise ValueError(f"{folder} was measured on another text: install the versions it names")
    skeleton = module if module is not None and recipe(module) is None else None
    model = artifact.load(path, skeleton, parts=corpus.tokenizer.parts)
    test = evaluate(model, token_loaders(corpus, settings["batch_size"], settings["seq_len"]).test)
    found = {"bytes": path.stat().st_size, "perplexity": test.perplexity}
    return found, {name: record[name] for name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the file of a finished run again.")
    parser.add_argument("folder", help="of a run that wrote an artifact and its record")
    parser.add_argument("--import", dest="module", help="a module that registers the model's class")
    options = parser.parse_args()
    if options.module:
        importlib.import_module(options.module)
    found, recorded = remeasure(options.folder)
    print(f"measured:   {found}\nthe record: {recorded}")
    same = math.isclose(found["perplexity"], recorded["perplexity"], rel_tol=1e-5)
    if found["bytes"] > recorded["bytes"] or not same:  # a later version may write it in fewer
        sys.exit("The file does not reproduce its record.")
    print("The file reproduces its record.")


if __name__ == "__main__":
    main()
