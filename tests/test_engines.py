import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kit import engines
from kit.core.measurement import relative_error
from kit.core.protocols import call_with
from kit.core.weights import weight_of
from kit.engines import OnnxEngine, build_engine, choose_engine
from kit.engines.folding import batch_norm_pairs, fold_batch_norms
from kit.engines.kernels import Int8Conv2d, Int8Linear, int8_layer, int8_model, quantize_batch
from kit.engines.layers import calibrate_inputs, float_copy, integer_weight
from kit.models import build_model
from kit.quantization import Format, quantize_weights
from notebooks.reference.rivals import against_rivals, rivals

# But for rounding of ties; convolutions that stay in float round no inputs.
EXACT = 1e-6 if engines.kernels.ONEDNN else 1e-4
NAMES = engines.ENGINES


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.head = kind(40, 64, batch_first=True), nn.Linear(64, 5)

    def forward(self, x):
        states, _ = self.rnn(x)
        return {"logits": self.head(states[:, -1]), "states": (states,)}


def mlp(*widths):
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def quantized(model, format=Format(8), calibration=None):
    model = quantize_weights(copy.deepcopy(model), format).eval()
    if calibration is not None:
        calibrate_inputs(model, [calibration])
    return model


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return mlp(40, 64, 10)


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    model = build_model("DigitsCNN", {"channels": (8, 16)})
    model(torch.rand(64, 1, 8, 8))  # batch statistics
    return model.eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(20, 40, generator=torch.Generator().manual_seed(1))


def integer_product(layer, x, grid=None):
    """The layer's integer arithmetic in float64, which is exact here."""
    weight = integer_weight(weight_of(layer))
    q, scale, zero = quantize_batch(x, grid)
    exact = (q.double() - zero) @ weight.codes.double().t()
    return (exact * weight.scale[:, 0].double() * scale + layer.bias.double()).float()


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
def test_int8_linear_is_exact_integer_arithmetic(dense, x, onednn, calibrated, monkeypatch):
    if onednn and not engines.kernels.ONEDNN:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(engines.kernels, "ONEDNN", onednn)
    layer = quantized(dense, calibration=x if calibrated else None)[0]
    weight = integer_weight(weight_of(layer))
    grid = weight.input_qparams
    assert (grid is not None) == calibrated
    for shape in ((20, 40), (2, 10, 40), (1, 40), (0, 40)):
        rows = x.flatten()[: torch.Size(shape).numel()].view(shape)
        expected = integer_product(layer, rows.reshape(-1, 40), grid).view(*shape[:-1], 64)
        result = Int8Linear(weight, layer.bias)(rows)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_calibrated_integer_layers_equal_the_fake_quantized_model(cnn):
    images = torch.rand(32, 1, 8, 8)
    model = quantized(cnn, calibration=images)
    integer = int8_model(model)
    convolution = Int8Conv2d if engines.kernels.ONEDNN else nn.Conv2d
    assert [type(integer[i]) for i in (0, 3, 8)] == [convolution, convolution, Int8Linear]
    with torch.no_grad():
        assert relative_error(integer(images), model(images)) < EXACT


