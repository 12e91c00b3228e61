"""Corpora: named texts in three splits, tokenized, cached."""

import glob
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from . import docs, tokenization, wikitext
from kit.core.store import atomic, cache_dir, digest
from .tokenization import TOKENIZERS

SPLITS = ("train", "validation", "test")
SHARES = (0.90, 0.95)  # where validation and test begin in a file of `text:`


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized text.

    ``train``, ``validation``, ``test``: int32 (tokens,). ``tokenizer``: `BPETokenizer` or `WordTokenizer`.
    ``utf8_bytes``: bytes of the text behind each split's tokens. ``sha256``: of the three texts.
    """

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


def load_corpus(name="docs", vocab_size=4096, tokenizer="bpe", train_bytes=None):
    """Read, split and tokenize a text; texts and tokens are kept in `cache_dir()`.

    name: ``"docs"``, the documentation inside the kit's dependencies, split by source file; ``"wikitext-2"``;
    or ``"text:<UTF-8 file, folder or glob>"``, the first 90 % of each file for training, then 5 % and 5 %
    (a folder stands for the ``.txt`` files in it, at any depth).
    tokenizer: ``"bpe"`` (byte-level) or ``"word"``, learned from the training text alone.
    train_bytes: use about this much of the training text (its beginning), and at most an eighth of it of each
        other split: for trials, since figures on other lengths are not comparable.

    Raises ValueError or FileNotFoundError: unknown name or tokenizer, no such file, text that is empty or not
    UTF-8, vocab_size under the tokenizer's least or over what the text supports.
    """
    read = _reader(name)
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"Unknown tokenizer {tokenizer!r}: the known ones are {', '.join(TOKENIZERS)}.")
    TOKENIZERS[tokenizer].check(vocab_size)
    if train_bytes is not None and train_bytes < 1:
        raise ValueError(f"train_bytes={train_bytes} must be 1 or more, or None for the whole training text.")
    texts = read()
    if train_bytes is not None:
        limits = {"train": train_bytes, "validation": train_bytes // 8, "test": train_bytes // 8}
        texts = {split: text.encode()[:limits[split]].decode(errors="ignore") for split, text in texts.items()}
    for split in SPLITS:
        if not texts[split].strip():
            raise ValueError(f"The {split} split of corpus {name!r} is empty: "
                             "give a text of some thousand characters.")
    encoded = {split: texts[split].encode() for split in SPLITS}
    sha256 = hashlib.sha256(b"\0".join(encoded.values())).hexdigest()
    learned, tokens = _tokens(texts, sha256, tokenizer, vocab_size)
    return Corpus(name, learned, **tokens, utf8_bytes={s: len(encoded[s]) for s in SPLITS}, sha256=sha256)


def _reader(name):
    """The function that gives the texts of a corpus; tells an unknown name before anything is read."""
    known = {"docs": _docs, "wikitext-2": lambda: wikitext.read(wikitext.WIKITEXT2)}
    if name in known:
        return known[name]
    if isinstance(name, str) and name.startswith("text:"):
        files = _files(name[len("text:"):])
        return lambda: _blocks(files)
    raise ValueError(f"Unknown corpus {name!r}: the known ones are {', '.join(known)} and "
                     "text:<file, folder or glob>.")


def _docs():
    path = cache_dir() / "texts" / f"docs-{digest(**docs.settings())}.json"
    if not path.exists():
        texts = docs.build()
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(texts), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def _files(place):
    path = Path(place).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files, wanted = sorted(path.rglob("*.txt")), "holds no .txt file: name its files by a glob"
    else:
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
        wanted = "matches no file: give a UTF-8 text file, a folder of .txt files, or a glob"
    if not files:
        raise FileNotFoundError(f"'text:{place}' {wanted} (looked in {Path.cwd()}).")
    return files


def _blocks(files):
    """Each file's first 90 %, next 5 % and last 5 %, cut at line ends, put together split by split."""
    parts = {split: [] for split in SPLITS}
    for file in files:
        text = _utf8(file)
        cuts = [text.rfind("\n", 0, int(share * len(text))) + 1 or int(share * len(text)) for share in SHARES]
        for split, start, end in zip(SPLITS, (0, *cuts), (*cuts, len(text))):
            parts[split].append(text[start:end])
    return {split: "".join(blocks) for split, blocks in parts.items()}


def _utf8(file):
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): "
                         "convert it first, for example with iconv.") from error
    if not text.strip():
        raise ValueError(f"{file} is empty: leave it out, or give a file with text.")
    return text if text.endswith("\n") else text + "\n"


def _tokens(texts, sha256, kind, vocab_size):
    """(tokenizer, {split: tokens}), learned and encoded or from the cache: one file holds both."""
    recipe = hashlib.sha256(Path(tokenization.__file__).read_bytes()).hexdigest()
    key = digest(sha256=sha256, kind=kind, vocab_size=vocab_size, recipe=recipe,
                 library=tokenizers.__version__)
    path = cache_dir() / "tokens" / f"{key}.npz"
    if not path.exists():
        learned = TOKENIZERS[kind].train(texts["train"], vocab_size)
        arrays = {split: learned.encode(texts[split]) for split in SPLITS}
        saved = np.frombuffer(learned.to_json().encode(), np.uint8)
        with atomic(path) as temporary:
            np.savez(temporary, tokenizer=saved, **arrays)
    with np.load(path) as arrays:
        learned = TOKENIZERS[kind].from_json(arrays["tokenizer"].tobytes().decode())
        return learned, {split: arrays[split] for split in SPLITS}
