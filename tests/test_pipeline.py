import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kit import artifact
from kit.core.weights import copy_model, weight_of
from kit.data.loaders import Windows
from kit.models import build_model
from kit.pipeline import CompressionPipeline, _rewind
from kit.pruning.experts import keep_experts
from kit.training import TrainConfig, train
from kit.training.evaluation import evaluate
from kit.training.losses import AUXILIARY_WEIGHT

SHAPE = dict(vocab_size=64, d_model=32, layers=1, d_ff=64, channels=16)


def loader(seed, windows, shuffle):
    """Text of a noisy cycle: every token tells the next nine times in ten."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(windows * 16 + 1, dtype=torch.int32)
    for i in range(1, len(tokens)):
        surprise = torch.rand((), generator=generator) < 0.1
        tokens[i] = (
            torch.randint(0, 64, (), generator=generator)
            if surprise
            else (tokens[i - 1] * 5 + 3) % 64
        )
    windows = Windows(tokens.numpy(), 16, full_only=True)
    return DataLoader(windows, 8, shuffle=shuffle, collate_fn=lambda batch: batch)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = build_model("ResNetBK", SHAPE)
    loaders = loader(0, 160, True), loader(1, 40, False)
    train(model, loaders[0], TrainConfig(steps=120, lr=1e-2), log=False)
    return model, *loaders


def run(trained, folder, **settings):
    model, training, validation = trained
    pipeline = CompressionPipeline(model, **{"target_compression": 12.0, "log": False, **settings})
    return pipeline.run_pipeline(training, validation, 1, 1, 2, folder)


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *run(trained, folder)


def test_metrics_are_those_of_the_files(trained, finished):
    folder, model, metrics = finished
    assert list(metrics["stage_metrics"]) == ["qat", "pruning", "distillation"]
    baseline = artifact.float32_bytes(trained[0])
    for name, stage in metrics["stage_metrics"].items():
        path = folder / f"{name}.kit"
        assert stage["bytes"] == path.stat().st_size
        assert stage["ratio"] == baseline / path.stat().st_size
        assert stage["final_perplexity"] == evaluate(artifact.load(path), trained[2]).perplexity
    assert metrics["compression_ratio"] == metrics["stage_metrics"]["distillation"]["ratio"]
    assert metrics["stage_metrics"]["qat"]["degradation"] < 0.005
    assert (
        metrics["target_met"]
        and metrics["stage_metrics"]["distillation"]["bytes"] <= baseline // 12
    )
    assert (
        metrics["stage_metrics"]["distillation"]["final_perplexity"] < 40
    )  # 64 would be knowing nothing


def test_returned_model_is_the_file(finished, trained):
    folder, model, _ = finished
    tokens = next(iter(trained[2]))[0]
    assert torch.equal(model(tokens), artifact.load(folder / "distillation.kit")(tokens))


def test_given_model_is_unchanged(trained, finished):
    assert not any("parametrizations" in name for name, _ in trained[0].named_modules())


def test_student_of_few_bits_sees_no_dropout(trained):
    model, batches = build_model("ResNetBK", {**SHAPE, "dropout": 0.9}), list(trained[1])[:2]
    pipeline = CompressionPipeline(model, 6.0, stages=["distillation"], log=False)
    student = pipeline._distillation(None, model.eval(), batches).model.train()
    tokens = batches[0][0]
    assert torch.equal(student(tokens), student(tokens)) and not torch.equal(
        model.train()(tokens), model(tokens)
    )


def test_killed_in_a_stage_it_resumes_to_the_same_bytes(trained, finished, tmp_path, monkeypatch):
    calls = 0
    original = torch.optim.AdamW.step

    def failing(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 55:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(trained, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "qat.json").exists() and not (tmp_path / "distillation.json").exists()
    run(trained, tmp_path)
    for stage in ("qat", "pruning", "distillation"):
        assert (tmp_path / f"{stage}.kit").read_bytes() == (
            finished[0] / f"{stage}.kit"
        ).read_bytes(), stage


def test_every_stage_ends_at_no_learning_rate(trained, tmp_path, monkeypatch):
    rates, original = [], torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    run(trained, tmp_path)
    stages = np.split(
        np.array(rates), [20, 40]
    )  # 20 batches an epoch: one of QAT, one of pruning, two of distillation
    assert len(rates) == 80 and all(stage[-1] == 0 < stage[:-1].min() for stage in stages)


def test_finished_stages_are_read_not_run(trained, finished, monkeypatch, capsys):
    monkeypatch.setattr("kit.pipeline.train", None)
    assert run(trained, finished[0], log=True)[1] == finished[2]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("target of 12x")


def test_until_ends_after_a_stage(trained, finished, monkeypatch):
    monkeypatch.setattr("kit.pipeline.train", None)
    pipeline = CompressionPipeline(trained[0], 12.0, log=False)
    model, metrics = pipeline.run_pipeline(*trained[1:], 1, 1, 2, finished[0], until="pruning")
    assert metrics["compression_ratio"] == finished[2]["stage_metrics"]["pruning"]["ratio"]
    assert list(metrics["stage_metrics"]) == ["qat", "pruning"]
    tokens = next(iter(trained[2]))[0]
    assert torch.equal(model(tokens), artifact.load(finished[0] / "pruning.kit")(tokens))
    with pytest.raises(ValueError, match="until is 'prune'; it must be one of qat, pruning"):
        pipeline.run_pipeline(*trained[1:], save_dir=finished[0], until="prune")


def test_finished_stages_are_measured_anew_on_other_validation_data(
    trained, finished, tmp_path, monkeypatch
):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr("kit.pipeline.train", None)
    model, data, _ = trained
    found = CompressionPipeline(model, 12.0, log=False).run_pipeline(data, data, 1, 1, 2, folder)[1]
    for name, stage in found["stage_metrics"].items():
        before = finished[2]["stage_metrics"][name]
        assert stage["bytes"] == before["bytes"]
        quality = evaluate(artifact.load(folder / f"{name}.kit"), data).perplexity
        assert stage["final_perplexity"] == quality != before["final_perplexity"]
        assert stage["degradation"] == quality / found["baseline"]["perplexity"] - 1


def test_other_settings_need_another_folder(trained, finished):
    with pytest.raises(ValueError, match="another save_dir"):
        run(trained, finished[0], target_compression=5.0)


def test_stages_of_other_code_are_not_taken_for_its_own(trained, finished, monkeypatch):
    monkeypatch.setattr("kit.pipeline.code_digest", lambda names: "another")
    with pytest.raises(ValueError, match="another version of the kit"):
        run(trained, finished[0])


def test_stages_in_another_order(trained, tmp_path):
    _, metrics = run(trained, tmp_path, stages=("pruning", "qat"), target_compression=6.0)
    assert list(metrics["stage_metrics"]) == ["pruning", "qat"]


def test_a_missed_target_is_said(trained, tmp_path):
    _, metrics = run(trained, tmp_path, stages=("qat",), target_compression=100.0)
    assert metrics["target_met"] is False


def test_classifiers(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(256, 1, 8, 8)
    data = DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), 32, shuffle=True)
    model = build_model("DigitsMLP", {})
    _, metrics = CompressionPipeline(model, 8.0, log=False).run_pipeline(
        data, data, 1, 1, 2, tmp_path
    )
    assert 0 <= metrics["stage_metrics"]["distillation"]["final_accuracy"] <= 1
    assert metrics["target_met"]


def test_the_distillation_stage_starts_from_the_teachers_values_and_learns_mostly_from_labels(
    trained, finished
):
    teacher, batches = copy_model(trained[0]).eval(), list(trained[1])[:2]
    pipeline = CompressionPipeline(teacher, 12.0, log=False)
    stage = pipeline._distillation(finished[0] / "pruning.kit", teacher, batches)
    pruned = artifact.load(finished[0] / "pruning.kit")
    for name in ("mixer.input", "mixer.output"):
        start = weight_of(stage.model.layers[0].get_submodule(name)).original
        assert torch.equal(start, teacher.layers[0].get_submodule(name).weight)
        assert not torch.equal(start, pruned.layers[0].get_submodule(name).weight)
    distill = stage.loss.loss
    total, soft, hard = (
        distill(stage.model, batches[0]),
        *(distill.parts[key] for key in ("soft", "hard")),
    )
    total = total - AUXILIARY_WEIGHT * stage.model.auxiliary_loss()
    share = ((total - hard) / (soft - hard)).item()
    assert 0.1 < share < 0.5


def test_distillation_starts_over_from_the_uncompressed_values_where_shapes_allow(trained):
    model = trained[0]
    smaller = copy_model(model)
    keep_experts(smaller.layers[0].moe, torch.tensor([0, 2]))
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    _rewind(smaller, model)
    original, changed = dict(model.named_parameters()), set()
    for name, parameter in smaller.named_parameters():
        if parameter.shape == original[name].shape:
            assert torch.equal(parameter, original[name])
        else:
            changed.add(name.rsplit(".", 1)[-1])
            assert not parameter.any()
    assert changed >= {"w_in", "w_out"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_compression": 0.5}, "target_compression is 0.5; it must be a number from 1"),
        (
            {"stages": ("qat", "prune")},
            "stages is .*'prune'.*; it must be a tuple of which each is one of 'qat', 'pruning'",
        ),
    ],
)
def test_bad_settings(trained, settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionPipeline(trained[0], **settings)


def test_a_budget_below_the_overhead_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="too few"):
        run(trained, tmp_path, stages=("distillation",), target_compression=500.0)


def test_composed_and_ordered_token_tables_give_the_same_file_twice(trained, tmp_path):
    parts = np.full((64, 2), -1, np.int32)
    parts[32:] = np.arange(64).reshape(32, 2) // 2
    files, counts = [], np.arange(64)[::-1] ** 2
    for turn in ("one go", "again"):
        run(
            trained,
            tmp_path / turn,
            stages=("distillation",),
            token_parts=parts,
            token_counts=counts,
        )
        files.append((tmp_path / turn / "distillation.kit").read_bytes())
    assert files[0] == files[1] and len(files[0]) <= artifact.float32_bytes(trained[0]) // 12
    with pytest.raises(artifact.ArtifactError, match="parts"):
        artifact.load(tmp_path / "again" / "distillation.kit")