class Reads(nn.Module):
    """Multiplies by its layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.attention, self.layer = (
            nn.MultiheadAttention(16, 2, batch_first=True),
            nn.Linear(16, 16),
        )

    def forward(self, x):
        return self.attention(x, x, x)[0] @ self.layer.weight


def test_int8_model_keeps_weights_that_other_code_reads():
    model, x = quantized(Reads().eval()), torch.randn(2, 5, 16)
    integer = int8_model(model)
    assert isinstance(integer.layer, Int8Linear)
    with torch.no_grad():
        torch.testing.assert_close(integer(x), model(x))
    with pytest.raises(ValueError, match="no Linear or Conv2d for INT8 kernels"):
        int8_model(quantized(nn.Sequential(nn.Embedding(5, 4))))


def test_layers_that_compute_something_else_are_left_alone(dense, x):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = copy.deepcopy(dense)
    hooked[0].register_forward_hook(lambda module, inputs, y: y + 1)
    for first in (hooked, nn.Sequential(Doubled(40, 64), nn.ReLU(), nn.Linear(64, 10))):
        model = quantized(first, calibration=x)
        integer = int8_model(model)
        assert not isinstance(integer[0], Int8Linear) and isinstance(integer[2], Int8Linear)
        with torch.no_grad():
            assert relative_error(integer(x), model(x)) < 1e-3
    assert isinstance(int8_layer(quantized(dense, calibration=x)[0]), Int8Linear)


def test_int8_model_replaces_shared_modules_everywhere():
    layer = nn.Linear(8, 8)
    model = quantized(nn.Sequential(layer, nn.ReLU(), layer))
    integer = int8_model(model)
    assert isinstance(integer[0], Int8Linear) and integer[2] is integer[0]


@pytest.fixture(scope="module")
def exported(dense, x):
    """Every engine of the small MLP, calibrated."""
    model = quantized(dense, calibration=x)
    builder = engines.choice._Builder(model, call_with(x))
    return model, {name: builder.build(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 7, 20])
def test_every_engine_computes_the_mlp_at_any_batch_size(exported, dense, x, name, rows):
    _, built = exported
    y = built[name](x[:rows])
    assert y.dtype == torch.float32 and y.shape == (rows, 10)
    with torch.no_grad():
        assert relative_error(y, dense(x[:rows])) < 1e-3


def test_onnx_engines_compute_with_the_codes_of_the_model(exported, x):
    model, built = exported
    with torch.no_grad():
        floats = float_copy(model)
        torch.testing.assert_close(built["onnx-float32"](x), floats(x), rtol=1e-5, atol=1e-5)
        assert relative_error(built["onnx-static"](x), model(x)) < 1e-6
        hidden = integer_product(model[0], x).relu()
        expected = integer_product(model[2], hidden)
        torch.testing.assert_close(built["onnx-int8"](x), expected, rtol=1e-3, atol=1e-3)


def test_a_float_copy_leaves_the_model_alone(dense, x):
    model = quantized(dense, calibration=x)
    with torch.no_grad():
        before = model(x)
        float_copy(model)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        plain = quantized(dense)
        torch.testing.assert_close(plain(x), float_copy(model)(x), rtol=0, atol=0)


def test_batch_norms_are_folded(cnn):
    torch.manual_seed(0)
    head = nn.Sequential(
        nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3)
    )
    model = nn.Sequential(copy.deepcopy(cnn), head)
    images = torch.rand(16, 1, 8, 8)
    head.train()(cnn(images)), model.eval()
    with torch.no_grad():
        model[0][1].weight[::2] *= -1
        folded = fold_batch_norms(copy.deepcopy(model))
        assert not any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules()
        )
        torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
        integer = int8_model(quantized(model, calibration=images))
        left = [
            module
            for module in integer.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        assert len(left) == (0 if engines.kernels.ONEDNN else 2)  # float convolutions keep theirs
        assert relative_error(integer(images), quantized(model, calibration=images)(images)) < EXACT


def test_a_batch_norm_whose_input_is_read_twice_is_not_folded():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            y = self.linear(x)
            return y + self.norm(y)

    assert batch_norm_pairs(Branch()) == []


def test_a_layer_whose_output_is_changed_on_the_way_is_not_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    model[1].running_mean.fill_(1.0)
    model[0].register_forward_hook(lambda module, inputs, y: 2 * y)
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(fold_batch_norms(copy.deepcopy(model))(x), model(x))


def test_layers_called_by_keyword_are_calibrated():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 4)

        def forward(self, x):
            return self.b(input=self.a(input=x).relu())

    torch.manual_seed(0)
    x = torch.randn(32, 12)
    model = quantized(Keyword().eval(), calibration=x)
    assert all(integer_weight(weight_of(layer)).input_qparams for layer in (model.a, model.b))
    with torch.no_grad():
        assert 0 < relative_error(float_copy(model)(x), model(x)) < 1e-3  # inputs are rounded
        assert relative_error(int8_model(model)(x), model(x)) < EXACT


def test_a_layer_used_twice_is_in_the_graph_once():
    import onnx

    layer = nn.Linear(32, 32)
    model, x = quantized(nn.Sequential(layer, nn.ReLU(), layer).eval()), torch.randn(4, 32)
    graph = onnx.load_from_string(build_engine(model, "onnx-int8", x).graph.numpy().tobytes()).graph
    assert [node.op_type for node in graph.node].count("DynamicQuantizeMatMul") == 2
    assert [tuple(constant.dims) for constant in graph.initializer].count((32, 32)) == 1


def test_convolutions_are_fused_to_integer_ones(cnn, tmp_path):
    import onnx
    import onnxruntime

    images = torch.rand(16, 1, 8, 8)
    model = quantized(cnn, calibration=images)
    engine = build_engine(model, "onnx-static", (images,))
    with torch.no_grad():
        assert relative_error(engine(images), model(images)) < 1e-3
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 3
    onnxruntime.InferenceSession(
        engine.graph.numpy().tobytes(), options, providers=["CPUExecutionProvider"]
    )
    operators = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert "QLinearConv" in operators and "Conv" not in operators


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_models_with_nested_outputs(kind):
    torch.manual_seed(0)
    model, x = Recurrent(kind).eval(), torch.randn(3, 6, 40)
    with torch.no_grad():
        engine = build_engine(quantized(model), "onnx-int8", (x,))
        y, expected = engine(x), model(x)
        assert y.keys() == expected.keys() and isinstance(y["states"], tuple)
        assert relative_error(y, expected) < 1e-3
        longer = torch.randn(2, 9, 40)
        assert relative_error(engine(longer), model(longer)) < 1e-3
    operators = str(engine.graph.numpy().tobytes())
    assert ("DynamicQuantizeLSTM" in operators) == (kind is nn.LSTM)


def test_int4_blocks_use_the_codes_of_the_model(dense, x):
    model = quantized(dense, Format(4, granularity="group", group_size=32))
    builder = engines.choice._Builder(model, call_with(x))
    with torch.no_grad():
        assert (
            relative_error(builder.build("onnx-blocks")(x), model(x)) < 2e-4
        )  # what rounding the inputs costs
    for name in ("onnx-int8", "torch-int8", "onnx-static"):
        with pytest.raises(ValueError, match="has no"):
            builder.build(name)


def test_onnx_engine_is_copied_pickled_saved_and_loaded(exported, x, tmp_path):
    engine = exported[1]["onnx-int8"]
    expected = engine(x)
    engine.save(tmp_path / "model.onnx")
    save_file(engine.state_dict(), tmp_path / "model.safetensors")
    filled = OnnxEngine(b"")
    filled.load_state_dict(load_file(tmp_path / "model.safetensors"))
    loaded = OnnxEngine.load(tmp_path / "model.onnx")
    for other in (loaded, filled, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(other(x), expected)


def test_choice_measures_all_and_keeps_the_stated_error(exported, dense, x):
    model, _ = exported
    choice = choose_engine(model, (x,), reference=dense, max_error=1e-3, seconds=0.05)
    table = choice.table.set_index("engine")
    assert set(table.index) == set(NAMES) and table["error"].notna().all()
    assert table.loc[choice.name, "why not"] == "" and table.loc[choice.name, "error"] < 1e-3
    assert (table["why not"] == "").sum() == 1
    low = table["low"].dropna()
    assert low[choice.name] <= 1.0001 * low["float32"]
    with torch.no_grad():
        assert relative_error(choice.engine(x), dense(x)) == pytest.approx(
            table.loc[choice.name, "error"]
        )
    strict = choose_engine(
        model, (x,), reference=dense, max_error=0.0, names=("torch-int8",), seconds=0.01
    )
    reasons = strict.table.set_index("engine")["why not"]
    assert strict.name == "float32" and "error above" in reasons["torch-int8"]


def test_choice_falls_back_to_float32_where_nothing_else_works():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return (
                x @ self.weight if float(x.sum()) > -1e9 else x
            )  # data-dependent: no exporter follows it

    model = quantized(Odd())
    choice = choose_engine(
        model, (torch.randn(2, 3),), names=("torch-int8", "onnx-float32"), seconds=0.01
    )
    assert choice.name == "float32"
    reasons = choice.table.set_index("engine")["why not"]
    assert "no Linear" in reasons["torch-int8"] and "cannot be exported" in reasons["onnx-float32"]
    with pytest.raises(ValueError, match="unknown"):
        build_engine(model, "fastest", (torch.randn(2, 3),))


def test_rivals_are_measured_side_by_side(dense, x):
    found = rivals(dense, x, compiled=False)
    assert "ONNX Runtime's quantizer" in found and any(
        name.startswith("torch dynamic") for name in found
    )
    table = against_rivals(dense, x, found, seconds=0.01).set_index("name")
    assert set(table.index) == {"float32 in torch", "kit", *found} and (table["ms"] > 0).all()
    assert table.loc["float32 in torch", "error"] == 0 and (table["error"] < 2e-3).all()
    assert table.attrs["engine"] in engines.ENGINES


def test_errors_of_other_shapes_and_nan_are_infinite():
    assert relative_error(torch.ones(3), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    swapped = (torch.ones(2), torch.zeros(1)), (torch.zeros(2), torch.ones(1))
    assert relative_error(*swapped) > 1
    assert relative_error(torch.ones(2, 3), torch.ones(3, 2)) == float("inf")


def test_a_small_output_beside_a_large_one_counts():
    large, small = torch.full((100,), 1e3), torch.tensor([1.0, -1.0])
    expected = {"large": large, "small": (small, torch.tensor(3))}
    assert relative_error({"large": large, "small": (-small, torch.tensor(3))}, expected) == 4.0
    nothing = torch.zeros(2)  # beside which noise of single precision is nothing too
    assert relative_error((large, nothing + 1e-5), (large, nothing)) < 1e-3
    assert relative_error((nothing + 1e-5,), (nothing,)) > 1


def test_onnx_engines_say_what_stays_in_floats():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv = nn.Embedding(9, 32), nn.Conv1d(32, 32, 3)
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 9, bias=False)
            self.b.weight = self.words.weight

        def forward(self, x):
            y = self.conv(self.words(x).transpose(1, 2)).transpose(1, 2)
            return self.b(self.a(y).relu())

    x = torch.arange(12).reshape(2, 6) % 9
    model = quantize_weights(Mixed().eval(), Format(8))
    kept = build_engine(model, "onnx-int8", x).kept
    assert kept == {"conv": "onnx-int8 has no kernel for it"}
    model = quantize_weights(Mixed().eval(), {"words.weight": None, "*": Format(8)})
    engine = copy.deepcopy(build_engine(model, "onnx-int8", x))
    assert set(engine.kept) == {"conv", "b"} and engine.kept["b"] == "no integer codes"


class Steps(nn.Module):
    """A loop that exporters unroll."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return sum(self.layer(x[:, t]).tanh() for t in range(x.shape[1]))


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.state = nn.Linear(16, 16), nn.BatchNorm1d(16), 0.0

    def forward(self, x):
        self.state = self.norm(self.layer(x + self.state)).tanh()
        return self.state


