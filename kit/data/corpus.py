"""Corpora: named texts in three splits, tokenized; texts and tokens are kept in `cache_dir()`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from kit.core.settings import Count, checks
from kit.core.store import cache_dir, cached, code_digest, digest
from kit.data.tokenization import BPETokenizer, VocabularySize

SPLITS = ("train", "validation", "test")
Texts = dict[str, str]  # a text a split
CORPORA: dict[str, Callable[..., Texts]] = {}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized text: int32 (tokens,) a split.

    utf8_bytes: bytes of the text behind each split's tokens. sha256: of the three texts.
    """

    name: str
    tokenizer: BPETokenizer
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    utf8_bytes: dict[str, int]
    sha256: str

    @cached_property
    def token_counts(self) -> np.ndarray:
        """Occurrences of each token in the training split: int64 (vocab_size,)."""
        return np.bincount(self.train, minlength=self.tokenizer.vocab_size)


def register_corpus(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the function returns the texts of the corpus `name`, one for each of SPLITS. It is
    given what the user writes after the colon if the name ends in one."""

    def register(texts: Callable[..., Texts]) -> Callable:
        CORPORA[name] = texts
        return texts

    return register


@checks
def load_corpus(
    name: str = "docs", vocab_size: VocabularySize = 4096, train_bytes: Count | None = None
) -> Corpus:
    """Reads, splits and tokenizes a text. The tokenizer learns from the training text alone.

    Args:
        name: `"docs"`, the documentation inside the kit's dependencies; `"wikitext-2"`;
            `"text:<UTF-8 file, folder or glob>"`; or a name given to `register_corpus`.
        train_bytes: use about this much of the training text (its beginning), and at most an eighth
            of it of each other split: for trials, since figures on other lengths do not compare.

    Raises ValueError or FileNotFoundError: unknown name, no such file, text that is empty or not
    UTF-8, vocab_size under 257 or over what the text supports.
    """
    kind, colon, place = str(name).partition(":")
    if kind + colon not in CORPORA:
        known = ", ".join(CORPORA)
        raise ValueError(f"Unknown corpus {name!r}: the known ones are {known} (text:<file>).")
    texts = CORPORA[kind + colon](place) if colon else CORPORA[kind]()
    if train_bytes is not None:
        most = {"train": train_bytes, "validation": train_bytes // 8, "test": train_bytes // 8}
        texts = {s: texts[s].encode()[: most[s]].decode(errors="ignore") for s in SPLITS}
    for split in SPLITS:
        if not texts[split].strip():
            raise ValueError(f"The {split} split of corpus {name!r} is empty: give more text.")
    encoded = {split: texts[split].encode() for split in SPLITS}
    sha256 = hashlib.sha256(b"\0".join(encoded.values())).hexdigest()
    tokenizer, tokens = _tokens(texts, sha256, vocab_size)
    utf8_bytes = {split: len(encoded[split]) for split in SPLITS}
    return Corpus(name, tokenizer, **tokens, utf8_bytes=utf8_bytes, sha256=sha256)


def _tokens(texts: Texts, sha256: str, vocab_size: int) -> tuple[BPETokenizer, dict]:
    """The tokenizer and each split's tokens: learned and encoded, or from the cache in one file."""

    def build(temporary: Path) -> None:
        tokenizer = BPETokenizer.train(texts["train"], vocab_size)
        arrays = {split: tokenizer.encode(texts[split]) for split in SPLITS}
        arrays["tokenizer"] = np.frombuffer(tokenizer.to_json().encode(), np.uint8)
        np.savez(temporary, **arrays)

    def read(path: Path) -> tuple[BPETokenizer, dict]:
        with np.load(path) as arrays:
            tokenizer = BPETokenizer.from_json(arrays["tokenizer"].tobytes().decode())
            tokens = {split: arrays[split] for split in SPLITS}
        for ids in tokens.values():
            right = ids.dtype == np.int32 and ids.ndim == 1 and tokenizer.vocab_size == vocab_size
            if not right or ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise ValueError(f"its tokens are not of a vocabulary of {vocab_size}")
        return tokenizer, tokens

    recipe = code_digest(["data/tokenization.py"]), tokenizers.__version__
    path = cache_dir() / "tokens" / f"{digest(sha256, vocab_size, *recipe)}.npz"
    return cached(path, build, read)
