"""Models of transformers as folders: `config.json`, the tokenizer's files, and `model.kit`."""

import copy
from pathlib import Path

import torch
import transformers
from torch import nn

from kit import artifact
from kit.core.protocols import bare
from kit.core.settings import reason_of
from kit.core.weights import class_of, weights
from kit.data.tokenization import BPETokenizer

FILE = "model.kit"


def save_pretrained(model: nn.Module, folder: str | Path, tokenizer=None) -> int:
    """Writes config, what `generate` needs, the tokenizer's files if it is given, and the weights
    with their steps as `model.kit`; returns the bytes of that. Raises ValueError for shapes that
    the config does not describe, as after structured pruning, and for a class that transformers
    lacks."""
    model, config = bare(model), copy.deepcopy(getattr(bare(model), "config", None))
    kind = class_of(model).__name__
    if not isinstance(config, transformers.PretrainedConfig) or not hasattr(transformers, kind):
        raise ValueError(f"{kind} is no class of transformers: write it with kit.artifact.save")
    config.architectures = [kind]
    config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    with torch.device("meta"):
        made = getattr(transformers, kind)._from_config(config)
    shapes = [{(w.name, w.original.shape) for w in weights(m)} for m in (made, model)]
    if wrong := shapes[0] ^ shapes[1]:
        what = f"{min(wrong)[0]!r} has another shape than {type(config).__name__} describes"
        raise ValueError(f"{what}: write it with kit.artifact.save, and read it into such a model")
    for part in (config, getattr(model, "generation_config", None), tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    return artifact.save(model, Path(folder) / FILE)


def from_pretrained(folder: str | Path, trainable: bool = False, packed=False) -> nn.Module:
    """The model in a folder of `save_pretrained`, in evaluation mode, with its steps on if
    `trainable`, in the memory of its codes if `packed` (`kit.artifact.load`); no other weights are
    needed. Raises ValueError for a folder that holds none."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]), artifact.without_values():
        model = getattr(transformers, config.architectures[0])._from_config(config)
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return artifact.load(Path(folder) / FILE, model, trainable, packed=packed)


def load(name: str) -> nn.Module:
    """The model, in evaluation mode, of "hf:" and a folder or an id of the Hugging Face hub. Raises
    ValueError where neither is to be had."""
    home = name.removeprefix("hf:")
    try:
        if home == name:
            raise ValueError("it does not begin with hf:")
        if Path(home).is_file():
            raise ValueError("it is a file")
        config = transformers.AutoConfig.from_pretrained(home)
        kind = getattr(transformers, config.architectures[0])
        return kind.from_pretrained(home, use_safetensors=True).eval()
    except Exception as error:  # whatever the library meets, in one sentence
        give = "hf: and a folder with config.json and model.safetensors, or a hub id and a network"
        raise ValueError(f"{name!r} cannot be read ({reason_of(error)}): give {give}") from None


def load_tokenizer(name: str, vocab_size: int) -> BPETokenizer:
    """The tokenizer that comes with the model of `load`, which knows `vocab_size` tokens. Raises
    ValueError where there is none, and for one that is not fast."""
    try:
        found = transformers.AutoTokenizer.from_pretrained(name.removeprefix("hf:"))
        if not found.is_fast:
            raise ValueError(f"{type(found).__name__} is a slow one")
        if len(found) <= len(found.all_special_ids):  # made up where no file is
            raise ValueError("no file of one is there")
    except Exception as error:
        raise ValueError(
            f"{name!r} has no fast tokenizer ({reason_of(error)}): put its tokenizer.json, and "
            "tokenizer_config.json, beside the model"
        ) from None
    backend = found.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return BPETokenizer(backend, vocab_size)
