"""Files that appear whole or not at all, names for what they hold, and locks on them."""

import ast
import glob
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import torch
from filelock import FileLock
from torch import nn

try:
    import fcntl
except ImportError:  # Windows: what a kill leaves stays
    fcntl = None


def cache_dir() -> Path:
    """Folder of all that can be rebuilt: ``$KIT_CACHE``, else ``~/.cache/kit``; made when missing.
    Raises OSError when there is no place for it."""
    try:
        folder = Path(os.environ.get("KIT_CACHE") or "~/.cache/kit").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise OSError(f"there is no folder for the cache ({error}): set KIT_CACHE to one") from None
    return folder


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place on success and is removed on failure.
    Those that killed processes left of the same path are removed, too.

    The file has the permissions that `open` would give it. Raises OSError, which names the path,
    when it cannot be written; a file that was there is whole then.
    """
    path, name = Path(path), None
    start = f".{path.stem[:50]}.partial-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stray in path.parent.glob(f"{glob.escape(start)}*") if fcntl else ():
            with suppress(OSError), open(stray, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                stray.unlink()
        while name is None or not os.path.exists(name):  # another may take it for a stray
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=start, suffix=path.suffix)
            held = open(handle, "rb")
            fcntl.flock(held, fcntl.LOCK_EX) if fcntl else held.close()
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except OSError as error:
        if not error.errno or error.filename not in (None, name):
            raise  # it tells of another file itself
        why = f"could not be written: {error.strerror}"
        raise type(error)(error.errno, why, str(path)) from None
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)
            held.close()


def lock(path: str | os.PathLike) -> FileLock:
    """A lock between processes for the work that makes `path`: ``with lock(path): ...``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def read_json(path: str | os.PathLike, kind=dict):
    """The JSON value in a file, checked by msgspec against a type.

    Raises ValueError, which names the file and the field, for what is no JSON or of another type.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=kind)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): make it again, or delete it") from None


def cached(path: Path, build: Callable[[Path], object], read: Callable[[Path], object]):
    """read(path), of a file that `build(temporary path)` writes unless it is there; one that
    cannot be read is made again, with a warning. Of several processes one builds, others wait."""
    if path.exists():
        try:
            return read(path)
        except Exception as error:
            warnings.warn(f"{path} cannot be read and is made again ({error})")
            path.unlink(missing_ok=True)
    with lock(path):
        if not path.exists():
            with atomic(path) as temporary:
                build(temporary)
    return read(path)


def write_json(path: str | os.PathLike, value) -> Path:
    """Writes `value` as JSON, whole or not at all; NaN and infinities become null.

    Raises TypeError for a value that has no JSON form, as NumPy's values, paths and dataclasses do.
    """
    text = msgspec.json.format(to_json(value), indent=1) + b"\n"
    with atomic(path) as partial, open(partial, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return Path(path)


def to_json(value, order=None) -> bytes:
    """`value` as JSON in one line; keys by `order` of msgspec."""
    return msgspec.json.encode(value, enc_hook=_plain, order=order)


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


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
        sha.update(to_json(value, "sorted"))


def code_digest(names: Sequence[str]) -> str:
    """Twenty digits for the code of these modules and rooms of kit: part of a key, they keep what
    other code made from passing for this code's. Comments, docstrings and line breaks do not
    count."""
    package, files = Path(__file__).parents[1], []
    for name in names:
        files += [package / name] if name.endswith(".py") else (package / name).rglob("*.py")
    return digest([_computes(file.read_text()) for file in sorted(files)])


@cache
def _computes(source: str) -> str:
    """What a module does, whatever its comments, docstrings and line breaks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return ast.dump(tree)
