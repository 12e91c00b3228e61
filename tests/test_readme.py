"""README's examples, pasted into an empty file, do what they say."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from kit import artifact
from kit.core.protocols import evaluating
from kit.core.weights import weights
from kit.pruning import get_mask

BLOCKS = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)


@pytest.fixture
def pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def run(text, **names):
        exec(compile(text, "README.md", "exec"), names)
        return names

    return run


def test_a_cnn_gets_an_eighth_of_its_bytes(pasted, tmp_path):
    made = pasted(BLOCKS[0])
    assert (tmp_path / "small.kit").stat().st_size <= artifact.float32_bytes(made["build"]()) / 8
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(made["restored"](x), made["model"](x))


def test_so_does_a_model_of_transformers(pasted, tmp_path):
    start, _, end = BLOCKS[0].partition("build = lambda")
    end = end[end.index("\nround_to_budget") :]
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=96, max_position_embeddings=32,
    )  # fmt: skip

    def build():
        return transformers.AutoModelForMaskedLM.from_config(config).eval()

    ids = torch.randint(0, 96, (4, 8, 12))
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    made = pasted(f"{start}{end}", build=build, model=build(), batches=batches)
    assert (tmp_path / "small.kit").stat().st_size <= artifact.float32_bytes(build()) / 8
    outputs = [made[name].eval()(**batches[0]).logits for name in ("model", "restored")]
    assert torch.equal(*outputs)


def test_a_model_of_transformers_is_pruned_and_quantized_in_training(pasted):
    made = pasted(BLOCKS[1])
    model, restored, ids = made["model"], made["restored"], torch.randint(300, (2, 9))
    masks = [get_mask(w.module, w.attribute) for w in weights(model, matrices=True)]
    assert 1 - torch.cat([mask.flatten() for mask in masks]).float().mean() == pytest.approx(
        0.8, 1e-4
    )
    with evaluating(model):
        assert torch.equal(restored(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(restored.generate(ids, **options), model.eval().generate(ids, **options))
