"""Files that appear whole or not at all, names for what they hold, and locks on them."""

import ast
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import nn


def cache_dir() -> Path:
    """Folder of all that can be rebuilt: ``$KIT_CACHE``, else ``~/.cache/kit``; made when
    missing."""
    folder = Path(os.environ.get("KIT_CACHE") or Path.home() / ".cache" / "kit").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place on success and is removed on failure.

    The file has the permissions that `open` would give it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def lock(path: str | os.PathLike) -> FileLock:
    """A lock between processes for the work that makes `path`: ``with lock(path): ...``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def write_json(path: str | os.PathLike, value) -> Path:
    """Writes `value` as JSON, whole or not at all. NaN and infinities become null.

    Numpy scalars and arrays, paths and dataclasses are converted. Raises TypeError for a value that
    has no JSON form.
    """
    text = json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"
    with atomic(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return Path(path)


def _plain(value):
    """`value` in JSON's own types."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def digest(*values, **settings) -> str:
    """Twenty hexadecimal digits that name the values: JSON, tensors, arrays, or modules (structure
    and state), nested in lists and tuples; the order of keyword settings does not matter."""
    sha = hashlib.sha256()
    _feed(sha, [*values, settings] if settings else [*values])
    return sha.hexdigest()[:20]


def _feed(sha, value) -> None:
    if isinstance(value, nn.Module):
        value = [str(value), *value.state_dict().values()]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        sha.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(sha, item)
    else:
        sha.update(json.dumps(_plain(value), sort_keys=True).encode())


def code_digest(names: Sequence[str]) -> str:
    """Twenty digits for the code of these modules and rooms of kit: part of a key, they keep what
    other code made from passing for this code's. Comments, docstrings and line breaks do not
    count."""
    package, files = Path(__file__).parents[1], []
    for name in names:
        files += [package / name] if name.endswith(".py") else (package / name).rglob("*.py")
    return digest([_computes(file.read_text()) for file in sorted(files)])


def _computes(source: str) -> str:
    """What a module does, whatever its comments, docstrings and line breaks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return ast.dump(tree)
