import copy
import gc
import math
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from kit.distillation import (
    DistillationTrainer,
    LinearSchedule,
    Output,
    build_cache,
    capture,
    feature_pairs,
    layer_mapping,
    linear_distillation,
    register_divergence,
    register_feature_loss,
)
from kit.distillation import cache as caches
from kit.distillation.cache import TeacherCache, sparse
from kit.distillation.divergences import (
    DIVERGENCES,
    FEATURE_LOSSES,
    as_real,
    feature_cosine,
    feature_mse,
    relational_loss,
    soft_loss,
    soft_targets,
    sparse_divergence,
)
from kit.models import LSTMLM, DigitsCNN, DigitsMLP, LSTMLMConfig, ResNetBK, ResNetBKConfig
from kit.pruning.mask import set_mask
from kit.quantization import Format, quantize_weights
from kit.training import TrainConfig, losses
from kit.training.losses import VocabularySample
from notebooks.reference.benchmarks import added_memory

VOCABULARY = 50


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return ResNetBK(
        ResNetBKConfig(VOCABULARY, d_model=16, layers=4, experts=2, d_ff=16, channels=8)
    ).eval()


@pytest.fixture
def student():
    torch.manual_seed(1)
    return ResNetBK(ResNetBKConfig(VOCABULARY, d_model=8, layers=2, experts=2, d_ff=16, channels=4))


@pytest.fixture
def loader():
    tokens = torch.randint(0, VOCABULARY, (12, 11), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=4, shuffle=True)


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


# Losses


def plain_divergence(kind, z_s, z_t, temperature, skew=0.1):
    """From probabilities alone, in NumPy's order of operations: no log-softmax, no shared code."""
    q, p = (
        torch.exp(z / temperature) / torch.exp(z / temperature).sum(-1, keepdim=True)
        for z in (z_s, z_t)
    )
    first, second = {
        "forward": (p, q),
        "reverse": (q, p),
        "skewed": (p, skew * p + (1 - skew) * q),
    }[kind]
    return temperature**2 * (first * torch.log(first / second)).sum(-1)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_soft_loss_and_its_gradient_match_the_definition(kind):
    z_s, z_t = tensors((5, 7), (5, 7))
    ours, plain = soft_loss(z_s, z_t, 3.0, kind), plain_divergence(kind, z_s, z_t, 3.0)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), z_s), torch.autograd.grad(plain.sum(), z_s)
    )
    assert torch.autograd.gradcheck(lambda z: soft_loss(z, z_t.detach(), 3.0, kind), z_s)


def test_t_squared_keeps_the_loss_finite_as_temperature_grows():
    """Hinton et al.: for T -> infinity, mean-free logits are matched, 1/(2V) ||z_s - z_t||^2."""
    z_s, z_t = (z - z.mean(-1, keepdim=True) for z in tensors((6, 9), (6, 9)))
    limit = (z_s - z_t).square().sum(-1) / (2 * 9)
    for temperature in (1e2, 1e3, 1e4):
        error = (soft_loss(z_s, z_t, temperature) - limit).abs().max()
        assert error < 10 / temperature
    assert soft_loss(z_s, z_t, 1e4).min() > 1e-3


def test_mean_of_probabilities_of_several_teachers():
    first, second = tensors((4, 6), (4, 6))
    expected = (F.softmax(first / 2, -1) + F.softmax(second / 2, -1)) / 2
    torch.testing.assert_close(soft_targets([first, second], 2.0).exp(), expected)


def test_feature_losses_have_right_gradients_and_scale():
    s, t = tensors((2, 4, 3), (2, 4, 3))
    wide = tensors((2, 4, 5))[0]
    for loss, other in ((feature_mse, t), (feature_cosine, t), (relational_loss, wide)):
        assert torch.autograd.gradcheck(
            lambda x, loss=loss, other=other: loss(x, other.detach()), s
        )
    assert feature_mse(torch.zeros_like(t), t).item() == pytest.approx(1)
    assert feature_mse(10 * s, 10 * t).item() == pytest.approx(feature_mse(s, t).item())
    assert feature_cosine(3 * t, t).item() == pytest.approx(0) == relational_loss(3 * t, t).item()


