"""Corpora: named texts in three splits, tokenized; texts and tokens are kept in `cache_dir()`."""

import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import tokenizers

from kit.core.settings import Count, checks
from kit.core.store import cache_dir, cached, code_digest, digest, to_json
from kit.data.tokenization import BPETokenizer, Text, VocabularySize, blocks

SPLITS = ("train", "validation", "test")
Texts = dict[str, Text]  # one a split
CORPORA: dict[str, Callable[..., Texts]] = {}
Tail = msgspec.defstruct("Tail", [("tokens", list[int]), ("tokenizer", str)])
SEAL = struct.Struct("<QI")  # bytes of the tail before it, and the CRC-32 of all before it
BLOCK = 2**22  # bytes that are read at a time


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized text: int32 (tokens,) a split, mapped from a file.

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
        parts = np.array_split(self.train, 1 + len(self.train) // BLOCK)
        return sum(np.bincount(part, minlength=self.tokenizer.vocab_size) for part in parts)


def register_corpus(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the function returns the texts of the corpus `name`, one for each of SPLITS. It is
    given what the user writes after the colon if the name ends in one."""

    def register(texts: Callable[..., Texts]) -> Callable:
        CORPORA[name] = texts
        return texts

    return register


@checks
def load_corpus(
    name: str = "docs", vocab_size: VocabularySize = 4096, train_bytes: Count | None = None,
    tokenizer: BPETokenizer | None = None,
) -> Corpus:  # fmt: skip
    """Reads, splits and tokenizes a text. The tokenizer learns from the training text alone.

    Args:
        name: `"docs"`, the documentation inside the kit's dependencies; `"wikitext-2"`;
            `"text:<UTF-8 file, folder or glob>"`; or a name given to `register_corpus`.
        train_bytes: use about this much of the training text (its beginning), and at most an eighth
            of it of each other split: for trials, since figures on other lengths do not compare.
        tokenizer: a pretrained model's, in place of one that learns `vocab_size` tokens.

    Raises ValueError or FileNotFoundError: unknown name, no such file, text that is empty or not
    UTF-8, vocab_size under 257 or over what the text supports, a token outside of the vocabulary
    of the tokenizer given; MemoryError: too little for it.
    """
    kind, colon, place = str(name).partition(":")
    if kind + colon not in CORPORA:
        known = ", ".join(CORPORA)
        raise ValueError(f"Unknown corpus {name!r}: the known ones are {known} (text:<file>).")
    try:
        texts = CORPORA[kind + colon](place) if colon else CORPORA[kind]()
        if train_bytes is not None:
            most = zip(SPLITS, (train_bytes, train_bytes // 8, train_bytes // 8))
            texts = {split: _beginning(texts[split], size) for split, size in most}
        for split in SPLITS:
            if not any(block.strip() for block in blocks(texts[split])):
                raise ValueError(f"The {split} split of corpus {name!r} is empty: give more text.")
        sha256, utf8_bytes = _summed(texts)
        tokenizer, tokens = _tokens(texts, sha256, vocab_size, tokenizer)
    except MemoryError:
        raise MemoryError(f"Corpus {name!r} takes more memory than there is: give more.") from None
    return Corpus(name, tokenizer, *tokens, utf8_bytes=utf8_bytes, sha256=sha256)


def _summed(texts: Texts) -> tuple[str, dict[str, int]]:
    """SHA-256 of the texts, and the bytes of each."""
    sha256, utf8_bytes = hashlib.sha256(), {}
    for split in SPLITS:
        sha256.update(b"\0" if utf8_bytes else b"")
        utf8_bytes[split] = 0
        for data in map(str.encode, blocks(texts[split])):
            sha256.update(data)
            utf8_bytes[split] += len(data)
    return sha256.hexdigest(), utf8_bytes


def _beginning(text: Text, most: int) -> str:
    """The first `most` bytes of a text, without a character that they cut."""
    data = bytearray()
    for block in blocks(text):
        data += block.encode()
        if len(data) >= most:
            break
    return data[:most].decode(errors="ignore")


def _tokens(
    texts: Texts, sha256: str, vocab_size: int, given: BPETokenizer | None
) -> tuple[BPETokenizer, list[np.ndarray]]:
    """The tokenizer and each split's tokens: learned and encoded, or from the cache in one file."""

    def build(temporary: Path) -> None:
        tokenizer, counts, check = given or BPETokenizer.train(texts["train"], vocab_size), [], 0
        with open(temporary, "wb") as file:
            for split in SPLITS:
                counts.append(0)
                for ids in tokenizer.encoded(texts[split]):
                    file.write(ids)
                    counts[-1], check = counts[-1] + len(ids), zlib.crc32(ids, check)
            if _summed(texts)[0] != sha256:
                raise ValueError("The text changed while it was read: call again when it is whole.")
            tail = to_json(Tail(counts, tokenizer.to_json()))
            file.write(tail + SEAL.pack(len(tail), zlib.crc32(tail, check)))

    def read(path: Path) -> tuple[BPETokenizer, list[np.ndarray]]:
        held, check = path.stat().st_size - SEAL.size, 0
        with open(path, "rb") as file:
            for at in range(0, held, BLOCK):
                check = zlib.crc32(file.read(min(BLOCK, held - at)), check)
            length, stated = SEAL.unpack(file.read())
            if check != stated or length > held:
                raise ValueError("its checksum differs")
            file.seek(held - length)
            tail = msgspec.json.decode(file.read(length), type=Tail)
        tokenizer = given or BPETokenizer.from_json(tail.tokenizer)
        if 4 * sum(tail.tokens) != held - length or tokenizer.vocab_size != vocab_size:
            raise ValueError(f"its tokens are not of a vocabulary of {vocab_size}")
        ids = np.asarray(np.memmap(path, np.int32, "c", shape=sum(tail.tokens)))  # pages on demand
        return tokenizer, np.split(ids, np.cumsum(tail.tokens)[:-1])

    recipe = [code_digest(["data/tokenization.py"]), tokenizers.__version__]
    if given:
        vocab_size, recipe = given.vocab_size, [*recipe, given.to_json()]
    path = cache_dir() / "tokens" / f"{digest(sha256, vocab_size, *recipe)}.tokens"
    return cached(path, build, read)
