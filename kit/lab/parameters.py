"""Parameters of notebooks: what each may be, and profiles, which set many of them at once."""

import ast
import contextlib
import difflib
import importlib.util
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from kit.core import settings
from kit.core.settings import Count, Meta, Positive, Seed, checked, expected
from kit.data.tokenization import VocabularySize

PROFILES = Path(__file__).resolve().parents[2] / "notebooks" / "params"
Ratio = Annotated[float, Meta(ge=1, le=1e9)]
OWN, PRETRAINED = "file.py:function", "hf:<folder or hub id>"
MODELS = ("resnet_bk", "lstm", "transformer", OWN, PRETRAINED)
Text = Annotated[str, Meta(min_length=1)]
SHARED = [  # kinds, and the names of what is of that kind in any notebook
    (Text, "model corpus out runs records device"),
    (str, "where order export"),
    (Literal["mlflow", "tensorboard"] | None, "track"),
    (Literal["logits", "features"], "outputs"),
    (VocabularySize, "vocab_size reference_vocab"),
    (Count | None, "train_bytes"),
    (Count, "d_model layers experts many_experts batch_size seq_len byte_budget cache_k threads"),
    (Count, "steps finetune_steps student_steps long_factor seeds"),
    (Positive, "lr lstm_lr transformer_lr student_lr max_error"),
    (settings.NotNegative, "weight_decay allowed_loss"),
    (settings.BelowOne, "dropout sparsity"),
    (settings.Share, "budget_share student_share"),
    (Ratio, "target_compression"),
    (list[Ratio], "frontier rounding"),
    (Seed, "seed"),
    (list[Seed], "long_seeds digits_seeds"),
    (bool, "tied measure"),
]
KINDS = {name: kind for kind, names in SHARED for name in names.split()}


def parameters(namespace: Mapping, models: Iterable[str] = ()) -> dict:
    """The parameters among a notebook's globals, checked and printed; its first cell after them is
    `globals().update(settings := parameters(globals()))`.

    models: what `model` may be, where a notebook's methods are not for any; OWN stands for a
    function of yours that takes the vocabulary's size, PRETRAINED for a causal language model of
    transformers, in a folder or on the hub.
    What `$KIT_PROFILE` sets holds but for what papermill was given. Raises ValueError for a value
    that its parameter cannot have, and for what papermill was given without a parameter.
    """
    values = {name: namespace[name] for name in KINDS if name in namespace}
    cells = [cell for cell in namespace.get("In", ()) if cell.startswith("# Parameters\n")]
    given = {name for cell in cells for name in assigned(cell)}
    for name in given - values.keys():
        raise ValueError(unknown("The notebook", name, values))
    profile = profile_overrides(values)
    values |= {name: profile[name] for name in profile.keys() - given}
    values = {name: checked(name, value, KINDS[name]) for name, value in values.items()}
    model = values.get("model")
    named = {OWN: own, PRETRAINED: pretrained}
    if models and not any(named.get(kind, kind.__eq__)(model) for kind in models):
        file = Path(model.rpartition(":")[0])
        here = OWN in models and PRETRAINED not in models  # in 00_your_model
        advice = "" if here else "00_your_model takes any module, 09_pretrained encoders"
        if OWN in models and file.suffix == ".py":
            what = "names no function" if file.is_file() else "is not there"
            advice = f"{file} {what} (paths are from {Path.cwd()})"
        said = f"{', '.join(models)}{advice and ': '}{advice}"
        raise ValueError(f"model is {model!r}; it must be one of {said}.")
    if (track := values.get("track")) and importlib.util.find_spec(track) is None:
        raise ValueError(f"track is {track!r}, which is not installed: pip install {track}")
    said = ", ".join(f"{name}={value!r}" for name, value in values.items())
    print(textwrap.fill(said, 100, break_long_words=False))
    return values


def own(model: str) -> bool:
    """Whether a model is "file.py:function", of a file that is there."""
    file, _, function = model.rpartition(":")
    return file.endswith(".py") and Path(file).is_file() and function.isidentifier()


def pretrained(model: str) -> bool:
    """Whether a model is "hf:" and a folder with a config, or what may be an id of the hub."""
    kind, _, home = model.partition(":")
    distant = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", home) and not Path(home).exists()
    return kind == "hf" and (Path(home, "config.json").is_file() or bool(distant))


def assigned(source: str) -> dict[str, ast.expr]:
    """Names that a cell assigns to, and what."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: node.value for node in nodes}


def unknown(what: str, name, known: Iterable[str]) -> str:
    """A sentence on a parameter that there is not."""
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
    return f"{what} has no parameter {name!r}; {hint}"


def profile_overrides(namespace: Mapping) -> dict:
    """The values of `notebooks/params/$KIT_PROFILE.yaml` for names in `namespace`; {} without it.

    An `out` under `runs/` goes to `runs-$KIT_PROFILE/`, so that a test never replaces a record.
    Raises ValueError for a profile that is not there.
    """
    name = os.environ.get("KIT_PROFILE")
    if not name:
        return {}
    known = {path.stem: path for path in sorted(PROFILES.glob("*.yaml"))}
    if name not in known:
        raise ValueError(f"KIT_PROFILE is {name!r}, expected one of {', '.join(known)}.")
    profile = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    if str(namespace.get("out")).startswith("runs/"):
        profile["out"] = namespace["out"].replace("runs/", f"runs-{name}/", 1)
    return {key: value for key, value in profile.items() if key in namespace}


def chosen(name: str, value, default):
    """`value` for a parameter of any notebook whose own value is `default` (... if no literal):
    one of KINDS, or of the default's type. Raises ValueError for another."""
    kind = Any if default in (None, ...) else type(default)
    with contextlib.suppress(ValueError):  # a notebook may mean something else by a name
        checked(name, default, KINDS.get(name, kind))
        kind = KINDS.get(name, kind)
    try:
        return checked(name, value, kind)
    except ValueError as error:
        hint = " YAML reads 1e-3 as text, write 1.0e-3." if "number" in expected(kind) else ""
        raise ValueError(f"{error}{hint if isinstance(value, str) else ''}") from None