def test_complex_features_compare_real_and_imaginary_parts():
    re, im = tensors((2, 3), (2, 3))
    g = torch.complex(re, im)
    assert as_real(g).shape == (2, 6)
    difference = feature_mse(as_real(g), as_real(g.conj()))
    torch.testing.assert_close(
        difference, 4 * im.square().sum() / (re.square() + im.square()).sum()
    )
    assert feature_cosine(as_real(g), as_real(1j * g)).item() == pytest.approx(1)


# The fused loss


def plain_total(h, weight, bias, targets, soft, temperature, alpha, kind):
    keep = targets != -100
    logits = F.linear(h, weight, bias)
    loss = soft_loss(logits, [F.linear(*t) for t in soft], temperature, kind)[keep].mean()
    return alpha * loss + (1 - alpha) * F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_fused_loss_and_gradients_equal_the_plain_ones(kind, teachers, alpha):
    h, weight, bias = tensors((3, 4, 5), (11, 5), (11,))
    soft = [
        Output(*(t.detach() for t in tensors((3, 4, 7), (11, 7), (11,), seed=i + 1)))
        for i in range(teachers)
    ]
    targets = torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(0))
    targets[1, 2] = -100
    fused = linear_distillation(
        Output(h, weight, bias), targets, soft, temperature=1.7, alpha=alpha, kind=kind, chunk=5
    )
    plain = plain_total(h, weight, bias, targets, soft, 1.7, alpha, kind)
    torch.testing.assert_close(fused.total, plain)
    torch.testing.assert_close(alpha * fused.soft + (1 - alpha) * fused.hard, plain.detach())
    gradients = (torch.autograd.grad(2 * loss, (h, weight, bias)) for loss in (fused.total, plain))
    torch.testing.assert_close(*gradients)


def test_fused_loss_passes_gradcheck_without_bias():
    h, weight = tensors((6, 3), (8, 3))
    soft = [Output(*(t.detach() for t in tensors((6, 2), (8, 2), seed=1)))]
    targets = torch.arange(6)
    assert torch.autograd.gradcheck(
        lambda *s: linear_distillation(Output(*s), targets, soft, chunk=4).total, (h, weight)
    )


def test_fused_loss_is_accurate_for_extreme_logits():
    h, weight = torch.tensor([[100.0, -100.0]], requires_grad=True), torch.eye(2)
    soft = [Output(torch.tensor([[-90.0, 90.0]]), torch.eye(2))]
    loss = linear_distillation(
        Output(h, weight), torch.tensor([1]), soft, temperature=1.0, alpha=0.5
    )
    assert loss.soft.item() == pytest.approx(200) and loss.hard.item() == pytest.approx(200)
    loss.total.backward()
    assert h.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("temperature,alpha", [(1.7, 0.6), (1.0, 1.0)])
def test_fused_sparse_loss_equals_the_plain_one(temperature, alpha):
    h, weight, bias = tensors((6, 5), (11, 5), (11,))
    p = soft_targets(tensors((6, 11), seed=1)[0].detach(), temperature).exp()
    soft, _ = sparse(p, 3, torch.rand(6, 1, dtype=torch.float64))
    targets = torch.arange(6)
    fused = linear_distillation(
        Output(h, weight, bias), targets, soft, temperature=temperature, alpha=alpha, chunk=4
    )
    logits = F.linear(h, weight, bias)
    plain = (
        alpha
        * temperature**2
        * sparse_divergence(F.log_softmax(logits / temperature, -1), *soft).mean()
    )
    plain = plain + (1 - alpha) * F.cross_entropy(logits, targets)
    torch.testing.assert_close(fused.total, plain)
    gradients = (torch.autograd.grad(loss, (h, weight, bias)) for loss in (fused.total, plain))
    torch.testing.assert_close(*gradients)


# Sparse targets


