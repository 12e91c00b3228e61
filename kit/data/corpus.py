"""Corpora: named texts in three splits, tokenized, cached."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from . import docs
from .cache import atomic, cache_dir, key_of
from .tokenization import TOKENIZERS

SPLITS = ("train", "validation", "test")
KNOWN = "docs, wikitext-2, text:<file, folder or glob>"


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: three int32 arrays (tokens,), the tokenizer, and the UTF-8 bytes behind each split."""

    name: str
    tokenizer: object
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    utf8_bytes: dict
    sha256: str

    @cached_property
    def token_counts(self):
        """Occurrences of each token in the training split: int64 (vocab_size,)."""
        return np.bincount(self.train, minlength=self.tokenizer.vocab_size)


def _texts(name):
    if name == "docs":
        path = cache_dir() / "texts" / "docs.json"
        if not path.exists():
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(docs.build()))
        return json.loads(path.read_text())
    if name.startswith("text:"):
        path = Path(name[5:])
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        splits = {split: "" for split in SPLITS}
        for file in files:
            text = file.read_text(encoding="utf-8")
            a, b = int(0.9 * len(text)), int(0.95 * len(text))
            for split, part in zip(SPLITS, (text[:a], text[a:b], text[b:])):
                splits[split] += part
        return splits
    raise ValueError(f"Unknown corpus {name!r}: the known ones are {KNOWN}.")


def load_corpus(name="docs", vocab_size=4096, tokenizer="bpe", train_bytes=None):
    """Read, split and tokenize a corpus, or take it from the cache."""
    texts = _texts(name)
    if train_bytes is not None:
        texts["train"] = texts["train"].encode()[:train_bytes].decode(errors="ignore")
    sha256 = hashlib.sha256("\0".join(texts[split] for split in SPLITS).encode()).hexdigest()
    folder = cache_dir() / "tokens"
    stem = key_of(sha256=sha256, vocab_size=vocab_size, tokenizer=tokenizer)
    kind = TOKENIZERS[tokenizer]
    if not (folder / f"{stem}.npz").exists():
        learned = kind.train(texts["train"], vocab_size)
        with atomic(folder / f"{stem}.json") as temporary:
            temporary.write_text(learned.to_json())
        with atomic(folder / f"{stem}.npz") as temporary:
            np.savez(temporary, **{split: learned.encode(texts[split]) for split in SPLITS})
    learned = kind.from_json((folder / f"{stem}.json").read_text())
    with np.load(folder / f"{stem}.npz") as arrays:
        tokens = {split: arrays[split] for split in SPLITS}
    sizes = {split: len(texts[split].encode()) for split in SPLITS}
    return Corpus(name, learned, **tokens, utf8_bytes=sizes, sha256=sha256)
