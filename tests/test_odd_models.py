"""Models as people have them: half trained, frozen, cast, with one output, with numbers and
branches of their own. What comes of them is right, or refused and nothing is lost."""

import copy
import threading

import onnxruntime
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kit import (
    CompressionPipeline,
    ProductionModelOptimizer,
    QuantizedModel,
    SampledLoss,
    artifact,
    quick_optimize,
    quick_quantize,
    round_to_budget,
)
from kit.core.calibration import gradients
from kit.core.measurement import relative_error
from kit.core.protocols import call_with
from kit.core.weights import materialize, weights
from kit.distillation import build_cache
from kit.distillation.cache import TeacherCache
from kit.engines import build_engine
from kit.engines.export import export_graph
from kit.engines.runtime import OnnxEngine
from kit.hub import from_pretrained, save_pretrained
from kit.models import build_model
from kit.pruning import MagnitudePruner, prune_channels
from kit.quantization import FakeQuantize, Format, original_mix, pack_layers, quantize_weights
from kit.training import TrainConfig, train
from kit.training.evaluation import Evaluation, evaluate
from kit.training.losses import classification_loss


def mlp(outputs=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, outputs))


def inputs(count=12, *shape):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, *shape or (32,), generator=generator) for _ in range(count)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def rounded_bytes(model, ratio=4):
    return artifact.float32_bytes(model) // ratio


# Rounding


class Tagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        y = self.inner(x)
        return {"tags": y.argmax(-1), "logits": y}


@pytest.mark.parametrize(
    "model, said",
    [
        (mlp(1), r"shape \(8, 1\), holds no logits: choose 'features'"),
        (nn.Sequential(mlp(1), nn.Flatten(0)), r"shape \(8,\), holds no logits"),
        (Tagged(), "torch.int64 of shape .* a model that gives floats first"),
        (mlp().to("meta"), "0.bias is on the meta device"),
        (nn.ReLU(), "no gradient in the parameters of this ReLU"),
    ],
)
def test_what_has_no_logits_is_refused_and_stays_as_it_was(model, said):
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=said):
        round_to_budget(model, inputs(), 3000)
    assert [p.shape for p in model.parameters()] == [p.shape for p in before.parameters()]
    if not any(p.is_meta for p in model.parameters()):
        assert unchanged(model, state(before))


def test_a_loss_without_any_gradient_is_refused():
    with pytest.raises(ValueError, match="no gradient but zero"):
        round_to_budget(mlp(), inputs(), 3000, lambda model, batch: 0 * model(batch).sum())


def test_one_output_is_rounded_by_its_features():
    model = mlp(1)
    x, dense = torch.cat(inputs(40)), copy.deepcopy(model)
    round_to_budget(model, inputs(), rounded_bytes(model), SampledLoss("features"))
    with torch.no_grad():
        wanted, found = dense(x), model(x)
    assert (found - wanted).square().mean() < 0.01 * wanted.var()


def test_modes_and_frozen_parameters_change_nothing_about_rounding():
    def made(training, frozen):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(48), nn.Dropout(), nn.Linear(48, 8))
        with torch.no_grad():
            for x in inputs(20):
                model(x)
        model.train(training).requires_grad_(not frozen)
        before = model[1].running_var.clone()
        round_to_budget(model, inputs(), rounded_bytes(model, 3))
        assert torch.equal(model[1].running_var, before) and model[2].training == training
        assert all(p.requires_grad != frozen for p in model.parameters() if p.ndim > 1)
        return model.eval()(torch.cat(inputs()))

    wanted = made(False, False)
    for training, frozen in ((True, False), (False, True), (True, True)):
        assert torch.equal(made(training, frozen), wanted)


def test_gradients_of_sparse_embeddings_are_those_of_dense_ones():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 8, sparse=sparse), nn.Linear(8, 6))
        tokens = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(0))
        found += gradients(model, [tokens], lambda model, x: model(x).square().sum())
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name]) for name in found[0])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = mlp(), nn.Parameter(torch.tensor([1e5]))

    def forward(self, x):
        return self.inner(x) * self.scale / 1e5


