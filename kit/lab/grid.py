"""Parameters of notebooks: profiles, grids, and the checks made before anything starts."""

import ast
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

import kit

PROFILES = Path(kit.__file__).resolve().parent.parent / "notebooks" / "params"


def profile_overrides(namespace: Mapping) -> dict:
    """The values of ``notebooks/params/$KIT_PROFILE.yaml`` for names in `namespace`; {} when it is not set.

    An `out` under ``runs/`` goes to ``runs-$KIT_PROFILE/``, so that a test never replaces the record of a run.

    Raises:
        ValueError: there is no such profile.
    """
    name = os.environ.get("KIT_PROFILE")
    if not name:
        return {}
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"KIT_PROFILE is {name!r}, expected one of {', '.join(known)} (see {PROFILES}).")
    profile = yaml.safe_load((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))
    if str(namespace.get("out")).startswith("runs/"):
        profile["out"] = namespace["out"].replace("runs/", f"runs-{name}/", 1)
    return {key: value for key, value in profile.items() if key in namespace}


def read_grid(path: str | Path) -> tuple[Mapping | Sequence[Mapping], list[int]]:
    """Grid and seeds of a YAML file.

    Raises:
        ValueError: not YAML, or other keys than grid and seeds.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no grid file {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or "grid" not in content or set(content) - {"grid", "seeds"}:
        raise ValueError(f"{path} holds {content!r}, expected the key grid and, if wanted, seeds.")
    return content["grid"], content.get("seeds") or []


def combinations(grid: Mapping | Sequence[Mapping], seeds: Sequence[int] = ()) -> list[dict]:
    """Every combination of a mapping's lists, or each dict of a list, with each seed.

    Raises:
        ValueError: the grid is neither, or a name has no list of values.
    """
    if isinstance(grid, Mapping):
        bare = [name for name, values in grid.items() if not isinstance(values, (list, tuple)) or not values]
        if bare:
            raise ValueError(f"The grid gives {bare[0]} as {grid[bare[0]]!r}, expected a list of values.")
        chosen = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    elif isinstance(grid, (list, tuple)) and grid and all(isinstance(item, Mapping) for item in grid):
        chosen = [dict(item) for item in grid]
    else:
        raise ValueError(f"The grid is {grid!r}, expected a mapping of names to lists or a list of mappings.")
    if not isinstance(seeds, (list, tuple, range)):
        raise ValueError(f"The seeds are {seeds!r}, expected a list of integers.")
    return [{**item, "seed": seed} for item in chosen for seed in seeds] if seeds else chosen


def notebook_defaults(notebook: Path) -> dict:
    """Names and values of a notebook's parameters cell; ``...`` for a value that is not a literal.

    Raises:
        ValueError: papermill cannot read one of its lines.
    """
    import papermill  # takes seconds to import, and a notebook that asks for its profile does not need it

    found = papermill.inspect_notebook(str(notebook))
    cells = [cell for cell in _cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    tree = ast.parse("".join(cells[0]["source"]) if cells else "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in found:
            raise ValueError(f"papermill cannot read the parameter {node.id!r} of {notebook.name}; write one "
                             "plain assignment a line, without '=' in its comment.")
    return {name: _literal(parameter["default"]) for name, parameter in found.items()}


def check_parameter(notebook: Path, name: str, value, defaults: Mapping) -> None:
    """Whether the notebook has this parameter and its default is of the value's type.

    An integer is accepted for a float, and anything where the default is None or not a literal.

    Raises:
        ValueError: it has not; the closest name is given.
    """
    if name == "out":
        raise ValueError("The batch sets 'out' itself, a folder for each run; remove it from the grid.")
    if name not in defaults:
        near = difflib.get_close_matches(str(name), defaults, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(defaults)}."
        raise ValueError(f"{notebook.name} has no parameter {name!r}; {hint}")
    default = defaults[name]
    kind = type(default)
    allowed = {float: (float, int), tuple: (tuple, list), list: (tuple, list)}.get(kind, (kind,))
    if default is not None and default is not ... and type(value) not in allowed:
        hint = "; YAML reads 1e-3 as text, write 1.0e-3" if kind is float and type(value) is str else ""
        raise ValueError(f"{name} is {value!r}, expected {kind.__name__} like the {default!r} of "
                         f"{notebook.name}{hint}.")


def identify(notebook: Path, changed: Mapping) -> str:
    """A folder's name: readable beginning, and a hash of code, parameters and the version of the kit."""
    code = ["".join(cell["source"]) for cell in _cells(notebook) if cell["cell_type"] == "code"]
    identity = json.dumps([code, sorted(changed.items()), kit.__version__], default=str)
    said = "-".join([notebook.stem, *(f"{name}={value}" for name, value in changed.items())])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return f"{re.sub('[^A-Za-z0-9._=-]+', '_', said)[:70]}-{digest[:10]}"


def _cells(notebook: Path) -> list[dict]:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{notebook} is not a notebook of format 4; save it again in Jupyter.") from None


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ...
