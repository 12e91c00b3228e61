"""The dense model in the cache, texts that it continues, and files measured again."""

import json

import numpy as np
import pytest
import torch

from kit import artifact
from kit.lab.records import write_result
from kit.training.evaluation import evaluate
from notebooks.reference import baseline
from notebooks.reference.baseline import load_or_train
from notebooks.reference.remeasure import main, remeasure
from notebooks.reference.sampling import continue_text


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    words = np.random.default_rng(0).choice(["mask", "prune", "round", "teach", "code"], 4000)
    lines = [" ".join(words[i : i + 8]) for i in range(0, 4000, 8)]
    (folder / "text.txt").write_text("\n".join(lines))
    shape = {"d_model": 8, "layers": 1, "experts": 2}
    windows = {"vocab_size": 262, "batch_size": 4, "seq_len": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIT_CACHE", str(folder))
        yield {
            "corpus": f"text:{folder / 'text.txt'}",
            "steps": 12,
            "log": False,
            **shape,
            **windows,
        }


@pytest.fixture(scope="module")
def dense(settings):
    return load_or_train(**settings)


def test_the_same_settings_are_read_and_not_trained_again(settings, dense, monkeypatch):
    monkeypatch.setattr(baseline, "train", lambda *_, **__: pytest.fail("trained again"))
    again = load_or_train(**settings)
    for name, value in dense.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert again.path == dense.path and again.history == dense.history and again.tokens > 0
    np.testing.assert_array_equal(again.test.window_nll, dense.test.window_nll)
    assert not (dense.path.parent / "checkpoint").exists()


def test_figures_are_those_of_the_file(dense):
    test = evaluate(artifact.load(dense.path), dense.loaders.test)
    assert test.nll == pytest.approx(dense.test.nll) and dense.bytes == dense.path.stat().st_size
    bits = test.nll / np.log(2) / dense.corpus.utf8_bytes["test"]
    assert dense.bits_per_byte == pytest.approx(bits)


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"seed": 1}, {"layers": 2}, {"seq_len": 8}])
def test_other_settings_are_another_model(settings, dense, change):
    assert load_or_train(**{**settings, **change, "steps": 12}).path != dense.path


def test_settings_that_nobody_has_are_refused_before_training(settings, monkeypatch):
    monkeypatch.setattr(baseline, "train", lambda *_, **__: pytest.fail("trained"))
    for change, says in (({"layer": 2}, "no field layer"), ({"lr": -1.0}, "lr is -1.0")):
        with pytest.raises(ValueError, match=says):
            load_or_train(**{**settings, **change})


def test_training_that_was_killed_goes_on_as_if_it_had_not_been(settings, tmp_path, monkeypatch):
    changed, seen = {**settings, "seed": 7, "eval_every": 4}, []

    def killed(model, batches):
        if seen:
            raise KeyboardInterrupt
        seen.append(model)
        return evaluate(model, batches)

    with monkeypatch.context() as patch:
        patch.setattr(baseline, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            load_or_train(**changed)
    resumed = load_or_train(**changed)
    monkeypatch.setenv("KIT_CACHE", str(tmp_path))
    whole = load_or_train(**changed)
    assert resumed.path != whole.path and resumed.tokens == whole.tokens == 12 * 4 * 16
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_continued_texts_follow_the_seed_and_the_likeliest_token(dense):
    tokenizer = dense.corpus.tokenizer
    texts = {continue_text(dense.model, tokenizer, "mask", 8, seed=seed) for seed in (0, 0, 1)}
    assert len(texts) == 2 and all(text.startswith("mask") for text in texts)
    greedy = continue_text(dense.model, tokenizer, "mask", 1, temperature=0)
    logits = dense.model.eval()(torch.tensor(tokenizer.encode("mask")).long()[None])[0, -1]
    assert greedy == "mask" + tokenizer.decode([int(logits.argmax())])
    with pytest.raises(ValueError, match="empty"):
        continue_text(dense.model, tokenizer, "")


def test_a_file_reproduces_its_record_or_says_so(settings, dense, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.kit").write_bytes(dense.path.read_bytes())
    names = ("corpus", "vocab_size", "batch_size", "seq_len")
    parameters = {"train_bytes": None, **{name: settings[name] for name in names}}
    corpus = {"name": "text", "sha256": dense.corpus.sha256}
    record = {"notebook": "05", "parameters": parameters, "seed": 0, "corpus": corpus}
    record |= {"bytes": dense.bytes, "perplexity": dense.test.perplexity, "artifact": "model.kit"}
    path = write_result(tmp_path, record)
    found, recorded = remeasure(tmp_path)
    assert found == pytest.approx(recorded)
    monkeypatch.setattr("sys.argv", ["remeasure", str(tmp_path), "--import", "json"])
    main()
    assert "reproduces its record" in capsys.readouterr().out
    path.write_text(
        json.dumps({**record, "bytes": dense.bytes + 1})
    )  # an earlier version took more
    main()
    worse = {"bytes": dense.bytes - 1}, {"perplexity": 0.999 * dense.test.perplexity}
    for change in worse:
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(SystemExit, match="does not reproduce"):
            main()
    path.write_text(json.dumps({**record, "corpus": {"name": "text", "sha256": "other"}}))
    with pytest.raises(ValueError, match="another text"):
        remeasure(tmp_path)
