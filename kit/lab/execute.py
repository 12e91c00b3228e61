"""Executes notebooks in place, in order, from one commit, and leaves no litter in them.

python -m kit.lab.execute                                   # all of notebooks/
python -m kit.lab.execute notebooks/03_pruning.ipynb --profile quick
"""

import argparse
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from kit.core.store import atomic
from kit.lab.parameters import PROFILES
from kit.lab.records import ROOT, commit

LIVE = r"^(step \d+/\d+  |hint: this machine is busy).*\n?"  # lines of a training's log
LITTER = re.compile(rf"{LIVE}|{re.escape(f'{ROOT}{os.sep}')}| at 0x[0-9a-f]+", re.MULTILINE)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
NOTEBOOKS = PROFILES.parent


def execute(path: Path) -> list[str]:
    """Runs a notebook in a kernel of its own and writes it back; returns what its cells warned of.

    Raises ValueError, and leaves the file as it was, where a cell fails.
    """
    notebook = nbformat.read(path, 4)

    def say(cell, cell_index):
        print(f"{path.stem}: cell {cell_index} of {len(notebook.cells) - 1}", flush=True)

    options = {"timeout": None, "kernel_name": "python3", "on_cell_execute": say}
    try:
        NotebookClient(
            notebook, resources={"metadata": {"path": str(path.parent)}}, **options
        ).execute()
    except CellExecutionError as error:
        raise ValueError(f"{path} fails with {error.ename}: {error.evalue}") from None
    except DeadKernelError:
        raise ValueError(f"{path}: the kernel died, most likely for lack of memory.") from None
    warnings = clean(notebook)
    with atomic(path) as new:
        new.write_text(nbformat.writes(notebook, ensure_ascii=False), encoding="utf-8")
    return [f"{path.stem}, cell {cell}: {text}" for cell, text in warnings]


def clean(notebook: nbformat.NotebookNode) -> list[tuple[int, str]]:
    """Takes live logs, progress bars, widgets, the machine's paths and tools' metadata out of an
    executed notebook; returns (cell, text) of what else went to stderr."""
    warnings = []
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for index, cell in enumerate(notebook.cells):
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        for output in list(cell.get("outputs", [])):
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            for texts, kind in [(output, "text"), *((data, kind) for kind in list(data))]:
                if isinstance(texts.get(kind), str) and kind.startswith("text"):
                    texts[kind] = LITTER.sub("", texts[kind])
            error = output.get("name") == "stderr"
            if error and "\r" not in output.text:
                warnings.append((index, output.text.strip()))
            if error or not (output.get("text") or data):
                cell.outputs.remove(output)
    return warnings


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb"))
    )
    parser.add_argument("--profile", choices=sorted(p.stem for p in PROFILES.glob("*.yaml")))
    parser.add_argument("--dirty", action="store_true", help="also with changes not committed")
    chosen = parser.parse_args()
    if missing := [str(path) for path in chosen.notebooks if not path.is_file()]:
        parser.error(f"there is no notebook {missing[0]}")
    if "+" in (now := commit() or "+") and not chosen.dirty:
        parser.error("the tree holds changes that no commit names: commit them, or say --dirty")
    os.environ["KIT_COMMIT"] = now  # executing changes the notebooks, not what they were made by
    if chosen.profile:
        os.environ["KIT_PROFILE"] = chosen.profile
    try:
        warnings = [text for path in chosen.notebooks for text in execute(path)]
    except ValueError as error:
        parser.error(str(error))
    print(*warnings, sep="\n", file=sys.stderr)
    return bool(warnings)


if __name__ == "__main__":
    sys.exit(main())