def test_values_beyond_half_precision_stay_in_floats():
    model = Scaled()
    round_to_budget(model, inputs(), rounded_bytes(model))
    assert model.scale.item() == 1e5 and weights(model, "inner.0.weight")[0].find(FakeQuantize)
    layer = nn.Linear(4, 4)
    layer.bias.data[0] = 7e4
    before = state(layer)
    with pytest.raises(ValueError, match="bias holds 7e.04, beyond half precision"):
        quantize_weights(layer, original_mix(layer))
    with pytest.raises(ValueError, match="beyond half precision"):
        quantize_weights(layer, {"bias": Format(16), "weight": Format(8)})
    assert unchanged(layer, before)


def test_what_fails_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = mlp()
    before = state(model)
    monkeypatch.setattr(artifact, "nbytes", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        round_to_budget(model, inputs(), 3000)
    assert unchanged(model, before)


def test_nan_is_refused_and_not_masked():
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = torch.nan
    for act in (
        lambda p: p.prune_below(0.0),
        lambda p: p.prune(0.5),
        lambda p: p.prune_pattern(2, 4),
    ):
        with pytest.raises(ValueError, match="weight holds 1 NaN"):
            act(MagnitudePruner(layer))


def test_one_label_a_row_is_no_distribution_over_the_batch():
    with pytest.raises(ValueError, match=r"for logits \(4,\)"):
        evaluate(nn.Flatten(0), [(torch.randn(4, 1), torch.tensor([0, 1, 0, 0]))])


# Casts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", ["float32", "float16", "log8"])
@pytest.mark.parametrize("bits", [6, 8, 12])
def test_a_cast_model_is_read_back_as_it_was_saved(dtype, scale, bits, tmp_path):
    model = quantize_weights(mlp(), Format(bits, scale=scale, range="mse")).to(dtype).eval()
    x = inputs(1)[0].to(dtype)
    artifact.save(model, tmp_path / "model.kit")
    for options in ({}, {"packed": True}, {"trainable": True}):
        loaded = artifact.load(tmp_path / "model.kit", mlp().to(dtype), **options).eval()
        assert torch.equal(loaded(x), model(x)), options


def test_rounded_models_survive_casts_to_the_last_bit(tmp_path):
    model = mlp()
    round_to_budget(model, inputs(), rounded_bytes(model))
    for dtype in (torch.bfloat16, torch.float16):
        cast, x = copy.deepcopy(model).to(dtype), inputs(1)[0].to(dtype)
        artifact.save(cast, tmp_path / "model.kit")
        assert torch.equal(artifact.load(tmp_path / "model.kit", mlp().to(dtype))(x), cast(x))


def test_a_state_dict_brings_the_factors_of_columns():
    models = []
    for seed in (0, 5):
        model = mlp()
        with torch.no_grad():
            model[0].weight *= torch.rand(32, generator=torch.Generator().manual_seed(seed)) + 0.1
        models.append(round_to_budget(model, inputs(), rounded_bytes(model)))
    first, second = models
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(inputs(1)[0]), second(inputs(1)[0]))


