"""The corpus ``wikitext-2``: WikiText-2 (raw) from its public hub, at a pinned revision, checked."""

import hashlib
import urllib.request
from dataclasses import dataclass

from kit.core.store import atomic, cache_dir


@dataclass(frozen=True)
class Hub:
    """Folder of parquet files with a column ``text``: its address, and each split's SHA-256."""

    url: str
    sha256: dict


WIKITEXT2 = Hub(
    "https://huggingface.co/datasets/Salesforce/wikitext/resolve/b08601e04326c79dfdd32d625aee71d232d685c3/"
    "wikitext-2-raw-v1",
    {"train": "e83889baabc497075506f91975be5fac0d45c5290b6b20582c8cd1e853d0c9f7",
     "validation": "204929b7ff9d6184953f867dedb860e40aa69c078fc1e54b3baaa8fb28511c4c",
     "test": "5f1bea067869d04849c0f975a2b29c4ff47d867f484f5010ea5e861eab246d91"})


def read(hub=WIKITEXT2):
    """Texts of the three splits, as in the original files: a line a row, blank lines as " \\n".

    Files are fetched once to ``cache_dir() / "wikitext-2"``.

    Raises FileNotFoundError when one is neither there nor to be had, ValueError when its checksum is another.
    """
    return {split: _text(_fetched(hub, split)) for split in hub.sha256}


def _fetched(hub, split):
    name = f"{split}-00000-of-00001.parquet"
    path, url = cache_dir() / "wikitext-2" / name, f"{hub.url}/{name}"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=30) as response, atomic(path) as temporary:
                temporary.write_bytes(response.read())
        except OSError as error:
            raise FileNotFoundError(f"wikitext-2 could not be fetched ({error}): "
                                    f"put the file {url} at {path}.") from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != hub.sha256[split]:
        raise ValueError(f"{path} has SHA-256 {found}, expected {hub.sha256[split]}: "
                         f"delete it and fetch it again from {url}.")
    return path


def _text(path):
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return "".join(row or " \n" for row in rows)
