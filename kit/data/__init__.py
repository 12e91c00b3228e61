"""Text corpora, tokenizers, digits, batches."""

from kit.core.store import cache_dir
from .corpus import Corpus, load_corpus
from .loaders import Loaders, load_digits, token_loaders

__all__ = ["Corpus", "Loaders", "cache_dir", "load_corpus", "load_digits", "token_loaders"]
