import copy
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import kit
from kit import (
    DistillationConfig,
    ProductionModelOptimizer,
    PruningConfig,
    QuantizationConfig,
    QuantizedModel,
    artifact,
    engines,
    quick_optimize,
    quick_quantize,
)
from kit.core.measurement import relative_error
from kit.core.weights import materialize
from kit.data import load_digits
from kit.engines.choice import INTEGER
from kit.models import build_model, parameter_count
from kit.production import compare_models, example_inputs
from kit.quantization import quantizers
from kit.training import TrainConfig, train
from kit.training.evaluation import evaluate
from kit.training.losses import classification_loss
from tests.test_engines import Steps

FAST = QuantizationConfig(backend="torch-int8")  # a named engine: nothing is exported or measured


def mlp(*widths):
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.training


def same_state(model, before):
    after = state(model)
    return after[1] == before[1] and all(
        torch.equal(after[0][name], before[0][name]) for name in before[0]
    )


@pytest.fixture(scope="module")
def loaders():
    return load_digits(64)


@pytest.fixture(scope="module")
def digits_cnn(loaders):
    torch.manual_seed(0)
    model = build_model("DigitsCNN", {})
    train(model, loaders.train, TrainConfig(60, lr=5e-3), loss=classification_loss, log=False)
    return model.eval()


def test_the_lines_of_the_original_documents(loaders):
    torch.manual_seed(0)
    model, input_data = mlp(64, 48, 10), torch.randn(4, 64)
    teacher, student = mlp(64, 32, 10), mlp(64, 8, 10)
    train_data = [(x.flatten(1), y) for x, y in loaders.train][:2]
    before = [state(m) for m in (model, teacher, student)]

    quantized_model = quick_quantize(model)
    output = quantized_model(input_data)
    assert output.shape == (4, 10)
    optimizer = ProductionModelOptimizer(device="cpu")
    optimized_model, result = optimizer.optimize_full_pipeline(
        model, prune_amount=0.3, use_quantization=True, use_pruning=True
    )
    assert optimized_model(input_data).shape == (4, 10)
    assert result.size_reduction_percent > 70 and -1000 < result.latency_reduction_percent < 100
    trained_student = optimizer.distill_knowledge(
        teacher_model=teacher,
        student_model=student,
        train_loader=train_data,
        config=DistillationConfig(epochs=10),
    )
    assert trained_student(train_data[0][0]).shape == (64, 10)
    assert all(same_state(m, s) for m, s in zip((model, teacher, student), before))


def test_int8_of_512_1024_100(tmp_path):
    """A file at least 3.8 times smaller, and an output error below 1e-4 of the signal's power where
    that is asked.
    """
    torch.manual_seed(0)
    model = mlp(512, 1024, 100)
    quantized = quick_quantize(model, torch.randn(32, 512), max_error=1e-4)
    assert artifact.float32_bytes(model) / quantized.save(tmp_path / "int8.kit") >= 3.8
    x = torch.randn(256, 512)
    with torch.no_grad():
        assert relative_error(quantized.model(x), model(x)) < 5e-5
        assert relative_error(quantized(x[:32]), model(x[:32])) < 1e-4
        loose = quick_quantize(model, backend="onnx-int8")
        assert relative_error(loose(x[:32]), model(x[:32])) < 3e-4


def test_static_quantization_of_a_trained_cnn_keeps_its_accuracy(digits_cnn, loaders, tmp_path):
    optimizer = ProductionModelOptimizer()
    calibration = [batch for batch, _ in zip(loaders.train, range(4))]
    x = next(iter(loaders.test))[0]
    quantized = optimizer.quantize_static(
        digits_cnn, calibration, QuantizationConfig(backend="onnx-static")
    )
    accuracy, before = (
        evaluate(quantized, loaders.test).accuracy,
        evaluate(digits_cnn, loaders.test).accuracy,
    )
    assert before > 0.9 and accuracy >= before - 0.012  # two of the 180 images

    quantized.save(tmp_path / "cnn.kit")
    loaded = QuantizedModel.load(tmp_path / "cnn.kit", config=quantized.settings)
    assert torch.equal(loaded(x), quantized(x))
    with torch.no_grad():
        for other in (
            loaded,
            QuantizedModel.load(tmp_path / "cnn.kit", build_model("DigitsCNN", {})),
        ):
            assert torch.equal(other.model(x), quantized.model(x))

    floats = optimizer.export_onnx(digits_cnn, tmp_path / "float.onnx", x)
    integers = optimizer.export_onnx(quantized, tmp_path / "qdq.onnx", x)
    assert floats["relative_error"] < 1e-10 and integers["relative_error"] < 1e-3
    assert integers["bytes"] == (tmp_path / "qdq.onnx").stat().st_size < 0.5 * floats["bytes"]
    assert (
        b"QuantizeLinear" in (tmp_path / "qdq.onnx").read_bytes()
        and integers["engine"] == "onnx-static"
    )