class Aliased(nn.Module):
    """With buffers that are views: of its weight, and of fewer values than they have entries."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("flat", self.weight.data.view(-1))
        self.register_buffer("wide", torch.randn(16).expand(3, 16))

    def forward(self, x):
        return x @ self.weight + self.wide.sum(0) + self.flat[:16]


def test_buffers_that_are_views_come_back_to_the_last_bit(tmp_path):
    model, x = quantize_weights(Aliased(), Format(2)).eval(), torch.randn(2, 16)
    artifact.save(model, tmp_path / "model.kit")
    for options in ({}, {"trainable": True}):
        loaded = artifact.load(tmp_path / "model.kit", Aliased(), **options)
        assert torch.equal(loaded(x), model(x)), options


def test_the_uncompressed_size_counts_doubles_as_floats():
    size = artifact.float32_bytes(mlp())
    assert artifact.float32_bytes(mlp().double()) == size > artifact.float32_bytes(mlp().half())


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_copied_after_a_cast(kind):
    model, x = quantize_weights(kind(8, 8), Format(8)), torch.randn(3, 2, 8)
    cast = model.double().float()
    assert torch.equal(copy.deepcopy(cast)(x)[0], cast(x)[0])


def test_folders_of_transformers_keep_their_dtype(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    quantize_weights(model, Format(8))
    save_pretrained(model, tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_quantized_models_in_other_dtypes_are_copied_saved_and_called(tmp_path):
    model = quick_quantize(nn.Sequential(nn.Linear(8, 8)), backend="float32")
    wanted = model(torch.ones(2, 8))
    for dtype in (torch.float16, torch.bfloat16):
        model.to(dtype)
        assert model(torch.ones(2, 8, dtype=dtype)).dtype == dtype
        model.save(tmp_path / "model.kit")
        again = QuantizedModel.load(tmp_path / "model.kit", nn.Sequential(nn.Linear(8, 8)))
        assert torch.equal(again(torch.ones(2, 8)), wanted)
    recurrent = quick_quantize(nn.GRU(8, 8), backend="float32")
    x = torch.randn(3, 2, 8)
    assert torch.equal(copy.deepcopy(recurrent)(x)[0], recurrent(x)[0])
    with pytest.raises(ValueError, match="on the meta device"):
        quick_quantize(mlp().to("meta"))
    with pytest.raises(ValueError, match="no values on the meta device"):
        artifact.save(mlp().to("meta"), tmp_path / "meta.kit")


# Graphs


class Branching(nn.Module):
    """Of a condition on the sizes of its input: what it does where that holds."""

    def __init__(self, holds, then):
        super().__init__()
        self.layer, self.holds, self.then = nn.Linear(4, 4), holds, then

    def forward(self, x):
        return self.layer(self.then(x) if self.holds(*x.shape) else x)


@pytest.mark.parametrize(
    "holds, then",
    [
        (lambda b, t, d: t > 24, lambda x: x[:, -24:]),
        (lambda b, t, d: t > 24, lambda x: 2 * x),
        (lambda b, t, d: t < 8, lambda x: 2 * x),
        (lambda b, t, d: b > 8, lambda x: 2 * x),
        (lambda b, t, d: t % 4 == 0, lambda x: 2 * x),
    ],
)
def test_a_graph_is_right_at_every_size_that_it_takes(holds, then):
    torch.manual_seed(0)
    model, x = Branching(holds, then).eval(), torch.randn(4, 12, 4)
    engine = OnnxEngine(export_graph(model, call_with(x)).SerializeToString())
    taken = 0
    for shape in ((4, 12), (4, 24), (1, 12), (4, 7), (9, 12), (16, 12), (4, 13), (4, 40), (20, 60)):
        x = torch.randn(*shape, 4)
        try:
            found = engine(x)
        except Exception:  # a size that the graph refuses
            continue
        taken += 1
        with torch.no_grad():
            assert relative_error(found, model(x)) < 1e-9, shape
    assert taken


class Peak(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("peak", torch.ones(1))

    def forward(self, x):
        self.peak = torch.maximum(self.peak, x.abs().max())
        return self.layer(x / self.peak)


def test_a_model_that_changes_its_buffers_has_no_graph():
    with pytest.raises(ValueError, match="each call changes its buffer peak"):
        export_graph(Peak().eval(), call_with(torch.randn(2, 4)))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.layer(x), "count": [len(x)]}


def test_numbers_in_an_output_have_no_graph():
    with pytest.raises(ValueError, match="numbers as tensors"):
        build_engine(Counting().eval(), "onnx-float32", torch.randn(2, 4))


class Portrait(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, (1, 3), padding=(0, 1))

    def forward(self, x):
        x = x.transpose(2, 3) if x.shape[2] > x.shape[3] else x
        return self.layer(x).relu().mean((2, 3))


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)

    def forward(self, x, memory):
        scores = self.query(x) @ memory.transpose(1, 2)
        if x.shape[1] == memory.shape[1]:
            later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -1e9)
        return scores.softmax(-1) @ memory


class Alike(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, memory):
        y, more = self.layer(x), memory.mean(1, keepdim=True)
        return y + more if x.shape[1] == memory.shape[1] else y


class When(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.layer, self.rule = nn.Linear(8, 8), rule

    def forward(self, x):
        y = self.layer(x)
        return y.relu() if self.rule(*x.shape[:2]) else y


RELATIONS = [
    (Portrait(), [(2, 1, 8, 12)], [(3, 1, 20, 8)]),
    (Attend(), [(2, 6, 8), (2, 9, 8)], [(3, 4, 8), (3, 4, 8)]),
    (Alike(), [(2, 6, 8), (2, 6, 8)], [(3, 4, 8), (3, 7, 8)]),
    (When(lambda rows, length: length % 4 == 0), [(2, 5, 8)], [(2, 8, 8)]),
    (When(lambda rows, length: rows * length > 100), [(2, 5, 8)], [(11, 10, 8)]),
]


@pytest.mark.parametrize("model,first,other", RELATIONS)
def test_graphs_of_models_that_branch_on_sizes_serve_the_branch_that_they_hold(model, first, other):
    engine = build_engine(model.eval(), "onnx-float32", tuple(map(torch.randn, first)))
    inputs = tuple(map(torch.randn, other))
    with pytest.raises(Exception, match="dimension"):
        engine(*inputs)
    longer = tuple(torch.randn(rows, *rest) for (rows, *_), (_, *rest) in zip(other, first))
    if not (isinstance(model, When) and len(longer[0]) > 10):  # where rows decide, they are fixed
        assert relative_error(engine(*longer), model(*longer)) < 1e-9


# Numbers


class Limited(nn.Module):
    """Whose limits happen to equal a width."""

    def __init__(self):
        super().__init__()
        self.longest = self.words = 24
        self.embedding = nn.Embedding(24, 6)
        self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, ids):
        x = self.embedding(ids.clamp(max=self.words - 1)[:, : self.longest])
        return self.second(torch.relu(self.first(x)))


def test_numbers_that_merely_equal_a_width_stay():
    torch.manual_seed(0)
    model = Limited().eval()
    small = prune_channels(model, torch.arange(8)[None], 0.5, layers="first")
    assert (small.longest, small.words, small.first.out_features) == (24, 24, 12)
    rows = {tuple(row) for row in small.first.weight.tolist()}
    gone = [i for i, row in enumerate(model.first.weight.tolist()) if tuple(row) not in rows]
    model.second.weight.data[:, gone] = 0
    ids = torch.arange(24)[None]
    torch.testing.assert_close(small(ids), model(ids))


def test_configs_change_where_weights_do():
    config = transformers.MistralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    small = prune_channels(model, {"input_ids": torch.arange(8)[None]}, 0.5)
    assert (small.config.intermediate_size, small.config.sliding_window) == (32, 64)
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    small = prune_channels(model, {"input_ids": torch.arange(8)[None]}, 0.5)
    told = small.config
    assert (told.hidden_size, told.intermediate_size, told.num_attention_heads) == (32, 24, 2)
    rebuilt = transformers.Qwen2ForCausalLM(told).eval()
    rebuilt.load_state_dict(small.state_dict())
    ids = torch.arange(12)[None]
    torch.testing.assert_close(rebuilt(ids).logits, small(ids).logits)


# Runs


def test_padding_counts_alike_however_a_batch_is_cut():
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    ids = torch.randint(30, (4, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:2, 3:] = -100
    found = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        batches = [{"input_ids": ids, "labels": labels}]
        settings = TrainConfig(1, lr=1e-3, accumulate=accumulate)
        result = train(model, batches, settings, loss=lambda m, x: m(**x).loss, log=False)
        found.append((result.history[-1]["loss"], result.tokens))
    assert found[0] == (pytest.approx(found[1][0], rel=1e-5), found[1][1])
    assert found[0][1] == (labels[:, 1:] != -100).sum()


def test_windows_without_targets_change_no_interval():
    windows = [
        torch.tensor(x, dtype=torch.float64) for x in ([3.0, 4.0, 0.0], [2, 2, 0], [1, 0, 0])
    ]
    nll, tokens, hits = (window.numpy() for window in windows)
    whole = Evaluation(7.0, 4, nll, tokens.astype(int), 1, hits.astype(int))
    part = Evaluation(7.0, 4, nll[:2], tokens[:2].astype(int), 1, hits[:2].astype(int))
    assert whole.interval() == part.interval() and whole.interval()[0] > 0


class Keeping(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.layer, self.state = nn.Linear(2, 2), state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize("kept", [{1: 2.0}, {"shape": (3, 4)}])
def test_extra_state_that_json_would_change_is_refused(kept, tmp_path):
    with pytest.raises(ValueError, match="keep texts as keys, and lists"):
        artifact.save(Keeping(kept), tmp_path / "model.kit")
    artifact.save(Keeping({"shape": [3, 4]}), tmp_path / "model.kit")


def test_folders_of_a_pipeline_belong_to_an_order_of_stages(tmp_path):
    torch.manual_seed(0)
    data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]

    def run(*stages, loader=data):
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        pipeline = CompressionPipeline(model, 2.0, "cpu", stages, log=False)
        return pipeline.run_pipeline(loader, data, 1, 1, 1, save_dir=tmp_path / "run")

    run("qat", "pruning")
    with pytest.raises(ValueError, match="holds a run with another model, other settings"):
        run("pruning", "qat")
    with pytest.raises(ValueError, match="name each but once"):
        run("qat", "pruning", "qat")
    with pytest.raises(ValueError, match="a generator has no length: give a DataLoader"):
        run("qat", "pruning", loader=(batch for batch in data))


def test_a_pipeline_trains_nothing_that_was_frozen(tmp_path):
    model, data = build_model("DigitsMLP", {}), [(torch.rand(8, 1, 8, 8), torch.arange(8))]
    name = next(name for name, _ in model.named_parameters())
    model.get_parameter(name).requires_grad_(False)
    before = model.get_parameter(name).detach().clone()
    pipeline = CompressionPipeline(model, 2.0, "cpu", ("pruning",), lr=0.1, log=False)
    small, _ = pipeline.run_pipeline(data, data, 1, 5, 1, save_dir=tmp_path / "run")
    after = small.get_parameter(name)
    assert torch.equal(after[after != 0], before[after != 0])
    assert any(not torch.equal(a, b) for a, b in zip(small.parameters(), model.parameters()))


# Refused before anything is lost


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 64)

    def forward(self, x):
        mean, spread = self.layer(x).chunk(2, -1)
        return torch.distributions.Normal(mean, spread.exp())


def test_outputs_without_tensors_are_not_called_equal():
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="a Normal from Mixture holds no tensor to be compared"):
        quick_optimize(Mixture(), x, use_quantization=False)
    with pytest.raises(ValueError, match="a Normal holds no tensor: give a model that returns"):
        round_to_budget(Mixture(), [x], 5000)
    with pytest.raises(ValueError, match="outputs are not finite: look for NaN in the inputs"):
        round_to_budget(mlp(), [x * torch.nan], 5000)
    assert relative_error({}, {}) == float("inf")


def test_a_packed_model_does_not_take_the_place_of_its_file(tmp_path):
    artifact.save(quantize_weights(mlp(), Format(4)), tmp_path / "m.kit")
    whole = (tmp_path / "m.kit").read_bytes()
    packed = artifact.load(tmp_path / "m.kit", mlp(), packed=True)
    with pytest.raises(ValueError, match="a packed model has no steps that a file could hold"):
        artifact.save(packed, tmp_path / "m.kit")
    assert (tmp_path / "m.kit").read_bytes() == whole


def test_a_cache_outlives_a_teacher_that_diverged(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(16, 32), torch.zeros(16).long()), 8)
    build_cache(mlp().eval(), data, tmp_path / "cache", k=2)
    broken = mlp().eval()
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="probabilities are not finite"):
        build_cache(broken, data, tmp_path / "cache", k=2)
    assert len(TeacherCache(tmp_path / "cache")) == 16
    with pytest.raises(ValueError, match="a list has no data set of a known length"):
        build_cache(mlp().eval(), list(data), tmp_path / "other", k=2)


def test_a_folder_belongs_to_its_training_data(tmp_path):
    def run(data):
        pipeline = CompressionPipeline(mlp(3), 2.0, "cpu", ("qat",), log=False)
        return pipeline.run_pipeline(data, data, 1, save_dir=tmp_path)[0]

    labels = torch.arange(8) % 3
    first = [(x, labels) for x in inputs(4)]
    run(first), run(first)
    with pytest.raises(ValueError, match="other settings or data"):
        run([(3 * x, labels) for x in inputs(4)])
    (tmp_path / "qat.kit").unlink()
    assert (run(first), (tmp_path / "qat.kit").exists())[1]
    (tmp_path / "qat.json").write_text("{")
    with pytest.raises(ValueError, match="qat.json is damaged"):
        run(first)


def test_parameters_stand_where_they_stood():
    model, names = mlp(), [name for name, _ in mlp().named_parameters()]
    quantize_weights(model, Format(4))
    assert [name for name, _ in materialize(model).named_parameters()] == names
    for weight in weights(model):
        weight.drop(FakeQuantize)
    assert [name for name, _ in model.named_parameters()] == names
    with pytest.raises(ValueError, match="bytes are too few"):
        round_to_budget(model, inputs(), 20)
    assert [name for name, _ in model.named_parameters()] == names


class Noted(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.layer = nn.Linear(32, 3)
        self.register_buffer("note", buffer)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    "buffer, says",
    [
        (torch.tensor(torch.nan), "'note' holds NaN, which no checkpoint keeps"),
        (torch.eye(2).to_sparse(), "'note' is sparse, which no checkpoint keeps"),
        (torch.zeros(2, dtype=torch.complex32), "'note' is complex32, which no checkpoint keeps"),
    ],
)
def test_what_no_checkpoint_could_give_back_is_told_before_training(buffer, says, tmp_path):
    data, settings = [(x, torch.arange(8) % 3) for x in inputs(3)], {"log": False}
    settings |= {"loss": classification_loss}
    train(Noted(buffer), data, TrainConfig(steps=2), **settings)
    with pytest.raises(ValueError, match=says):
        train(Noted(buffer), data, TrainConfig(steps=2), checkpoint=tmp_path / "c", **settings)
    if buffer.is_sparse:
        with pytest.raises(ValueError, match="buffer 'note' is sparse: make it dense"):
            artifact.save(Noted(buffer), tmp_path / "m.kit")


class Auxiliary(nn.Module):
    """With a head that only training uses."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(32, 48), nn.Linear(48, 40)
        self.head, self.aside = nn.Linear(40, 4), nn.Linear(40, 4)

    def forward(self, x):
        x = self.middle(self.first(x).relu()).relu()
        return self.head(x) + (self.aside(x) if self.training else 0)


