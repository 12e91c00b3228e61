"""Where built texts, tokens and baselines are kept: small files, written atomically, never pickles."""

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


def cache_dir():
    """Folder of all that can be rebuilt: ``$KIT_CACHE``, else ``~/.cache/kit``; made when missing."""
    folder = Path(os.environ.get("KIT_CACHE") or Path.home() / ".cache" / "kit").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def key_of(**settings):
    """Twenty hexadecimal digits that name the settings (JSON values), whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


@contextmanager
def atomic(path):
    """Yield a temporary path beside ``path`` that takes its place on success and is removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