def test_prune_retrain_quantize(digits_cnn, loaders):
    x = next(iter(loaders.test))[0]
    optimized, result = quick_optimize(
        digits_cnn, x, prune_amount=0.25, train_loader=loaders.train, epochs=1, config=FAST
    )
    assert result.compression_ratio > 5 and result.parameters_after < 0.8 * result.parameters_before
    assert evaluate(optimized, loaders.test).accuracy > 0.85
    assert not any("retraining" in note for note in result.notes)
    assert result.bytes_before == artifact.float32_bytes(digits_cnn)
    text, page = str(result), result._repr_html_()
    for word in (
        "file, bytes",
        "latency, batch 64, 1 thread",
        f"{result.bytes_after:,}",
        "torch-int8",
    ):
        assert word in text and word in page
    assert set(result.layers["tensor"]) >= {"0.weight", "8.weight"}
    assert result.layers.set_index("tensor").loc["3.weight", "shape"] == (24, 12, 3, 3)


def test_structured_and_unstructured_pruning_leave_the_model_alone(digits_cnn):
    optimizer, before = ProductionModelOptimizer(), state(digits_cnn)
    smaller = optimizer.prune_structured(
        digits_cnn, PruningConfig(0.5, "ln_structured"), torch.rand(2, 1, 8, 8)
    )
    assert parameter_count(smaller) < 0.4 * parameter_count(digits_cnn)
    masked = optimizer.prune_unstructured(digits_cnn, PruningConfig(0.5, "l1_unstructured", dim=1))
    assert materialize(masked)[3].weight.eq(0).float().mean() == 0.5 and same_state(
        digits_cnn, before
    )
    result = optimizer.measure(digits_cnn, masked, torch.rand(2, 1, 8, 8))
    assert (
        result.sparsity == pytest.approx(0.5, abs=0.01)
        and result.bytes_after < 0.7 * result.bytes_before
    )
    with pytest.raises(ValueError, match="choose from"):
        optimizer.prune_structured(digits_cnn, PruningConfig(method="magnitude"))
    with pytest.raises(ValueError, match="choose from"):
        optimizer.prune_unstructured(digits_cnn, PruningConfig(method="l2"))


def test_qat_recovers_what_rounding_to_four_bits_costs(digits_cnn, loaders):
    optimizer, config = ProductionModelOptimizer(), QuantizationConfig("float32", "int4")
    rounded = optimizer.quantize_dynamic(digits_cnn, config)
    prepared = optimizer.prepare_qat_model(digits_cnn, config)
    trained = optimizer.retrain(prepared, loaders.train, epochs=2)
    assert quantizers(prepared).keys() == quantizers(trained).keys()
    packed = optimizer.quantize_dynamic(trained, config)
    assert {q.format.bits for q in quantizers(packed.model).values()} == {4}
    losses = [evaluate(model, loaders.validation).loss for model in (rounded, packed)]
    assert losses[1] < losses[0]
    x = torch.rand(8, 1, 8, 8)
    with torch.no_grad():  # what was trained is what runs
        torch.testing.assert_close(packed(x), trained(x), rtol=1e-3, atol=1e-3)


def test_distillation_follows_the_teacher(digits_cnn, loaders):
    torch.manual_seed(0)
    student = build_model("DigitsMLP", {"hidden": (16,)})
    config = DistillationConfig(temperature=3.0, alpha=0.9, epochs=6, learning_rate=1e-2)
    trained = ProductionModelOptimizer().distill_knowledge(
        digits_cnn, student, loaders.train, config
    )
    assert evaluate(trained, loaders.test).accuracy > 0.8 > evaluate(student, loaders.test).accuracy
    assert not trained.training


