"""Corpora by name, byte-pair tokens, digits, and batches of them."""

from kit.core.store import cache_dir
from kit.data import docs, files, wikitext  # noqa: F401 (their corpora register themselves)
from kit.data.corpus import Corpus, load_corpus, register_corpus
from kit.data.loaders import Loaders, load_digits, token_loaders

__all__ = ["Corpus", "Loaders", "cache_dir", "load_corpus", "load_digits", "register_corpus"]
__all__ += ["token_loaders"]