class Answer:
    def __init__(self, values):
        self.values = values


class Answers(nn.Module):
    """Its outputs hold what is no nest of tensors, as transformers' caches are not."""

    def __init__(self, alone):
        super().__init__()
        self.layer, self.alone = nn.Linear(16, 16), alone

    def forward(self, x):
        y = self.layer(x)
        return Answer(y) if self.alone else (y, Answer(y))


FREE = [
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), (1, 3, 8, 8), [(2, 3, 9, 13)]),
    (nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), (2, 3, 6, 6), [(5, 3, 6, 6)]),
    (nn.Conv1d(2, 4, 5, padding=2), (4, 2, 16), [(3, 2, 23), (1, 2, 5)]),
    (Steps(), (4, 6, 8), [(2, 6, 8)]),
]  # fmt: skip


@pytest.mark.parametrize("model,first,others", FREE)
def test_graphs_are_free_where_they_were_compared_at_another_size(model, first, others):
    engine = build_engine(model, "onnx-float32", torch.randn(first))
    for shape in others:
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative_error(engine(x), model(x)) < 1e-9
    if isinstance(model, Steps):
        with pytest.raises(Exception, match="dimension"):
            engine(torch.randn(4, 9, 8))


def test_a_graph_that_gives_other_values_is_not_taken(monkeypatch):
    monkeypatch.setattr(engines.export, "relative_error", lambda y, r: 1e-3)
    with pytest.raises(ValueError, match="other values than the model"):
        build_engine(nn.Linear(4, 3), "onnx-float32", torch.randn(2, 4))


