"""The corpus ``docs``: the documentation written inside the kit's own dependencies and inside Python.

Nothing is imported: sources are read with ``ast``. A source (a Python file, or one of Python's help topics)
falls in one split, by the hash of its name; a paragraph enters the corpus unless half of it was seen before.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("torch", "numpy", "pandas", "matplotlib")
TOPICS = "pydoc_data.topics"
SKIPPED = {"tests", "testing"}  # folders of test code: a fifth of the source, a thirtieth of the text
SHINGLE = 5  # words
SEEN = 0.5  # share of a paragraph's shingles seen earlier at which it counts as a near-duplicate
PERCENT = {"test": 6, "validation": 6}  # of the sources; the rest is for training


def settings():
    """What the text depends on, as JSON values: versions, and this recipe.

    Raises ModuleNotFoundError when a package is missing.
    """
    versions = {package: importlib.metadata.version(package) for package in PACKAGES if _origin(package)}
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"python": platform.python_version(), "recipe": recipe, **versions}


def build():
    """Read, deduplicate and split the documentation: ``{"train": text, "validation": text, "test": text}``.

    About 10 MB in half a minute on one core. Sources stand in the order of the hash of their names, so that
    the beginning of a split is a sample of all of it.
    """
    splits = {"train": [], "validation": [], "test": []}
    seen = Seen()
    with _quick_parsing():
        named = sorted((hashlib.sha256(name.encode()).hexdigest(), read) for name, read in _sources())
        for digest, read in named:
            kept = [paragraph for text in read() for paragraph in paragraphs(text) if seen.is_new(paragraph)]
            if kept:
                splits[split_of(digest)].append("\n\n".join(kept) + "\n")
    return {split: "\n".join(sources) for split, sources in splits.items()}


def split_of(digest):
    """Split of a source, from the hexadecimal hash of its name."""
    percent = int(digest[-8:], 16) % 100
    if percent < PERCENT["test"]:
        return "test"
    return "validation" if percent < PERCENT["test"] + PERCENT["validation"] else "train"


def strings(source):
    """Texts in a Python source: strings that are statements (docstrings are), strings assigned to ``__doc__``
    or another name with "doc" in it, strings given to such functions (``add_docstr``).

    Indentation is cleaned as `inspect.cleandoc` does. A file of another version's syntax has none.
    """
    if '"""' not in source and "'''" not in source:
        return
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for statement in _statements(tree.body):
        for node in _documenting(statement):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield inspect.cleandoc(node.value)


def _documenting(statement):
    """Nodes of a statement among which documentation is to be found."""
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
        return [value]
    if isinstance(statement, ast.Expr) and isinstance(value, ast.Call):
        names = [value.func]
    else:
        names = statement.targets if isinstance(statement, ast.Assign) else []
    return ast.walk(value) if any("doc" in ast.unparse(name).lower() for name in names) else []


def paragraphs(text):
    """Parts of the text between blank lines, without the blank lines."""
    return [part for part in re.split(r"\n\s*\n", text.strip("\n")) if part.strip()]


def shingles(words):
    """Set of the ``SHINGLE``-grams of a sequence of words (of the whole, when shorter)."""
    return {tuple(words[i:i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def normalized(paragraph):
    """Words of a paragraph: letters only, lower case; white-space-separated pieces when it has no letters."""
    return re.findall(r"[^\W\d_]+", paragraph.lower()) or paragraph.split()


class Seen:
    """Memory of paragraphs: `is_new` tells whether a paragraph is no near-duplicate, and remembers it."""

    def __init__(self):
        self._shingles, self._ids = set(), {}

    def is_new(self, paragraph):
        words = [self._ids.setdefault(word, len(self._ids)) for word in normalized(paragraph)]
        found = {hash(shingle) for shingle in shingles(words)}  # of integers: the same in every process
        new = found - self._shingles
        if len(found) - len(new) >= SEEN * len(found):
            return False
        self._shingles |= new
        return True


def _sources():
    """Yield (name, function that gives its texts) of every source."""
    for package in PACKAGES:
        root = Path(_origin(package)).parent
        for path in root.rglob("*.py"):
            name = path.relative_to(root.parent)
            if not SKIPPED.intersection(name.parts):
                yield name.as_posix(), lambda path=path: strings(path.read_text(encoding="utf-8"))
    tree = ast.parse(Path(_origin(TOPICS)).read_text(encoding="utf-8"))
    topics = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    for topic, text in topics.items():
        yield f"{TOPICS}/{topic}", lambda text=text: [text]


def _origin(module):
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"The corpus 'docs' reads {module!r}, which is not installed: "
                                  "run pip install -r requirements.txt, or use a corpus 'text:<file>'.")
    return spec.origin


def _statements(body):
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, block, ()))
        for handler in getattr(statement, "handlers", ()):
            yield from _statements(handler.body)


@contextmanager
def _quick_parsing():
    """No garbage collector, which would take most of the time; no warnings about the sources."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if enabled:
            gc.enable()