def probabilities(rows, vocabulary, seed=0):
    logits = torch.randn(
        rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (3 * logits).softmax(-1)


def every_start(draws):
    return (torch.arange(draws, dtype=torch.float64)[:, None] + 0.5) / draws


def dense(target, vocabulary):
    return torch.zeros(*target.indices.shape[:-1], vocabulary, dtype=torch.float64).scatter_add_(
        -1, *target_pairs(target)
    )


def target_pairs(target):
    return target.indices, target.log_p.exp()


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_sparse_targets_have_k_distinct_tokens_keep_likely_ones_and_sum_to_one(seed, k):
    p = probabilities(20, 12, seed)
    target, sampled = sparse(
        p, k, torch.rand(20, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    assert all(len(set(row.tolist())) == k for row in target.indices)
    found = target.log_p.exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(20, dtype=torch.float64))
    kept = p.gather(-1, target.indices)
    assert (found >= kept - 1e-12).all()
    tau = found.amin(-1, keepdim=True)
    torch.testing.assert_close(found, torch.maximum(kept, tau))
    assert (p > tau * (1 + 1e-9)).sum() == (kept > tau * (1 + 1e-9)).sum()
    torch.testing.assert_close(sampled, torch.where(p > tau * (1 + 1e-9), 0, p).sum(-1))


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_sparse_targets_are_unbiased(k):
    p, draws = probabilities(1, 12), 40_000
    target, _ = sparse(p.expand(draws, -1), k, every_start(draws))
    torch.testing.assert_close(dense(target, 12).mean(0), p[0], atol=2e-4, rtol=0)


def test_sparse_targets_are_exact_at_full_k_even_where_probabilities_vanish():
    p = torch.cat([probabilities(5, 12), torch.eye(12, dtype=torch.float64)[:2]])
    target, _ = sparse(p, 12, torch.rand(7, 1, dtype=torch.float64))
    torch.testing.assert_close(dense(target, 12), p)
    assert target.log_p.isfinite().all()


def test_sparse_targets_vary_less_than_independent_draws():
    p, draws, k = probabilities(1, 40), 4000, 8
    target, _ = sparse(p.expand(draws, -1), k, every_start(draws))
    ours = dense(target, 40).var(0).sum()
    independent = (p * (1 - p)).sum() / k
    assert ours < 0.5 * independent


def test_mean_gradient_over_sparse_targets_is_the_full_one():
    draws, (h, weight, bias) = 2000, tensors((4, 5), (11, 5), (11,))
    teacher = Output(*(t.detach() for t in tensors((4, 7), (11, 7), (11,), seed=1)))
    targets = torch.arange(4)
    full = linear_distillation(
        Output(h, weight, bias), targets, [teacher], temperature=1.5, alpha=0.8
    ).total
    p = soft_targets(F.linear(*teacher), 1.5).exp()
    soft, _ = sparse(p.repeat(draws, 1), 3, every_start(draws).repeat_interleave(4, 0))
    many = Output(h.repeat(draws, 1), weight, bias)
    mean = linear_distillation(many, targets.repeat(draws), soft, temperature=1.5, alpha=0.8).total
    gradients = (torch.autograd.grad(loss, (h, weight, bias)) for loss in (mean, full))
    torch.testing.assert_close(*gradients, atol=2e-3, rtol=0)


# Features and hooks


@pytest.mark.parametrize(
    "student,teacher,expected",
    [(2, 4, (1, 3)), (4, 4, (0, 1, 2, 3)), (1, 4, (3,)), (3, 4, (1, 2, 3)), (4, 2, (0, 0, 1, 1))],
)
def test_layer_mapping_is_even_and_ends_at_the_last_layer(student, teacher, expected):
    assert layer_mapping(student, teacher) == expected


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_leave_even_when_the_pass_fails(student):
    with pytest.raises(RuntimeError, match="inside"), capture(student, ["layers.0", "layers.1"]):
        assert hooks(student) == 2
        raise RuntimeError("inside")
    assert hooks(student) == 0


def test_bk_features_are_found_and_projected(teacher, student, loader):
    trainer = DistillationTrainer(teacher, student)
    trainer.prepare(loader)
    assert trainer.features.pairs == feature_pairs(student, teacher)
    assert trainer.features.pairs[0] == ("layers.0.mixer.quantize_g", "layers.1.mixer.quantize_g")
    assert [tuple(p.shape) for p in trainer.parameters()] == [(), (16, 8), (16, 8)]


def test_features_that_match_cost_nothing(teacher, loader):
    batch = next(iter(loader))
    trainer = DistillationTrainer(teacher, teacher, alpha=1.0, features=[("layers.1", "layers.1")])
    trainer(teacher, batch)
    assert (
        trainer.parts["soft"].item() == pytest.approx(0, abs=1e-5)
        and trainer.parts["features"] == 0
    )


def test_hidden_states_of_different_models_by_name(teacher, loader):
    student = LSTMLM(LSTMLMConfig(VOCABULARY, d_model=8, hidden=12))
    trainer = DistillationTrainer(
        teacher, student, features=[("norm", "norm")], feature_loss="cosine"
    )
    trainer.prepare(loader)
    trainer(student, next(iter(loader))).backward()
    assert trainer.features.projections[0].weight.grad.abs().sum() > 0


# The trainer


def test_training_leaves_no_hooks_no_memory_and_the_teacher_as_it_was(teacher, student, loader):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = DistillationTrainer(teacher, student)
    result = trainer.fit(loader, TrainConfig(steps=30, lr=1e-2), log=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert hooks(teacher) == hooks(student) == 0 and not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(value.requires_grad for value in trainer.parts.values())
    tracked = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert tracked() is None


def test_tensors_alive_do_not_grow_with_the_steps(teacher, student, loader):
    trainer, batch = DistillationTrainer(teacher, student), next(iter(loader))
    trainer.prepare(loader)
    counts = []
    for _ in range(4):
        trainer(student, batch).backward()
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[1] == counts[2] == counts[3]


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_no_full_logit_tensor_is_ever_made(monkeypatch):
    monkeypatch.setattr(losses, "FUNCTION_BLOCK", 2**11)
    config = ResNetBKConfig(3000, d_model=8, layers=1, channels=4, d_ff=8)
    teacher, student = ResNetBK(config).eval(), ResNetBK(config)
    tokens = torch.zeros(8, 64, dtype=torch.int64)
    trainer = DistillationTrainer([teacher, teacher], student)
    with LargestTensor() as largest:
        trainer(student, (tokens, tokens)).backward()
    assert largest.elements <= 5 * 16 * 3000 < 0.2 * tokens.numel() * 3000


def test_bfloat16_training(teacher, student, loader):
    config = TrainConfig(steps=20, lr=1e-2, precision="bfloat16")
    result = DistillationTrainer(teacher, student).fit(loader, config, log=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_alpha_zero_is_training_on_labels(teacher, student, loader):
    from kit.training.losses import next_token_loss

    batch = next(iter(loader))
    ours = DistillationTrainer(teacher, student, alpha=0.0, feature_weight=0)(student, batch)
    torch.testing.assert_close(ours, next_token_loss(student, batch))


def test_language_models_and_plain_logits_give_the_same_loss(teacher, student, loader):
    class Plain(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens)

    batch = next(iter(loader))
    wrapped = Plain(student)
    fused = DistillationTrainer(teacher, student, feature_weight=0)(student, batch)
    plain = DistillationTrainer(teacher, wrapped, feature_weight=0)(wrapped, batch)
    torch.testing.assert_close(fused - 0.01 * student.auxiliary_loss(), plain, atol=2e-4, rtol=1e-4)


def test_schedules_move_and_resume_exactly(teacher, loader, tmp_path):
    def run(steps_before_kill=None):
        torch.manual_seed(1)
        model = ResNetBK(
            ResNetBKConfig(VOCABULARY, d_model=8, layers=2, experts=2, d_ff=16, channels=4)
        )
        seen = []
        trainer = DistillationTrainer(
            teacher, model, LinearSchedule(4.0, 1.0), LinearSchedule(1.0, 0.0)
        )
        spy = [lambda step, *_: seen.append(step) or _stop(step == steps_before_kill)]
        config = TrainConfig(steps=8, eval_every=2)
        trainer.fit(loader, config, hooks=spy, checkpoint=tmp_path / "run.ckpt", log=False)
        return model.state_dict(), trainer.progress.item()

    def _stop(now):
        if now:
            raise KeyboardInterrupt

    straight, progress = run()
    assert progress == 1
    (tmp_path / "run.ckpt").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(steps_before_kill=5)
    resumed, _ = run()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_student_under_masks_and_quantizers_learns(teacher, student, loader):
    set_mask(student.layers[0].moe, "w_in", torch.rand(2, 16, 8) > 0.5)
    quantize_weights(student, Format(4))
    result = DistillationTrainer(teacher, student).fit(
        loader, TrainConfig(steps=20, lr=1e-2), log=False
    )
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert len(student.head.weight[0].unique()) <= 16


def test_several_teachers_and_a_tied_student(teacher, loader):
    torch.manual_seed(3)
    second = LSTMLM(LSTMLMConfig(VOCABULARY, d_model=8, hidden=8)).eval()
    student = ResNetBK(ResNetBKConfig(VOCABULARY, d_model=8, layers=1, channels=4, tied=True))
    trainer = DistillationTrainer([teacher, second], student, alpha=1.0, feature_weight=0)
    inputs, targets = next(iter(loader))
    trainer(student, (inputs, targets))
    with torch.no_grad():
        expected = soft_loss(student(inputs), [teacher(inputs), second(inputs)], 2.0).mean()
    torch.testing.assert_close(trainer.parts["soft"], expected, atol=1e-5, rtol=1e-4)


def test_classifiers(tmp_path):
    torch.manual_seed(0)
    images, labels = torch.rand(40, 1, 8, 8), torch.randint(0, 10, (40,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=10)
    cnn, mlp = DigitsCNN().eval(), DigitsMLP()
    result = DistillationTrainer(cnn, mlp).fit(loader, TrainConfig(steps=40), log=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    cache = build_cache(cnn, loader, tmp_path / "cache", k=10)
    batch = next(iter(cache.wrap(loader)))
    full = DistillationTrainer(cnn, mlp)(mlp, (*batch.args, batch.targets))
    torch.testing.assert_close(
        DistillationTrainer(cache, mlp)(mlp, batch), full, atol=1e-3, rtol=1e-3
    )


# The cache


def test_cache_at_full_k_equals_the_teacher(teacher, student, loader, tmp_path):
    cache = build_cache(teacher, loader, tmp_path / "cache", k=VOCABULARY)
    assert cache.sampled < 0.02 and cache.rounding < 1e-3
    batch = next(iter(cache.wrap(loader)))
    full = DistillationTrainer(teacher, student, feature_weight=0)
    cached = DistillationTrainer(cache, student)
    full(student, (*batch.args, batch.targets)), cached(student, batch)
    torch.testing.assert_close(cached.parts["soft"], full.parts["soft"], atol=1e-4, rtol=1e-3)


def test_cache_keeps_order_bytes_and_likely_tokens(teacher, loader, tmp_path):
    cache = build_cache([teacher, teacher], loader, tmp_path / "cache", k=5, temperature=1.0)
    tokens = 12 * 10
    assert tokens * 4 * 5 < cache.nbytes < tokens * 4 * 5 + 1000
    torch.manual_seed(7)
    plain = list(loader)
    torch.manual_seed(7)
    wrapped = list(TeacherCache(tmp_path / "cache").wrap(loader))
    for (inputs, targets), batch in zip(plain, wrapped, strict=True):
        assert torch.equal(inputs, batch.args[0]) and torch.equal(targets, batch.targets)
        with torch.no_grad():
            p = F.softmax(teacher(inputs), -1).gather(-1, batch.soft.indices)
        found = batch.soft.log_p.exp()
        torch.testing.assert_close(
            found, torch.maximum(p, found.amin(-1, keepdim=True)), atol=2e-3, rtol=2e-3
        )
        torch.testing.assert_close(found.sum(-1), torch.ones(inputs.shape))


def test_a_cache_has_the_same_bytes_each_time_and_others_with_another_seed(
    teacher, loader, tmp_path
):
    first, again, other = (
        build_cache(teacher, loader, tmp_path / str(i), k=5, seed=seed).arrays["indices"].tobytes()
        for i, seed in enumerate((3, 3, 4))
    )
    assert first == again != other


def test_of_several_that_build_the_same_at_once_one_does(teacher, loader, tmp_path, monkeypatch):
    fill, changed, every = caches._fill, caches._changed, threading.Event()
    begun, looks, found = [], [], []

    def slow(*args):
        begun.append(args)
        every.wait(20)
        return fill(*args)

    def looked(path):
        looks.append(path)
        if len(looks) == 4:  # three before the lock, and one behind it
            every.set()
        return changed(path)

    monkeypatch.setattr(caches, "_fill", slow)
    monkeypatch.setattr(caches, "_changed", looked)
    work = lambda: found.append(build_cache(teacher, loader, tmp_path / "cache", k=5))
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1 and len(found) == 3
    build_cache(teacher, loader, tmp_path / "cache", k=5)  # which has nobody to wait for
    assert len(begun) == 2


def test_training_on_cached_targets(teacher, student, loader, tmp_path):
    cache = build_cache(teacher, loader, tmp_path / "cache", k=5)
    result = DistillationTrainer(cache, student).fit(
        cache.wrap(loader), TrainConfig(steps=20, lr=1e-2), log=False
    )
    assert result.tokens == 20 * 40 and result.history[-1]["loss"] < result.history[0]["loss"]


def test_damaged_missing_and_foreign_caches(teacher, student, loader, tmp_path):
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        TeacherCache(tmp_path / "none")
    cache = build_cache(teacher, loader, tmp_path / "cache", k=5)
    other = DataLoader(
        TensorDataset(torch.zeros(12, 10).long(), torch.zeros(12, 10).long()), batch_size=4
    )
    with pytest.raises(ValueError, match="another dataset"):
        cache.wrap(other)
    with pytest.raises(ValueError, match="no cached targets"):
        DistillationTrainer(cache, student)(student, next(iter(loader)))
    with pytest.raises(ValueError, match="cached targets were made at 2.0"):
        DistillationTrainer(cache, student, temperature=1.0)
    with pytest.raises(ValueError, match="forward divergence only"):
        DistillationTrainer(cache, student, kind="reverse")(student, next(iter(cache.wrap(loader))))
    file = tmp_path / "cache" / "log_p.npy"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        TeacherCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="k is 51"):
        build_cache(teacher, loader, tmp_path / "again", k=51)


# Memory


def test_added_memory_is_that_of_the_work_alone_and_errors_are_named():
    added = added_memory(
        "import torch; early = torch.ones(50_000_000)", "late = torch.ones(25_000_000)"
    )
    assert 95e6 < added < 115e6
    with pytest.raises(RuntimeError, match="NameError: name 'absent'"):
        added_memory("", "absent")


# Bad input


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": LinearSchedule(0, 1)}, "temperature is 0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": -1}, "alpha is -1"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"feature_weight": -1}, "feature_weight is -1"),
        ({"features": [("layers.0", "layers.9")]}, "'layers.9'"),
        ({"features": [("mixer", "layers.0")]}, "'mixer'"),
        ({"feature_loss": "l1"}, "'l1'"),
        ({"kind": "jensen"}, "'jensen'"),
    ],
)
def test_bad_settings_name_the_value(teacher, student, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        DistillationTrainer(teacher, student, **settings)
    assert "\n" not in str(error.value)


def test_bad_teachers(teacher, student, loader):
    small = ResNetBK(ResNetBKConfig(30, d_model=8, layers=1, channels=4)).eval()
    with pytest.raises(ValueError, match="50 classes, the teacher 30"):
        DistillationTrainer(small, student)
    with pytest.raises(ValueError, match="no teacher"):
        DistillationTrainer([], student)
    trainer = DistillationTrainer(teacher.train(), student)
    with pytest.raises(ValueError, match="training mode"):
        trainer(student, next(iter(loader)))
    with pytest.raises(ValueError, match="training mode"):
        build_cache(teacher, loader, "unused")
    images = torch.rand(3, 1, 8, 8)
    few = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    with pytest.raises(ValueError, match="10 classes, the teacher 4"):
        DistillationTrainer(few, mlp := DigitsMLP())(mlp, (images, torch.arange(3)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_batch_without_targets_that_count_teaches_nothing(teacher, student, alpha):
    none = torch.full((1, 4), -100)
    trainer = DistillationTrainer(teacher, student, alpha=alpha, feature_weight=0)
    loss = trainer(student, [torch.zeros(1, 4).long(), none])
    loss.backward()  # the experts' balance is left
    assert loss.isfinite() and trainer.parts["soft"] == trainer.parts["hard"] == 0
    mlp, images = DigitsMLP(), torch.rand(3, 1, 8, 8)
    loss = DistillationTrainer(DigitsMLP().eval(), mlp, alpha=alpha)(mlp, (images, none[0, :3]))
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in mlp.parameters())


def masked(logits, at=3):
    return logits.masked_fill(torch.arange(logits.shape[-1]) == at, -torch.inf)


@pytest.mark.parametrize("kind", ["forward", "reverse", "skewed"])
@pytest.mark.parametrize("both", [False, True])
def test_a_class_at_minus_infinity(kind, both):
    student, teacher = torch.randn(5, 7, requires_grad=True), masked(torch.randn(5, 7))
    loss = soft_loss(masked(student) if both else student, teacher, 2.0, kind)
    if kind == "reverse" and not both:  # the student finds possible what the teacher excludes
        assert (loss == torch.inf).all()
        return
    loss.sum().backward()
    rest = [i for i in range(7) if i != 3]
    alone, others = student.detach().double().requires_grad_(), teacher[:, rest].double()
    if both:
        expected = soft_loss(alone[:, rest], others, 2.0, kind)
    else:  # by definition: the teacher's sum runs over what it allows
        q, p = (alone / 2).softmax(-1)[:, rest], (others / 2).softmax(-1)
        mixed = 0.1 * p + 0.9 * q if kind == "skewed" else q
        expected = 4 * (p * (p / mixed).log()).sum(-1)
    expected.sum().backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), alone.grad, rtol=1e-5, atol=1e-6)


def test_labels_of_every_kind_are_distilled():
    torch.manual_seed(0)
    teacher, student = nn.Linear(8, 7).eval(), nn.Linear(8, 7)
    x, labels = torch.randn(6, 8), torch.randint(0, 7, (6,))
    trainer = DistillationTrainer(teacher, student, 2.0, 0.5, 0.0)
    expected = trainer(student, (x, labels))
    for same in (labels.int(), labels.byte(), F.one_hot(labels, 7).float()):
        torch.testing.assert_close(trainer(student, (x, same)), expected)
    soft = torch.rand(6, 7).softmax(-1)
    hard = DistillationTrainer(teacher, student, 2.0, 0.0, 0.0)(student, (x, soft))
    torch.testing.assert_close(hard, F.cross_entropy(student(x), soft))
    with pytest.raises(ValueError, match="a loss of your own"):
        trainer(student, (x, torch.randn(6, 1)))
    maps, pixels = nn.Conv2d(1, 4, 3, padding=1), torch.randint(0, 4, (2, 6, 6))
    images = torch.randn(2, 1, 6, 6)
    hard = DistillationTrainer(copy.deepcopy(maps).eval(), maps, 1.0, 0.0)(maps, (images, pixels))
    torch.testing.assert_close(hard, F.cross_entropy(maps(images), pixels))


def test_a_sample_of_the_whole_vocabulary_changes_nothing(teacher, student):
    batch = torch.randint(0, VOCABULARY, (2, 8)), torch.randint(0, VOCABULARY, (2, 8))
    settings = {"temperature": 1.0, "alpha": 0.6, "feature_weight": 0.0}
    whole = DistillationTrainer(teacher, student, **settings)(student, batch)
    sampled = DistillationTrainer(
        teacher, student, **settings, sample=VocabularySample(frequent=VOCABULARY)
    )(student, batch)
    torch.testing.assert_close(sampled, whole)
    with pytest.raises(ValueError, match="temperature 1"):
        DistillationTrainer(teacher, student, temperature=2.0, sample=VocabularySample())


# What is registered, and other models' calls


def test_a_registered_divergence_is_chunked_and_correct(teacher, student, loader, monkeypatch):
    monkeypatch.setattr(losses, "FUNCTION_BLOCK", 4 * 16 * VOCABULARY)

    @register_divergence("total variation, squared")
    def variation(log_q, log_p):
        return (log_q.exp() - log_p.exp()).square().sum(-1)

    inputs, targets = next(iter(loader))
    trainer = DistillationTrainer(teacher, student, 1.0, 1.0, 0.0, kind="total variation, squared")
    loss = trainer(student, (inputs, targets)) - 0.01 * student.auxiliary_loss()
    with torch.no_grad():
        p = teacher(inputs).softmax(-1)
    expected = (student(inputs).softmax(-1) - p).square().sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    weight = student.head.weight
    torch.testing.assert_close(
        *(torch.autograd.grad(x, weight, retain_graph=True) for x in (loss, expected))
    )
    assert DIVERGENCES.pop("total variation, squared") is variation


def test_a_registered_feature_loss_is_used_by_name(teacher, student, loader):
    @register_feature_loss("largest")
    def largest(student, teacher):
        return (student - teacher).abs().max()

    settings = {"features": [("layers.0", "layers.0")], "feature_loss": "largest"}
    trainer = DistillationTrainer(teacher, student, **settings)
    trainer.prepare(loader)
    trainer(student, next(iter(loader))).backward()
    assert FEATURE_LOSSES.pop("largest") is largest and trainer.parts["features"] > 0
    assert trainer.features.projections[0].weight.shape == (16, 8)


def test_features_come_from_the_first_of_several_teachers(teacher, student, loader):
    second = LSTMLM(LSTMLMConfig(VOCABULARY, d_model=8, hidden=8)).eval()
    trainer = DistillationTrainer([teacher, second], student)
    trainer.prepare(loader)
    batch = next(iter(loader))
    trainer(student, batch)
    alone = DistillationTrainer(teacher, student)
    alone(student, batch)
    assert trainer.parts["features"] == alone.parts["features"] > 0


class Tagger(nn.Module):
    """Layers that happen to be called as a language model's methods, a second input, a tuple as
    output."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.hidden, self.output = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x, scale):
        return self.output(self.hidden(x * scale).relu()), x


def test_any_batch_and_any_output(tmp_path):
    x, scale, labels = torch.randn(12, 4, 3), torch.rand(12, 4, 1), torch.randint(5, (12, 4))
    data = TensorDataset(x, scale, labels)
    as_dict = [dict(zip(("x", "scale", "labels"), row)) for row in data]
    teacher, student, found = Tagger(0).eval(), Tagger(1), []
    for name, dataset in {"tuple": data, "dict": as_dict}.items():
        loader = DataLoader(dataset, 6)
        cache = build_cache(teacher, loader, tmp_path / name, k=5)
        for source, batch in (
            (teacher, next(iter(loader))),
            (cache, next(iter(cache.wrap(loader)))),
        ):
            found.append(DistillationTrainer(source, student)(student, batch))
        result = DistillationTrainer(cache, student).fit(
            cache.wrap(loader), TrainConfig(steps=2, lr=1e-9), log=False
        )
        assert result.tokens == 2 * 24
    plain = plain_divergence(
        "forward", student(x[:6], scale[:6])[0], teacher(x[:6], scale[:6])[0], 2.0
    ).mean()
    plain = 0.7 * plain + 0.3 * F.cross_entropy(
        student(x[:6], scale[:6])[0].flatten(0, 1), labels[:6].flatten()
    )
    torch.testing.assert_close(torch.stack(found), plain.expand(4), atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="holds no targets"):
        DistillationTrainer(teacher, student)(student, {"x": x, "scale": scale})


def test_a_cache_serves_any_batch_size_and_sampler(teacher, loader, tmp_path):
    cache = build_cache(teacher, loader, tmp_path / "cache", k=5)
    order = [3, 1, 7]
    other = DataLoader(loader.dataset, batch_size=2, sampler=order)
    batches = list(cache.wrap(other))
    assert [len(batch.targets) for batch in batches] == [2, 1]
    assert torch.equal(torch.cat([b.targets for b in batches]), loader.dataset.tensors[1][order])
    assert torch.equal(torch.cat([b.soft.indices for b in batches]), cache[order].indices)
    pairs = DataLoader(loader.dataset, batch_sampler=[[3, 1], [7, 2]])  # has no batch size
    again = build_cache(teacher, pairs, tmp_path / "again", k=5)
    assert again.inputs == cache.inputs and torch.equal(again[order].indices, cache[order].indices)
