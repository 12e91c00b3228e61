"""Byte-level byte-pair encoding of any text."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, islice
from typing import Annotated

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kit.core.settings import Meta, checks

Text = str | Iterable[str]  # or blocks of it, the same each time that they are asked for
LEARNED = 2**13  # pieces at most that merges are learned from: more take memory and change little
VocabularySize = Annotated[int, Meta(ge=257, le=2**24)]  # bytes are 256 of the tokens
_CUT = re.compile(r"[ \t](?=\S)|(?<=[^\W_])\n(?=\S)")  # no encoding joins these to what is before


def blocks(text: Text) -> Iterable[str]:
    return [text] if isinstance(text, str) else text


def _pieces(text: Text, size: int = 8_000, most: int = 16_000) -> Iterator[str]:
    """The text in pieces of about `size` characters that tokenize as the whole text would; where
    there is no white space, of `most`: the time to learn from a word grows with its square."""
    held = ""
    for block in chain(blocks(text), [None]):
        held, start = held + (block or ""), 0
        while start < len(held) if block is None else start + most <= len(held):
            cut = _CUT.search(held, start + size, start + most)
            end = cut.start() if cut else start + most
            yield held[start:end]
            start = end
        held = held[start:]


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016): decode(encode(text)) is the text. Or
    what a pretrained model comes with (`kit.hub.load_tokenizer`), and its size of vocabulary."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int | None = None):
        self._backend, self.vocab_size = backend, vocab_size or backend.get_vocab_size()

    @classmethod
    @checks
    def train(cls, text: Text, vocab_size: VocabularySize) -> "BPETokenizer":
        """Learns `vocab_size - 256` merges that occur at least twice in the text, of which the
        first 64 million characters count.

        Raises ValueError when vocab_size is under 257, or over what the text supports.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        settings = {"min_frequency": 2, "initial_alphabet": alphabet, "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, **settings)
        backend.train_from_iterator(islice(_pieces(text), LEARNED), trainer)
        if (reached := backend.get_vocab_size()) < vocab_size:
            problem = f"vocab_size={vocab_size} is larger than the training text supports"
            raise ValueError(f"{problem}: byte-level BPE reaches {reached} tokens, choose fewer.")
        return cls(backend)

    def encode(self, text: Text) -> np.ndarray:
        """Tokens of the text: int32 (tokens,)."""
        return np.concatenate([np.empty(0, np.int32), *self.encoded(text)])

    def encoded(self, text: Text) -> Iterator[np.ndarray]:
        """The tokens of the text, none added, part after part, in the memory of one. Raises
        ValueError for one outside of the vocabulary."""
        pieces = _pieces(text)
        while batch := list(islice(pieces, 256)):  # encodings take many times the memory of ids
            for encoding in self._backend.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.array(encoding.ids, np.int32)
                if (last := ids.max(initial=0)) >= self.vocab_size:
                    what = f"token {last} of the text is outside of a vocabulary of"
                    advice = "give the tokenizer that the model was trained with"
                    raise ValueError(f"{what} {self.vocab_size}: {advice}.")
                yield ids

    def decode(self, ids) -> str:
        """The text behind the tokens; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def parts(self) -> np.ndarray | None:
        """The two tokens before it that each was merged from, -1 twice for a byte: int32
        (vocab_size, 2). None for a pretrained model's tokens that are not all made so."""
        state = json.loads(self.to_json())["model"]
        ids, parts = state["vocab"], np.full((self.vocab_size, 2), -1, np.int32)
        if state["type"] != "BPE" or max(ids.values()) >= self.vocab_size:
            return None
        for left, right in reversed(state["merges"]):  # the first merge that makes a token counts
            if left + right not in ids:  # with a prefix inside of words
                return None
            parts[ids[left + right]] = ids[left], ids[right]
        return parts if (parts.max(1) < np.arange(self.vocab_size)).all() else None

    def to_json(self) -> str:
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text: str) -> "BPETokenizer":
        return cls(tokenizers.Tokenizer.from_str(text))
