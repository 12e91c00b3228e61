"""Every path on another device than the CPU: on one that is pretended (`tests/far.py`), where a
tensor of the CPU among the others is found, and on a GPU where there is one."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kit import artifact
from kit.budget.rate import RateLoss, row_sensitivity, set_rate_formats
from kit.budget.rounding import round_to_budget
from kit.budget.sensitivity import plan_for_budget, scan
from kit.core.protocols import pick_device
from kit.distillation import DistillationTrainer, build_cache, initialize_from_teacher
from kit.models import bk_scan, build_model
from kit.pipeline import CompressionPipeline
from kit.pruning import MagnitudePruner, input_norms, prune_sparsegpt
from kit.pruning.criteria import CRITERIA
from kit.pruning.experts import reduce_experts
from kit.pruning.structured import prune_hidden_units
from kit.quantization import Format, calibrate, original_mix, quantize_bk_core, quantize_weights
from kit.quantization.gptq import gptq
from kit.quantization.hqq import hqq
from kit.quantization.integers import pack_layers
from kit.quantization.token_tables import compose_tables
from kit.training import TrainConfig, parallel, train
from kit.training.evaluation import evaluate
from kit.training.losses import VocabularySample, next_token_loss, training_loss
from tests.far import FAR, FarTensor, pretended

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
torch.manual_seed(0)
TOKENS = torch.randint(0, 50, (24, 17))
TEXT = DataLoader(TensorDataset(TOKENS[:, :-1], TOKENS[:, 1:]), 4, shuffle=True)
BATCHES = list(itertools.islice(TEXT, 2))
PARTS = np.full((50, 2), -1)  # what tokens were merged from
PARTS[30:] = np.stack([np.arange(20), np.arange(5, 25)], 1)
SHORT = TrainConfig(2)


def model(d_model=8, seed=0):
    torch.manual_seed(seed)
    config = {"vocab_size": 50, "d_model": d_model, "layers": 2, "experts": 3}
    return build_model("ResNetBK", config)


def trained(m, folder):
    train(m, TEXT, TrainConfig(3, lr=0.01), validate=lambda m: evaluate(m, TEXT).loss, log=False)
    checkpoint = folder / "checkpoint"
    train(m, TEXT, TrainConfig(3, accumulate=2), checkpoint=checkpoint, log=False)
    return train(m, TEXT, TrainConfig(3, accumulate=2), checkpoint=checkpoint, log=False)


def rounded(m, folder):
    calibrate(quantize_bk_core(m), BATCHES)
    quantize_weights(m, original_mix(m))
    artifact.save(m, folder / "model.kit")
    for trainable in (False, True):
        again = artifact.load(folder / "model.kit", trainable=trainable).to(
            next(m.parameters()).device
        )
        assert evaluate(again, BATCHES).loss == pytest.approx(evaluate(m, BATCHES).loss, rel=1e-4)
    evaluate(pack_layers(copy.deepcopy(m)), BATCHES)


def repaired(m, folder):
    gptq(copy.deepcopy(m), Format(4), BATCHES)
    hqq(copy.deepcopy(m), Format(4))
    round_to_budget(m, BATCHES, artifact.float32_bytes(m) // 2)


def pruned(m, folder):
    norms = input_norms(m, BATCHES)
    for score in CRITERIA:
        MagnitudePruner(copy.deepcopy(m), list(norms), score=score, input_norms=norms).prune(0.5)
    MagnitudePruner(copy.deepcopy(m), scope="global").prune(0.5)
    train(m, TEXT, SHORT, hooks=[MagnitudePruner(m, scope="row").schedule(0.5, every=1)], log=False)
    prune_sparsegpt(copy.deepcopy(m), BATCHES, 0.5, list(norms))


def shrunk(m, folder):
    reduce_experts(copy.deepcopy(m), 2, BATCHES)
    reduce_experts(copy.deepcopy(m), 2, BATCHES, criterion="merge")
    prune_hidden_units(m, 0.5, batches=BATCHES)
    evaluate(m, BATCHES)


def budgeted(m, folder):
    formats = {"4": Format(4), "8": Format(8)}
    table = scan(m, BATCHES, formats, "*.moe.w_*")
    quantize_weights(
        copy.deepcopy(m), plan_for_budget(m, table, formats, artifact.float32_bytes(m))
    )
    loss = training_loss(m)
    compose_tables(m, PARTS, BATCHES, loss)
    set_rate_formats(m, row_sensitivity(m, BATCHES, loss), 2000)
    RateLoss(loss, m, artifact.nbytes(m) - 20, BATCHES).finish()


def distilled(m, folder):
    teacher, student = copy.deepcopy(m).eval(), m
    for loss in ("mse", "cosine", "relational"):
        DistillationTrainer(teacher, student, feature_loss=loss).fit(TEXT, SHORT, log=False)
    cache = build_cache(teacher, TEXT, folder / "cache", k=8)
    DistillationTrainer(cache, student).fit(cache.wrap(TEXT), SHORT, log=False)
    sampled = {"feature_weight": 0.0, "sample": VocabularySample(8, 4)}
    DistillationTrainer(teacher, student, 1.0, **sampled).fit(TEXT, SHORT, log=False)
    small = model(4).to(next(m.parameters()).device)
    initialize_from_teacher(small, teacher)


def compressed(m, folder):
    more = {"token_parts": PARTS, "token_counts": np.arange(50)[::-1].copy()}
    device = str(next(m.parameters()).device)
    pipeline = CompressionPipeline(m, 3.0, device=device, log=False, **more)
    found, metrics = pipeline.run_pipeline(TEXT, TEXT, 0.5, 0.5, 1, save_dir=folder)
    assert metrics["target_met"]


PATHS = (trained, rounded, repaired, pruned, shrunk, budgeted, distilled, compressed)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_no_tensor_of_the_cpu_gets_among_those_of_a_device(path, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "pick_device", torch.device)
    with pretended() as device:
        path(model().to(device), tmp_path)


def test_the_pretended_device_computes_as_the_cpu_and_refuses_what_a_gpu_would(tmp_path):
    near, weight = model(), lambda m: m.embedding.weight
    expected = trained(near, tmp_path).history
    (tmp_path / "checkpoint").unlink()
    with pretended() as device:
        m = model().to(device)
        assert isinstance(weight(m), FarTensor) and weight(m).device == FAR
        history = trained(m, tmp_path).history
        assert history[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)
        for refused in (lambda: m(TOKENS), lambda: weight(m) + torch.ones(8)):
            with pytest.raises(RuntimeError, match="on one device"):
                refused()
        with pytest.raises(TypeError, match="numpy"):
            weight(m).detach().numpy()
        assert weight(m).detach().cpu().numpy().shape == (50, 8)


def test_adjoint_of_the_scan_on_a_device():
    x, p, eta = torch.randn(2, 40, 3), torch.rand(2, 40, 3), torch.ones(3)
    g, *saved = bk_scan.resolve(x, p, eta)
    expected = bk_scan.resolve_backward(*saved, g)
    with pretended() as device:
        g, *saved = bk_scan.resolve(*(part.to(device) for part in (x, p, eta)))
        for ours, theirs in zip(bk_scan.resolve_backward(*saved, g), expected):
            assert isinstance(ours, FarTensor)
            torch.testing.assert_close(ours.cpu(), theirs)


def test_devices_by_name(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:97", "tpu", "", "meta"):
        with pytest.raises(ValueError, match="there is no device .*choose auto"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device() == torch.device("cpu")


@gpu
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_paths_on_a_gpu(path, tmp_path):
    path(model().cuda(), tmp_path)


@gpu
def test_cpu_and_gpu_agree():
    near, config = model(16), TrainConfig(10, lr=0.01)
    far, gradients = copy.deepcopy(near).cuda(), []
    for m in (near, far):
        batch = [t.to(next(m.parameters()).device) for t in BATCHES[0]]
        next_token_loss(m, batch).backward()
        gradients.append([p.grad.cpu().clone() for p in m.parameters()])
        m.zero_grad()
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    losses = [train(m, TEXT, config, log=False).history[-1]["loss"] for m in (near, far)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for precision in ("bfloat16", "float16"):
        m = model(16).cuda()
        half = train(m, TEXT, TrainConfig(10, lr=0.01, precision=precision), log=False)
        assert half.history[-1]["loss"] == pytest.approx(losses[0], rel=0.05)