class Shared(nn.Module):
    """An embedding tied to the output layer, and one block used twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.block = nn.Embedding(20, 16), nn.ModuleDict({"inner": mlp(16, 16)})
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for _ in range(2):
            x = x + self.block["inner"](x)
        return self.head(x)


class Custom(nn.Module):
    """A recurrent layer inside, a bare weight, dropout, and a tuple for output."""

    def __init__(self):
        super().__init__()
        self.rnn, self.weight, self.dropout = (
            nn.LSTM(8, 16),
            nn.Parameter(torch.randn(16, 4)),
            nn.Dropout(0.5),
        )

    def forward(self, x):
        y, (h, _) = self.rnn(x)
        return self.dropout(y) @ self.weight, h


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make", [Shared, Custom, lambda: nn.Sequential(nn.Sequential(mlp(8, 8)), nn.Tanh())]
)
def test_models_of_all_kinds(make, training, tmp_path):
    torch.manual_seed(0)
    model = make().train(training)
    inputs, before = example_inputs(model, batch=4), state(model)
    quantized = quick_quantize(model, backend="float32")
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(*inputs)
        assert relative_error(quantized(*inputs), expected) < 1e-3
    quantized.save(tmp_path / "model.kit")
    loaded = QuantizedModel.load(tmp_path / "model.kit", make(), quantized.settings)
    assert relative_error(loaded(*inputs), quantized(*inputs)) == 0
    assert same_state(model, before)
    _, result = quick_optimize(
        model, inputs, prune_amount=0.3, config=QuantizationConfig("float32")
    )
    assert result.parameters_after < result.parameters_before or any(
        "masked" in note for note in result.notes
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    torch.manual_seed(0)
    model = mlp(32, 32, 4).to(dtype)
    x = torch.randn(8, 32).to(dtype)
    quantized = ProductionModelOptimizer().quantize_dynamic(model, FAST)
    with torch.no_grad():
        assert quantized(x).dtype == dtype and relative_error(quantized(x), model(x)) < 1e-3
    result = compare_models(model, quantized, (x,), seconds=0.01)
    assert result.bytes_before == pytest.approx(dtype.itemsize * parameter_count(model), rel=0.2)
    assert next(model.parameters()).dtype == dtype


def test_without_anything_to_quantize_there_is_one_clear_sentence():
    for model in (nn.Sequential(nn.ReLU()), nn.LayerNorm(4)):
        with pytest.raises(ValueError, match="no weight to quantize"):
            quick_quantize(model)
    broken = mlp(4, 4)
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quick_quantize(broken)
    with pytest.raises(ValueError, match="pass inputs="):
        example_inputs(nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match="no batch"):
        ProductionModelOptimizer().quantize_static(mlp(4, 4), [])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QuantizationConfig(backend="tpu"), "backend is 'tpu'"),
        (lambda: QuantizationConfig(dtype="int3"), "int3"),
        (lambda: QuantizationConfig(max_error=0), "max_error"),
        (lambda: PruningConfig(1.0), "amount is 1.0"),
        (lambda: PruningConfig(method="l7"), "l7"),
        (lambda: PruningConfig(dim=2), "dim is 2"),
        (lambda: DistillationConfig(epochs=0), "epochs is 0; it must be a number above 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_of_the_original_documents_are_understood():
    for backend in ("fbgemm", "x86", "qnnpack", "onednn"):
        assert QuantizationConfig(backend, torch.qint8).engine == "torch-int8"
    tensor = QuantizationConfig(dtype=torch.qint8, per_channel=False)
    assert tensor.format.granularity == "tensor" and tensor.format.bits == 8
    model = ProductionModelOptimizer().quantize_dynamic(mlp(16, 8, 4), tensor)
    assert relative_error(model(torch.ones(2, 16)), model.reference()(torch.ones(2, 16))) < 1e-2


def test_auto_says_when_integers_do_not_pay_and_when_the_batch_grew():
    torch.manual_seed(0)
    model = mlp(8, 8, 4)
    optimized, result = quick_optimize(model, torch.randn(2, 8), prune_amount=0.0)
    chosen = optimized.choice.name
    if chosen not in INTEGER:
        assert any(f"not faster than {chosen} at a batch of 2" in note for note in result.notes)
    with pytest.warns(UserWarning, match="tune"):
        optimized(torch.randn(64, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized(torch.randn(64, 8))
    impossible = quick_quantize(model, max_error=1e-12)
    with pytest.warns(UserWarning, match="rounding the weights alone"):
        impossible(torch.randn(2, 8))


def test_resnet_bk_is_exported_in_float_and_qdq(tmp_path):
    torch.manual_seed(0)
    shapes = {
        "vocab_size": 300,
        "d_model": 32,
        "layers": 1,
        "d_ff": 64,
        "channels": 6,
        "experts": 2,
    }
    model = build_model("ResNetBK", shapes).eval()
    tokens, optimizer = torch.randint(0, 60, (2, 12)), ProductionModelOptimizer()
    floats = optimizer.export_onnx(model, tmp_path / "float.onnx", tokens)
    assert floats["relative_error"] < 1e-9
    quantized = optimizer.quantize_static(model, [tokens])
    integers = optimizer.export_onnx(quantized, tmp_path / "qdq.onnx", tokens)
    assert integers["engine"] == "onnx-static" and integers["relative_error"] < 1e-3
    assert (
        b"Scan" in (tmp_path / "qdq.onnx").read_bytes()
        and integers["bytes"] < 0.4 * floats["bytes"]
    )


@dataclass
class Output:
    logits: torch.Tensor
    state: tuple | None = None


class Flexible(nn.Module):
    """Called by keyword, with a flag, for a dataclass."""

    def __init__(self):
        super().__init__()
        self.config = {"classes": 8}
        self.net = mlp(16, 32, 8)

    def forward(self, x, *, scale=None, probs=False):
        y = self.net(x) if scale is None else self.net(x) * scale
        return Output(y.softmax(-1) if probs else y, (None, y.argmax(-1)))

    def generate(self, x):
        return self(x).logits.argmax(-1)


@pytest.mark.parametrize("backend", ["auto", "onnx-float32"])
def test_a_quantized_model_is_called_as_the_original_is(backend):
    torch.manual_seed(0)
    model, x, scale = Flexible().eval(), torch.randn(4, 16), torch.full((4, 1), 2.0)
    quantized = quick_quantize(model, x, backend=backend)
    calls = [
        lambda m: m(x),
        lambda m: m(x=x),
        lambda m: m(x, scale=scale),
        lambda m: m(x, probs=True),
    ]
    with torch.no_grad():
        for call in [*calls, lambda m: m(torch.cat([x] * 3))]:
            y, expected = call(quantized), call(model)
            assert type(y) is Output and y.state[0] is None
            assert (
                0 < relative_error(y.logits, expected.logits) == relative_error(y, expected) < 1e-3
            )
        assert quantized.config == model.config and quantized.settings.dtype == "int8"
        assert quantized.net[0].weight.shape == (32, 16)
        assert torch.equal(quantized.generate(x), quantized.model.generate(x))
    with pytest.raises(AttributeError, match="nothing"):
        quantized.nothing
    by_name = quick_quantize(model, {"x": x, "scale": scale})
    table = by_name.choice.table.set_index("engine")
    assert table["error"]["onnx-int8"] < 1e-3 and by_name(x=x).logits.shape == (4, 8)


def test_another_size_than_the_exported_one_is_computed_all_the_same():
    torch.manual_seed(0)
    for model, first, other in [
        (Steps().eval(), (4, 6, 8), (4, 9, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), (2, 3, 8, 8), (1, 3, 11, 9)),
        (mlp(16, 4).eval(), (16,), (3, 16)),
    ]:
        quantized = quick_quantize(model, torch.randn(first), backend="onnx-float32")
        x = torch.randn(other)
        with torch.no_grad():
            assert relative_error(quantized(x), model(x)) < 1e-3
        assert all(name.startswith("model.") for name in quantized.state_dict())


def test_engines_follow_the_weights():
    torch.manual_seed(0)
    x, a, b = (
        torch.randn(8, 16),
        *(quick_quantize(mlp(16, 32, 4), backend="torch-int8") for _ in "ab"),
    )
    other = b(x)
    assert relative_error(a(x), other) > 0.1
    a.load_state_dict(b.state_dict())
    assert relative_error(a(x), other) < 1e-3
    with torch.no_grad():
        a.model[0].bias.add_(1)
        assert relative_error(a(x), a.model(x)) < 1e-3
        copied = copy.deepcopy(a)
        a.model[2].bias = nn.Parameter(torch.ones(4))
        assert relative_error(a(x), a.model(x)) < 1e-3 < relative_error(copied(x), a(x))
        assert copied.choice is not None
    assert a.double()(x.double()).dtype == torch.float64
    with pytest.raises(TypeError, match="save"):
        pickle.dumps(a)


def test_an_empty_batch_is_computed_and_not_measured():
    quantized = quick_quantize(mlp(16, 8, 4), backend="torch-int8")
    assert quantized(torch.zeros(0, 16)).shape == (0, 4)
    assert quantized(torch.randn(3, 16)).shape == (3, 4) and quantized.choice.name == "torch-int8"


def test_calls_that_are_no_batches():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(16, 64), nn.Linear(64, 4)

        def forward(self, x, edges, factor):
            h = self.layer(x).relu() * factor
            return self.out(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))

    torch.manual_seed(0)
    model, inputs = Graph().eval(), (torch.randn(10, 16), torch.randint(0, 10, (2, 30)), 2.0)
    _, result = quick_optimize(model, inputs, prune_amount=0.0)
    assert result.relative_error < 1e-3


def test_the_report_says_why_no_integer_engine_was_used():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    optimized, _ = quick_optimize(mlp(8, 4), x, config=QuantizationConfig(dtype="float16"))
    optimized.choice = engines.choose_engine(
        optimized.model, x, names=("torch-int8",), seconds=0.01
    )
    result = compare_models(mlp(8, 4), optimized, x, seconds=0.01)
    assert any("no integer engine can be used (torch-int8" in note for note in result.notes)


def test_import_is_light():
    code = "import sys, kit; print('torch' not in sys.modules and 'QuantizedModel' in dir(kit))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
    with pytest.raises(AttributeError, match="no attribute"):
        kit.nothing


def test_a_loader_without_a_length_is_refused():
    batches = ((torch.randn(2, 4), torch.tensor([0, 1])) for _ in range(2))
    with pytest.raises(ValueError, match="a generator has no length: give a DataLoader"):
        ProductionModelOptimizer().retrain(nn.Linear(4, 2), batches)
    with pytest.raises(ValueError, match="epochs is -1; it must be a number above 0"):
        ProductionModelOptimizer().retrain(nn.Linear(4, 2), list(batches), epochs=-1)


def test_attributes_of_the_original_are_reached():
    class Named(nn.Linear):
        device, num_classes = "somewhere", 4

    model = Named(8, 4).double()
    model.config = {"name": "theirs"}
    quantized = quick_quantize(model, backend="float32")
    assert quantized.config == model.config and quantized.num_classes == 4
    assert quantized.device == "somewhere" and quantized.dtype == torch.float64


def test_masks_of_the_calibration_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, mask=None):
            return self.layer(x if mask is None else x * mask)

    x, mask = torch.tensor([[1.0, -2.0, 3.0, 100.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    for batch in ({"x": x, "mask": mask}, {"mask": mask, "x": x, "labels": torch.zeros(1)}):
        quantized = ProductionModelOptimizer().quantize_static(Masked(), [batch], FAST)
        grid = quantized.model.layer.input_quantizer
        assert (grid.low.item(), grid.high.item()) == (-2.0, 3.0)


def test_changes_that_torch_does_not_count_are_seen_too():
    torch.manual_seed(0)
    x, quantized = torch.randn(8, 16), quick_quantize(mlp(16, 32, 4), backend="torch-int8")
    before = quantized(x)
    quantized.model[0].parametrizations.weight.original.data.mul_(2)
    assert (
        relative_error(quantized(x), quantized.model(x))
        < 1e-3
        < relative_error(before, quantized(x))
    )
    quantized.model[2] = nn.Linear(32, 7)
    assert quantized(x).shape == (8, 7)


def cnn():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4)).eval()


def compiled_inside(model):
    model[5] = torch.compile(model[5], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
        torch.fx.symbolic_trace,
        compiled_inside,
    ],
)
def test_wrapped_models_are_what_is_inside(wrap):
    model, x, optimizer = cnn(), torch.randn(4, 3, 8, 8), ProductionModelOptimizer()
    with torch.no_grad():
        quantized = quick_quantize(wrap(cnn()), backend="torch-int8")
        assert 0 < relative_error(quantized(x), model(x)) < 1e-3
        pruned = optimizer.prune_unstructured(wrap(cnn()))
        assert relative_error(pruned(x), model(x)) > 1e-3
        half = PruningConfig(0.5)
        small = optimizer.prune_structured(wrap(cnn()), half, x)
        assert parameter_count(small) == parameter_count(optimizer.prune_structured(model, half, x))


def test_models_are_compiled_in_fake_quantization():
    x, optimizer = torch.randn(4, 3, 8, 8), ProductionModelOptimizer()
    quantized = quick_quantize(cnn(), backend="torch-int8")
    trained = optimizer.prepare_qat_model(cnn().train())
    compiled = torch.compile(trained, backend="eager")
    with torch.no_grad():
        compiled_result = torch.compile(quantized, backend="eager")(x)
        assert relative_error(compiled_result, quantized.model(x)) < 1e-9
    compiled(x).sum().backward()
    gradients = [p.grad.clone() for p in trained.parameters()]
    trained.zero_grad()
    trained(x).sum().backward()
    for parameter, expected in zip(trained.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: nn.Sequential(nn.LazyLinear(4)), "call the model once"),
        (lambda: torch.jit.script(mlp(4, 2)), "nn.Module that it was made from"),
    ],
)
def test_models_whose_weights_cannot_be_changed_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        quick_quantize(make())


def test_scripted_models_have_no_file(tmp_path):
    traced = torch.jit.trace(mlp(4, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="TopLevelTracedModule keeps its code"):
        artifact.save(traced, tmp_path / "a.kit")
    artifact.save(mlp(4, 2), tmp_path / "a.kit")
    with pytest.raises(ValueError, match="TopLevelTracedModule keeps its code"):
        artifact.load(tmp_path / "a.kit", traced)


def test_weights_that_parametrizations_compute_are_plain_ones_here():
    torch.manual_seed(0)
    norms = nn.utils.parametrizations
    layers = norms.weight_norm(nn.Linear(16, 32)), norms.spectral_norm(nn.Linear(32, 32))
    model = nn.Sequential(*layers, norms.orthogonal(nn.Linear(32, 32))).eval()
    x, config = torch.randn(8, 16), QuantizationConfig(backend="torch-int8")
    _, result = quick_optimize(model, x, 0, config=config)
    assert 0 < result.relative_error < 1e-3 and "torch-int8" == result.engine


def test_odd_parameters_beside_ordinary_ones():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(16, 8), nn.Embedding(10, 8, max_norm=1.0)
            self.order = nn.Parameter(torch.arange(8), requires_grad=False)
            self.several = nn.ParameterList([torch.randn(8, 8)])
            self.named = nn.ParameterDict({"a": torch.randn(8, 8)})
            self.turn = nn.Parameter(torch.polar(torch.ones(8), torch.randn(8)))
            self.register_buffer("sparse", torch.eye(8).to_sparse())

        def forward(self, x):
            y = self.layer(x) @ self.several[0] @ self.named["a"] + self.table(self.order)
            return torch.sparse.mm(self.sparse, y) * self.turn

    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(8, 16)
    with torch.no_grad():
        for backend in ("auto", "torch-int8"):
            assert 0 < relative_error(quick_quantize(model, backend=backend)(x), model(x)) < 1e-3


def test_a_format_that_keeps_the_error_is_proposed():
    torch.manual_seed(0)
    model, x = mlp(*[64] * 8), torch.randn(8, 64)
    with pytest.warns(UserWarning, match="store 'float16'"):
        quick_quantize(model, x, max_error=1e-6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = quick_quantize(model, x, max_error=1e-6, dtype="float16")
        assert relative_error(kept(x), model(x)) <= 1e-6
    with pytest.warns(UserWarning, match="store 'int8'"):
        quick_quantize(model, x, max_error=2e-4, dtype="int4")


def test_reports_say_first_what_is_computed_in_floats():
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model, x = nn.Sequential(Own(8, 8), nn.Linear(8, 4)), torch.randn(4, 8)
    _, result = quick_optimize(model, x, config=FAST, use_pruning=False)
    assert result.notes[0].startswith("computed in floats: 0 (")
    with pytest.raises(ValueError, match="empty batch"):
        quick_optimize(model, torch.zeros(0, 8))
    with pytest.raises(ValueError, match="values"):
        compare_models(model, mlp(8, 3), x)
