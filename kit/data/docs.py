"""The corpus `docs`: the documentation written inside the kit's own dependencies and inside Python.

Nothing is imported: sources are read with `ast`. A source (a Python file, or one of Python's help
topics) falls in one split, by the hash of its name; paragraphs half seen before are left out.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from kit.core.store import cache_dir, cached, code_digest, digest, read_json, write_json
from kit.data.corpus import SPLITS, Texts, register_corpus

PACKAGES = ("torch", "numpy", "pandas", "matplotlib")
TOPICS = "pydoc_data.topics"
SKIPPED = {"tests", "testing"}  # folders: a fifth of the source, a thirtieth of the text
SHINGLE = 5  # words
SEEN = 0.5  # share of a paragraph's shingles seen earlier at which it counts as a near-duplicate
PERCENT = 6  # of the sources for test, as many for validation


@register_corpus("docs")
def texts() -> Texts:
    """About 10 MB, built in half a minute on one core and kept in `cache_dir()`.

    They depend on the versions of Python and PACKAGES. Raises ModuleNotFoundError without.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _origin(name)}
    key = digest(platform.python_version(), code_digest(["data/docs.py"]), **versions)
    path = cache_dir() / "texts" / f"docs-{key}.json"
    read = partial(read_json, kind=dict[str, str])
    return cached(path, lambda file: write_json(file, build()), read)


def build() -> Texts:
    """Reads, deduplicates and splits the documentation. Sources stand in the order of the hash of
    their names, so that the beginning of a split is a sample of all of it."""
    splits, seen = {split: [] for split in SPLITS}, Seen()
    named = sorted((hashlib.sha256(name.encode()).hexdigest(), read) for name, read in _sources())
    for name, read in named:
        kept = [part for text in read() for part in paragraphs(text) if seen.is_new(part)]
        if kept:
            splits[split_of(name)].append("\n\n".join(kept) + "\n")
    return {split: "\n".join(sources) for split, sources in splits.items()}


def split_of(name: str) -> str:
    """Split of a source, from the hexadecimal hash of its name."""
    part = int(name[-8:], 16) % 100 // PERCENT
    return "test" if part == 0 else "validation" if part == 1 else "train"


def strings(source: str) -> Iterator[str]:
    """Texts in a Python source: strings that are statements (docstrings are), strings assigned to
    `__doc__` or another name with "doc" in it, strings given to such functions (`add_docstr`).

    Indentation is cleaned as `inspect.cleandoc` does. A file of another version's syntax has none.
    """
    if '"""' not in source and "'''" not in source:
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except SyntaxError:
        return
    for statement in _statements(tree.body):
        for node in _documenting(statement):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield inspect.cleandoc(node.value)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, block, ()))
        for handler in getattr(statement, "handlers", ()):
            yield from _statements(handler.body)


def _documenting(statement: ast.stmt) -> Iterable[ast.AST]:
    """Nodes of a statement among which documentation is to be found."""
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
        return [value]
    if isinstance(statement, ast.Expr) and isinstance(value, ast.Call):
        names = [value.func]
    else:
        names = statement.targets if isinstance(statement, ast.Assign) else []
    return ast.walk(value) if any("doc" in ast.unparse(name).lower() for name in names) else []


def paragraphs(text: str) -> list[str]:
    """Parts of the text between blank lines, without the blank lines."""
    return [part for part in re.split(r"\n\s*\n", text.strip("\n")) if part.strip()]


def shingles(words: list) -> set[tuple]:
    """The SHINGLE-grams of a sequence of words (the whole, when shorter)."""
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def normalized(paragraph: str) -> list[str]:
    """Words of a paragraph in lower case; the pieces between white space where it has none."""
    return re.findall(r"[^\W\d_]+", paragraph.lower()) or paragraph.split()


class Seen:
    """Memory of paragraphs: `is_new` tells whether one is no near-duplicate, and remembers it."""

    def __init__(self):
        self._shingles, self._ids = set(), {}

    def is_new(self, paragraph: str) -> bool:
        words = [self._ids.setdefault(word, len(self._ids)) for word in normalized(paragraph)]
        found = {hash(shingle) for shingle in shingles(words)}  # of integers: the same everywhere
        new = found - self._shingles
        if len(found) - len(new) >= SEEN * len(found):
            return False
        self._shingles |= new
        return True


def _sources() -> Iterator[tuple[str, Callable[[], Iterable[str]]]]:
    """(name, function that gives its texts) of every source."""
    for package in PACKAGES:
        root = Path(_origin(package)).parent
        for path in root.rglob("*.py"):
            name = path.relative_to(root.parent)
            if not SKIPPED.intersection(name.parts):
                yield name.as_posix(), lambda path=path: strings(path.read_text(encoding="utf-8"))
    tree = ast.parse(Path(_origin(TOPICS)).read_text(encoding="utf-8"))
    topics = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    for topic, text in topics.items():
        yield f"{TOPICS}/{topic}", lambda text=text: [text]


def _origin(module: str) -> str:
    """Path of a module's file, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        problem = f"The corpus 'docs' reads {module!r}, which is not installed"
        raise ModuleNotFoundError(f"{problem}: run pip install -r requirements.txt.")
    return spec.origin