def test_what_the_example_does_not_reach_keeps_what_it_may_read():
    small = prune_channels(Auxiliary().eval(), torch.randn(4, 32), 0.5)
    assert small.first.out_features == 24 and small.middle.out_features == 40
    small.train()(torch.randn(4, 32))


def test_models_that_cannot_be_copied_are_told():
    model = mlp()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="this Sequential cannot be copied .*lock"):
        quick_quantize(model)


def test_packed_embeddings_know_their_sizes():
    table = pack_layers(quantize_weights(nn.Sequential(nn.Embedding(50, 32)), Format(8)))[0]
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (50, 32, None)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, ids, kinds=None, mask=None, twice=False):
        x = nn.functional.one_hot(ids, 8).float() + (0 if kinds is None else kinds[..., None])
        return self.layer(x * (1 if mask is None else mask[..., None])) * (1 + twice)


@pytest.mark.parametrize(
    "call",
    [
        {"ids": torch.ones(2, 5).long(), "mask": torch.ones(2, 5), "kinds": torch.zeros(2, 5)},
        {"ids": torch.ones(2, 5).long(), "kinds": None, "mask": torch.zeros(2, 5), "twice": True},
    ],
)
def test_files_name_their_inputs_as_the_call_did(call, tmp_path):
    model = Routed().eval()
    made = ProductionModelOptimizer().export_onnx(model, tmp_path / "m.onnx", call)
    assert made["relative_error"] < 1e-9
    feed = {name: x.numpy() for name, x in call.items() if isinstance(x, torch.Tensor)}
    found = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, feed)[0]
    assert torch.allclose(torch.from_numpy(found), model(**call), atol=1e-6)


def test_engines_of_onnx_hide_no_bad_inputs():
    x = torch.randn(4, 32)
    quantized = quick_quantize(mlp(), x, backend="onnx-int8")
    bad = torch.where(torch.arange(32) == 0, torch.nan, x)
    assert quantized(bad).isnan().all() and quantized(x).isfinite().all()
    table = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8)).eval()
    with pytest.raises(IndexError):
        quick_quantize(table, torch.ones(2, 3).long(), backend="onnx-float32")(-torch.ones(1).int())
