"""Dense models that are not the kit's: pretrained, with their own tokens, and of a function."""

import json
import math
import shutil

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kit.core.protocols import evaluating
from kit.hub import load_tokenizer
from kit.lab.records import write_result
from notebooks.reference import baseline, frontier
from notebooks.reference.baseline import load_or_train
from notebooks.reference.remeasure import remeasure
from notebooks.reference.sampling import continue_text

LINES = [f"the {a} of a {b} is {a + b} and not {a * b}\n" for a in range(40) for b in range(40)]
SHAPES = {
    "GPT2LMHeadModel": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "LlamaForCausalLM": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
}  # fmt: skip
OWN = """
from torch import nn

class Small(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.table, self.out = nn.Embedding(words, 16), nn.Linear(24, words)
        self.lstm = nn.LSTM(16, 24, batch_first=True, bidirectional=False)

    def forward(self, tokens):
        return self.out(self.lstm(self.table(tokens))[0])

def make(words):
    return Small(words)

def short(words):
    return Small(words - 1)
"""


def saved(folder, kind="GPT2LMHeadModel", vocab_size=300, **changes):
    """A folder with a model of random weights and a byte-level tokenizer of 290 tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": ["<|end|>"], "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=290, show_progress=False, **settings)
    made.train_from_iterator(LINES, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = SHAPES.get(kind, {}) | {"vocab_size": vocab_size, **ends} | changes
    model(model.config_class(**shape)).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opened")
    (folder / "text.txt").write_text("".join(LINES))
    (folder / "own.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIT_CACHE", str(folder / "cache"))
        yield {"corpus": f"text:{folder / 'text.txt'}", "batch_size": 4, "seq_len": 48}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def name(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def dense(settings, name):
    return load_or_train(model=name, **settings)


def perplexity(model, loader):
    """By the loss that transformers computes, in float64."""
    total = count = 0
    with evaluating(model := model.double()):
        for inputs, targets in loader:
            whole = torch.cat([inputs, targets[:, -1:].clamp(min=0)], 1)
            labels = torch.cat([torch.full_like(inputs[:, :1], -100), targets], 1)
            held = int((targets != -100).sum())
            total += held * float(model(input_ids=whole, labels=labels).loss)
            count += held
    return math.exp(total / count)


def test_the_weights_are_the_pretrained_ones_and_the_loss_is_that_of_transformers(dense, name):
    folder = name.removeprefix("hf:")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(value, dense.model.state_dict()[key]), key
    assert dense.history == [] and dense.bytes == dense.path.stat().st_size
    assert dense.test.perplexity == pytest.approx(perplexity(model, dense.loaders.test), rel=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("".join(LINES), add_special_tokens=False)["input_ids"]
    text = dense.corpus
    assert [*text.train, *text.validation, *text.test] == ids
    assert len(text.token_counts) == len(text.tokenizer.parts) == text.tokenizer.vocab_size == 300


def test_the_file_is_written_once_whatever_the_training_would_be(
    dense, name, settings, monkeypatch, capsys
):
    monkeypatch.setattr(baseline.artifact, "save", lambda *_, **__: pytest.fail("written again"))
    again = load_or_train(model=name, **settings, steps=7, d_model=8)
    assert again.path == dense.path
    assert "d_model, steps, vocab_size do not apply to it" in capsys.readouterr().out


def test_a_model_trained_on_is_another(settings, tmp_path):
    first = load_or_train(model=saved(tmp_path), **settings)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] += 1e-3
    model.save_pretrained(tmp_path)
    assert load_or_train(model=f"hf:{tmp_path}", **settings).path != first.path


def test_a_pipeline_s_file_is_read_back_and_measured_again(dense, name, settings, tmp_path):
    parts, counts = frontier.token_parts(dense), dense.corpus.token_counts
    options = {"token_parts": parts, "token_counts": counts, "log": False}
    pipeline = frontier.CompressionPipeline(dense.model, 8.0, **options)
    steps = {"qat": 2, "pruning": 2, "distillation": 8}
    *_, last = frontier.compressed(dense, pipeline, dense.loaders.train, tmp_path, **steps)
    assert last["bytes"] <= pipeline.budget
    model = dense.load(tmp_path / "distillation.kit")
    found = perplexity(model, dense.loaders.test)
    assert found == pytest.approx(last["perplexity"], rel=1e-5)
    model = model.float()
    assert continue_text(model, dense.corpus.tokenizer, "the 3 of", 4, window=48)[:8] == "the 3 of"
    parameters = {"model": name, "vocab_size": 4096, "train_bytes": None, **settings}
    corpus = {"name": "text", "sha256": dense.corpus.sha256}
    record = {"notebook": "05", "parameters": parameters, "seed": 0, "corpus": corpus}
    record |= {"bytes": last["bytes"], "perplexity": last["perplexity"]}
    write_result(tmp_path, {**record, "artifact": "distillation.kit"})
    again, recorded = remeasure(tmp_path)
    assert again == pytest.approx(recorded)


def test_a_function_s_model_is_trained_rounded_and_read_back(settings, tmp_path, capsys):
    own = settings["corpus"].removeprefix("text:").replace("text.txt", "own.py")
    options = {**settings, "vocab_size": 280, "steps": 12}
    dense = load_or_train(model=f"{own}:make", d_model=8, **options)
    assert "has the shape it has: d_model do not apply" in capsys.readouterr().out
    row = frontier.rounded(dense, 6.0, tmp_path)
    assert row["ratio"] >= 6 and row["perplexity"] < 2 * dense.test.perplexity
    for function, says in (("none", "has no function 'none'"), ("short", "logits of 279 tokens")):
        with pytest.raises(ValueError, match=says):
            load_or_train(model=f"{own}:{function}", **options)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32}
HEADLESS = {
    "BertModel": SMALL,
    "BertForMaskedLM": SMALL,
    "BertLMHeadModel": SMALL,  # not told that it is a decoder
    "GPT2Model": SHAPES["GPT2LMHeadModel"],
    "T5ForConditionalGeneration": {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2},
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_what_is_no_causal_language_model_is_sent_to_another_notebook(kind, settings, tmp_path):
    with pytest.raises(ValueError, match=f"a {kind}, which .*09_pretrained takes") as refusal:
        load_or_train(model=saved(tmp_path, kind, **HEADLESS[kind]), **settings)
    assert "\n" not in str(refusal.value)


def test_windows_longer_than_the_positions_are_refused(name, settings):
    with pytest.raises(ValueError, match="seq_len is 65, but hf:.* has 64 positions: choose less"):
        load_or_train(model=name, **{**settings, "seq_len": 65})


def test_a_model_without_a_fast_tokenizer_of_its_tokens_is_refused(settings, tmp_path):
    for kind in SHAPES:
        name = saved(tmp_path / kind, kind)
        for file in (tmp_path / kind).glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ValueError, match="has no fast tokenizer .*tokenizer.json") as refusal:
            load_or_train(model=name, **settings)
        assert "\n" not in str(refusal.value)
    few = saved(tmp_path / "few", vocab_size=280)
    with pytest.raises(ValueError, match="token 2.. of the text is outside of a vocabulary of 280"):
        load_or_train(model=few, **settings)


def test_merges_are_told_only_where_each_is_of_earlier_tokens(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path / "a"), 300)
    parts, decode = tokenizer.parts, tokenizer.decode
    merged = [i for i in range(300) if parts[i, 0] >= 0]
    assert len(merged) == 290 - 257
    assert all(decode([i]) == decode(parts[i]) for i in merged)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "tokenizer.json"
    state = json.loads(file.read_text())
    ids = state["model"]["vocab"]
    last, byte = max(ids, key=ids.get), min(ids, key=lambda token: (len(token), ids[token]))
    ids[last], ids[byte] = ids[byte], ids[last]  # now a byte's number is above what it makes
    file.write_text(json.dumps(state))
    assert load_tokenizer(f"hf:{tmp_path / 'b'}", 300).parts is None
    assert load_tokenizer(f"hf:{tmp_path / 'a'}", 280).parts is None