def test_graphs_take_calls_of_any_form():
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x, state, mask=None, *, probs=False):
            y, state = self.rnn(x if mask is None else x * mask, state)
            return (y.softmax(-1) if probs else y), state, None

    model, zeros = Any(), torch.zeros(1, 3, 16)
    x, mask = torch.randn(3, 5, 8), torch.randint(0, 2, (3, 5, 1)).float()
    call = call_with({"mask": mask, "x": x, "state": (zeros, zeros), "probs": True})
    engine = build_engine(model, "onnx-float32", call)
    with torch.no_grad():
        expected = model(x, (zeros, zeros), mask, probs=True)
        y = engine(probs=True, x=x, state=(zeros, zeros), mask=mask)
    assert relative_error(y, expected) < 1e-9 and y[2] is None and type(y[1]) is tuple
    for other in ({"probs": False}, {"mask": None}, {"state": None}):
        with pytest.raises(ValueError, match="another form"):
            engine(**call.kwargs | other)


def test_models_that_no_measurement_can_judge_are_computed_in_float32():
    torch.manual_seed(0)
    model, x = quantized(Stateful()), torch.randn(4, 16)
    choice = choose_engine(model, x, seconds=0.01)
    assert choice.name == "float32" and "a state" in choice.table["why not"].iloc[-1]
    with torch.no_grad():  # the engine begins as the model does
        for _ in range(2):
            assert relative_error(choice.engine(x), model(x)) < 1e-9
    choice = choose_engine(quantized(Answers(alone=True)), x, seconds=0.01)
    assert choice.name == "float32" and "no tensor" in choice.table["why not"].iloc[-1]
    reasons = choose_engine(quantized(Answers(alone=False)), x, seconds=0.01).table
    reasons = reasons.set_index("engine")["why not"]
    for name in ("bfloat16", "onnx-float32", "onnx-int8"):
        assert "Answer in the output" in reasons[name]
    assert reasons["torch-int8"] in ("", "slower")


def test_what_an_optional_argument_may_skip_is_not_folded():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

        def forward(self, x, plain=None):
            y = self.layer(x)
            return self.norm(y) if plain is not None else y

    assert batch_norm_pairs(Optional().eval()) == []


def test_int8_models_say_what_stays_in_floats():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum()

    old = nn.utils.weight_norm(nn.Linear(16, 16))
    layers = nn.Sequential(Adapted(16, 16), nn.Linear(16, 16), old)
    integer = int8_model(quantize_weights(layers.eval(), Format(8)))
    assert set(integer.kept) == {"0", "2"} and "Adapted of its own" in integer.kept["0"]


def test_an_output_that_no_graph_holds_is_named_with_the_way_out():
    class Cached(nn.Linear):
        def forward(self, x):
            return super().forward(x), object()

    with pytest.raises(ValueError, match="a object in the output .* leave it out"):
        build_engine(Cached(8, 8).eval(), "onnx-float32", torch.zeros(2, 8))
