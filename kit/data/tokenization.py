"""Tokenizers: byte-level BPE for any text, and words for comparison with published word perplexities."""

import json
import re
from collections import Counter
from functools import cached_property
from itertools import chain

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

BYTES = 256  # the alphabet of byte-level BPE
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
_CUT = re.compile(r"(?=\n\S)")  # byte-level pre-tokenization never joins across such a place


def _pieces(text, size=20_000):
    """Yield the text in pieces of about ``size`` characters that tokenize as the whole text would."""
    start = 0
    for cut in _CUT.finditer(text):
        if cut.start() - start >= size:
            yield text[start:cut.start()]
            start = cut.start()
    if text[start:]:
        yield text[start:]


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016), lossless: ``decode(encode(text)) == text``."""

    def __init__(self, backend):
        self._backend = backend

    @staticmethod
    def check(vocab_size):
        """Raises ValueError when vocab_size is under 257."""
        if vocab_size <= BYTES:
            raise ValueError(f"vocab_size={vocab_size} is too small for byte-level BPE: "
                             "it needs 257 or more, 256 bytes and at least one merge.")

    @classmethod
    def train(cls, text, vocab_size):
        """Learn ``vocab_size - 256`` merges that occur at least twice in ``text``.

        Raises ValueError when vocab_size is under 257, or over what the text supports.
        """
        cls.check(vocab_size)
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator(_pieces(text), trainer)
        reached = backend.get_vocab_size()
        if reached < vocab_size:
            raise ValueError(f"vocab_size={vocab_size} is larger than the training text supports: byte-level "
                             f"BPE reaches {reached} tokens, choose at most that or give more text.")
        return cls(backend)

    @property
    def vocab_size(self):
        return self._backend.get_vocab_size()

    def encode(self, text):
        """Tokens of the text: int32 array (tokens,)."""
        encoded = self._backend.encode_batch_fast(list(_pieces(text)))
        return np.concatenate([np.array(e.ids, np.int32) for e in encoded] or [np.empty(0, np.int32)])

    def decode(self, ids):
        """The text behind the tokens; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def parts(self):
        """The two tokens that each token was merged from, -1 twice for a byte: int32 array (vocab_size, 2)."""
        state = json.loads(self.to_json())["model"]
        ids, parts = state["vocab"], np.full((self.vocab_size, 2), -1, np.int32)
        for left, right in reversed(state["merges"]):  # the first merge that makes a token is its own
            parts[ids[left + right]] = ids[left], ids[right]
        return parts

    def to_json(self):
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text):
        return cls(tokenizers.Tokenizer.from_str(text))


class WordTokenizer:
    """Words between white space, ``<eos>`` at each line's end, ``<unk>`` for words out of the vocabulary.

    The convention of the published WikiText-2 figures (Merity et al. 2016).
    """

    def __init__(self, words):
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    @staticmethod
    def check(vocab_size):
        """Raises ValueError when vocab_size is under 3."""
        if vocab_size < 3:
            raise ValueError(f"vocab_size={vocab_size} is too small for words: it needs 3 or more, "
                             "<unk>, <eos> and at least one word.")

    @classmethod
    def train(cls, text, vocab_size):
        """Take the ``vocab_size - 2`` most frequent words of ``text`` (ties: alphabetical).

        Raises ValueError when vocab_size is under 3, or over the number of words in the text.
        """
        cls.check(vocab_size)
        counts = Counter(word for word in text.split() if word not in (UNKNOWN, END_OF_LINE))
        if len(counts) + 2 < vocab_size:
            raise ValueError(f"vocab_size={vocab_size} is larger than the training text supports: it has "
                             f"{len(counts)} words, choose at most {len(counts) + 2} or give more text.")
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([UNKNOWN, END_OF_LINE, *words[:vocab_size - 2]])

    @property
    def vocab_size(self):
        return len(self.words)

    def encode(self, text):
        """Tokens of the text: int32 array (tokens,)."""
        lines = text.removesuffix("\n").split("\n") if text else []
        words = chain.from_iterable([*line.split(), END_OF_LINE] for line in lines)
        return np.fromiter((self._ids.get(word, 0) for word in words), np.int32)

    def decode(self, ids):
        """Words joined by spaces, ``<eos>`` as a new line."""
        text = " ".join(self.words[i] for i in ids)
        return re.sub(rf" ?{END_OF_LINE} ?", "\n", text)

    def to_json(self):
        return json.dumps(self.words)

    @classmethod
    def from_json(cls, text):
        return cls(json.loads(text))


TOKENIZERS = {"bpe": BPETokenizer, "word": WordTokenizer}
