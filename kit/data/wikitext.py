"""The corpus `wikitext-2`: WikiText-2 (raw) from its public hub, at a pinned revision, checked."""

import hashlib
import urllib.request
from pathlib import Path

from kit.core.store import cache_dir, cached
from kit.data.corpus import Texts, register_corpus

REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
HUB = "https://huggingface.co/datasets/Salesforce/wikitext/resolve"
FOLDER = f"{HUB}/{REVISION}/wikitext-2-raw-v1"
SHA256 = {
    "train": "e83889baabc497075506f91975be5fac0d45c5290b6b20582c8cd1e853d0c9f7",
    "validation": "204929b7ff9d6184953f867dedb860e40aa69c078fc1e54b3baaa8fb28511c4c",
    "test": "5f1bea067869d04849c0f975a2b29c4ff47d867f484f5010ea5e861eab246d91",
}


@register_corpus("wikitext-2")
def texts() -> Texts:
    """As in the original files: a line a row, blank lines as " \\n". Fetched once.

    Raises FileNotFoundError for a file neither in the cache nor to be had, ValueError for another.
    """
    import pyarrow.parquet

    result = {}
    for split in SHA256:
        rows = pyarrow.parquet.read_table(_fetched(split), columns=["text"])["text"].to_pylist()
        result[split] = "".join(row or " \n" for row in rows)
    return result


def _fetched(split: str) -> Path:
    name = f"{split}-00000-of-00001.parquet"
    path, url = cache_dir() / "wikitext-2" / name, f"{FOLDER}/{name}"

    def fetch(temporary: Path) -> None:
        with urllib.request.urlopen(url, timeout=30) as response:
            temporary.write_bytes(response.read())

    try:
        cached(path, fetch, Path.stat)
    except OSError as error:
        fix = f"put the file {url} at {path}"
        raise FileNotFoundError(f"wikitext-2 could not be fetched ({error}): {fix}.") from error
    found, expected = hashlib.sha256(path.read_bytes()).hexdigest(), SHA256[split]
    if found != expected:
        fix = f"delete it and fetch it again from {url}"
        raise ValueError(f"{path} has SHA-256 {found}, expected {expected}: {fix}.")
    return path
