"""Formats, fake quantization, activations, complex tensors and packed layers, against definitions
and other code."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kit.core.weights import materialize, weight_of, weights
from kit.models import MoE, build_model
from kit.quantization import (
    HALF,
    ActivationQuantizer,
    ComplexQuantizer,
    FakeQuantize,
    Format,
    PerChannelQuantizedBKCore,
    QuantizedBKCore,
    calibrate,
    formats,
    kernels,
    original_mix,
    quantize_bk_core,
    quantize_weights,
)
from kit.quantization.hqq import hqq, hqq_qparams
from kit.quantization.integers import (
    GroupWiseQuantizer,
    QuantizedLinear,
    QuantizedMoELayer,
    pack_layers,
)
from kit.quantization.packing import pack, packed_bytes, unpack

BITS = (2, 3, 4, 5, 6, 8, 12, "ternary")
every_format = st.builds(
    lambda bits, symmetric, granularity, size, scale: Format(
        bits, symmetric or bits == "ternary", granularity, size, "minmax", scale
    ),
    st.sampled_from(BITS),
    st.booleans(),
    st.sampled_from(["tensor", "channel", "group", "rows"]),
    st.integers(1, 9),
    st.sampled_from(["float32", "float16", "log8"]),
)
shapes = st.tuples(st.integers(0, 7), st.integers(0, 11))


def fake(x, format):
    return FakeQuantize(x, format)


def matrix(shape, seed, magnitude=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude


# Arithmetic


@given(shapes, every_format, st.integers(0, 999), st.floats(-6, 4))
def test_error_is_at_most_half_a_step_and_zero_stays_zero(shape, format, seed, magnitude):
    x = matrix(shape, seed, magnitude)
    x.flatten()[::3] = 0
    step = fake(x, format)
    y, scale = step(x), step.spread(step.qparams(x)[0])
    assert y.shape == x.shape and y.dtype == torch.float32
    assert (y.flatten()[::3] == 0).all()
    assert ((y - x).abs() <= 0.5 * scale * 1.0001).all()


@given(shapes, every_format, st.integers(0, 999), st.floats(-6, 4))
def test_rounding_twice_is_rounding_once(shape, format, seed, magnitude):
    x = matrix(shape, seed, magnitude)
    step = fake(x, format)
    step.set_qparams(*step.qparams(x))
    y = step(x)
    assert torch.equal(step(y), y)
    codes, scale, zero = step.codes(x)
    assert codes.numel() == 0 or (codes.min() >= format.qmin and codes.max() <= format.qmax)
    again = formats.dequantize(formats.to_blocks(codes, format), scale, zero)
    again = formats.from_blocks(again, step.shape, format)
    assert np.array_equal(
        again.numpy().view(np.int32), y.numpy().view(np.int32)
    )  # the sign of zero, too


@given(every_format, st.integers(0, 999))
def test_rounding_is_monotone(format, seed):
    x = matrix((1, 40), seed).sort(1).values
    y = fake(x, Format(format.bits, format.symmetric, "tensor"))(x)
    assert (y.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2e-3, 1e-12, 6e4])
def test_constant_tensors(bits, value):
    x = torch.full((3, 5), value)
    scale = "float16" if abs(value) < 1e4 else "float32"
    y = fake(x, Format(bits, scale=scale))(x)
    assert torch.allclose(y, x, rtol=5e-3, atol=1e-7)  # the smallest float16 scales have few digits


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group", "rows"])
@pytest.mark.parametrize("range", ["minmax", "percentile", "mse"])
def test_empty_and_single_elements(shape, granularity, range):
    x = torch.ones(shape)
    assert torch.allclose(fake(x, Format(8, granularity=granularity, range=range))(x), x, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_kept_and_rounded_alike(dtype):
    x = matrix((6, 32), 0).to(dtype)
    step = fake(x, Format(4, granularity="group", group_size=8))
    assert step(x).dtype == dtype
    assert torch.equal(step(x), step(x.float()).to(dtype))


def test_non_contiguous_input():
    x = matrix((16, 12), 0).t()
    assert torch.equal(fake(x, Format(4))(x), fake(x.contiguous(), Format(4))(x.contiguous()))


def test_short_last_group_has_its_own_scale():
    x = torch.cat([torch.full((2, 8), 8.0), torch.full((2, 3), 0.7)], 1)
    step = fake(x, Format(4, granularity="group", group_size=8))
    assert torch.allclose(step(x), x, rtol=1e-3)
    assert len(step.codes(x)[1]) == 4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_range_is_near_the_best_of_all_clippings(bits, symmetric):
    x = torch.cat([matrix((1, 300), 1), torch.tensor([[6.0]])], 1)
    format = Format(bits, symmetric, "tensor", range="mse", scale="float32")
    error = (fake(x, format)(x) - x).square().sum()
    best = math.inf
    for clip in torch.linspace(0.02, 1, 2000):
        grid = formats.qparams_of_range(
            x.min(1, True).values.clamp(max=0) * clip, x.max(1, True).values * clip, format
        )
        best = min(
            best,
            (formats.dequantize(formats.quantize(x, *grid, format), *grid) - x)
            .square()
            .sum()
            .item(),
        )
    assert best <= error * 1.000001 and error <= 1.03 * best
    minmax = fake(x, Format(bits, symmetric, "tensor", scale="float32"))
    assert error < 0.9 * (minmax(x) - x).square().sum()


def test_percentile_range_clips_one_in_a_thousand():
    x = torch.linspace(-1, 1, 20001)[None]
    step = fake(x, Format(8, granularity="tensor", range="percentile", scale="float32"))
    assert step.qparams(x)[0].item() * 127 == pytest.approx(0.999, abs=1e-4)


def test_log_scales_lie_within_a_sixteenth_of_an_octave_above():
    scale = torch.logspace(-4, 0, 50)[:, None]
    stored = formats.round_scale(scale, "log8")
    assert (stored >= scale * 0.9999).all() and (stored <= scale * 2 ** (1 / 16) * 1.0001).all()
    assert torch.equal(formats.round_scale(stored, "log8"), stored)


# Gradients


def test_straight_through_gradient_stops_at_the_clipping():
    x = torch.tensor([[-9.0, -0.4, 0.2, 9.0]], requires_grad=True)
    formats.fake_quantize(x, torch.tensor([[1.0]]), None, Format(4)).backward(
        torch.arange(1.0, 5)[None]
    )
    assert x.grad.tolist() == [[0.0, 2.0, 3.0, 0.0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_lsq_gradient_is_that_of_the_rounded_value_with_codes_held(symmetric):
    """Equation 3 of LSQ: with round() passed through, d/ds [s (clip(x/s + r) - z)], r the rounding
    at s, held fixed."""
    x, scale = (
        matrix((3, 50), 0).double(),
        torch.tensor([[0.3], [0.5], [0.9]], dtype=torch.float64, requires_grad=True),
    )
    zero, format = None if symmetric else torch.tensor([[1.0], [-2.0], [0.0]]), Format(3, symmetric)
    shift = 0.0 if zero is None else zero
    offset, rounded = (
        (torch.round(x / scale) - x / scale).detach(),
        (torch.round(x / scale) + shift).detach(),
    )
    clipped = rounded.clamp(format.qmin, format.qmax)

    def surrogate(s):
        return (torch.where(rounded == clipped, x / s + offset, clipped - shift)) * s

    weights = matrix((3, 50), 1).double()
    (formats.fake_quantize(x, scale, zero, format, step_gradient=1.0) * weights).sum().backward()
    with torch.no_grad():
        numeric = ((surrogate(scale + 1e-6) - surrogate(scale - 1e-6)) * weights).sum(
            1, keepdim=True
        ) / 2e-6
    assert torch.allclose(scale.grad, numeric, rtol=1e-5, atol=1e-6)


def test_learned_steps_train_and_are_what_is_stored():
    torch.manual_seed(0)
    layer = quantize_weights(nn.Sequential(nn.Linear(16, 8)), Format(2, range="mse"), learned=True)
    step = weight_of(layer[0]).find(FakeQuantize)
    before = step.scale.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(32, 16)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(step.scale, before)
    codes, scale, zero = step.codes(weight_of(layer[0]).original)
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(formats.dequantize(codes, scale, zero), layer[0].weight)


def test_masked_weights_stay_zero_with_any_zero_point():
    from kit.pruning.mask import set_mask

    layer = nn.Linear(16, 8)
    mask = torch.rand(8, 16) > 0.5
    set_mask(layer, "weight", mask)
    quantize_weights(nn.Sequential(layer), Format(3, symmetric=False))
    assert (layer.weight[~mask] == 0).all()


# Whole models


def test_tied_tensors_are_quantized_together():
    model = nn.ModuleDict({"a": nn.Embedding(10, 6), "b": nn.Linear(6, 10, bias=False)})
    model["b"].weight = model["a"].weight
    quantize_weights(model, Format(2))
    assert (
        torch.equal(model["a"].weight, model["b"].weight)
        and len(model["a"].weight[0].unique()) <= 4
    )
    assert weight_of(model["a"]).original is weight_of(model["b"]).original
    assert len(weights(model)) == 1
    baked = materialize(model)
    assert torch.equal(baked["b"].weight, model["b"].weight)


def test_recurrent_layers_compute_with_their_rounded_weights():
    lstm, x = nn.LSTM(5, 7, num_layers=2), torch.randn(4, 3, 5)
    rounded = copy.deepcopy(lstm)
    quantize_weights(nn.Sequential(lstm), Format(2))
    with torch.no_grad():
        for weight in weights(rounded):
            weight.assign(getattr(lstm, weight.attribute))
    assert torch.equal(lstm(x)[0], rounded(x)[0])
    lstm(x)[0].sum().backward()
    assert weight_of(lstm, "weight_hh_l1").original.grad.abs().sum() > 0
    copied = copy.deepcopy(lstm)
    assert torch.equal(copied(x)[0], lstm(x)[0]) and torch.equal(
        materialize(copied)(x)[0], lstm(x)[0]
    )


def test_a_copy_can_be_changed_without_touching_the_original():
    model = quantize_weights(nn.Sequential(nn.Linear(6, 6), MoE(6, 8, 2)), {"*weight": Format(4)})
    before = [w.value.clone() for w in weights(model)]
    copied = copy.deepcopy(model)
    quantize_weights(copied, Format(2))
    quantize_weights(copied, {"*": None})
    materialize(model)
    assert all(torch.equal(w.value, b) for w, b in zip(weights(model), before))


def test_a_plan_takes_the_first_pattern_that_matches():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_weights(model, {"0.weight": None, "*.weight": Format(2), "*.bias": HALF})
    assert weight_of(model[0]).find(FakeQuantize) is None
    assert weight_of(model[1]).find(FakeQuantize).format.bits == 2
    assert torch.equal(model[1].bias, weight_of(model[1], "bias").original.half().float())
    quantize_weights(model, {"1.weight": Format(8)})
    assert weight_of(model[1]).find(FakeQuantize).format.bits == 8


# Bad input


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda: Format(7), "bits is 7; it must be one of 2, 3, 4, 5, 6, 8, 12, 16, 'ternary'"),
        (
            lambda: Format(4, granularity="group", group_size=0),
            "group_size is 0; it must be a whole number from 1",
        ),
        (lambda: Format("ternary", symmetric=False), "ternary format is symmetric"),
        (lambda: fake(torch.tensor([[1.0, math.nan]]), Format(8)), "1 NaN or infinite"),
        (lambda: fake(torch.tensor([[1.0, math.inf]]), Format(8)), "1 NaN or infinite"),
        (lambda: fake(torch.ones(2, 2, dtype=torch.complex64), Format(8)), "use ComplexQuantizer"),
        (lambda: fake(torch.ones(2, 2, dtype=torch.int64), Format(8)), "expects floating point"),
        (lambda: fake(torch.full((2, 2), 1e9), Format(4, range="mse")), "exceeds float16"),
        (
            lambda: ActivationQuantizer()(torch.ones(3, dtype=torch.complex64)),
            "use ComplexQuantizer",
        ),
        (lambda: ActivationQuantizer()(torch.ones(3)), "before calibration"),
        (lambda: ComplexQuantizer()(torch.ones(3)), "expects a complex tensor"),
        (lambda: ComplexQuantizer(mode="phase"), "mode is 'phase'; it must be one of 'separate'"),
        (lambda: calibrate(nn.Sequential(ActivationQuantizer()), []), "calibration got no batch"),
        (
            lambda: calibrate(nn.Sequential(ActivationQuantizer()), [torch.tensor([math.nan])]),
            "NaN or infinite activations",
        ),
        (
            lambda: quantize_weights(nn.Sequential(nn.Linear(2, 2)), {"nothing": Format(8)}),
            "no weight is named 'nothing'",
        ),
        (lambda: quantize_weights(nn.ReLU(), Format(8)), "no weight to quantize"),
        (lambda: GroupWiseQuantizer(HALF), "no codes to pack"),
        (lambda: QuantizedLinear(nn.Linear(2, 2)), "quantize_weights first"),
        (lambda: QuantizedMoELayer(MoE(4, 4, 2)), "quantize_weights first"),
    ],
)
def test_bad_input_gets_one_clear_sentence(build, text):
    with pytest.raises(ValueError, match=text):
        build()


# Activations and complex tensors


def test_calibration_runs_over_all_batches_in_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.5), ActivationQuantizer(symmetric=False), nn.Identity())
    model.train()
    model[2].eval()
    calibrate(model, [torch.tensor([[-1.0, 0.5]]), (torch.tensor([[0.0, 3.0]]), None)])
    assert (
        model[1].low.item() == -1 and model[1].high.item() == 3
    )  # with dropout on they would be 0 or doubled
    assert model.training and not model[2].training
    model(torch.full((1, 2), 50.0))
    assert model[1].high.item() == 3
    calibrate(model, [torch.ones(1, 2)])
    assert model[1].low.item() == 1 and model[1].high.item() == 1


def test_constant_zero_activations_are_calibrated():
    model = calibrate(nn.Sequential(ActivationQuantizer()), [torch.zeros(2, 2)])
    assert torch.equal(model(torch.zeros(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize("mode", ["separate", "joint", "polar"])
@pytest.mark.parametrize("channels", [None, 6])
def test_complex_quantizer_keeps_both_parts_and_both_gradients(mode, channels):
    torch.manual_seed(0)
    z = (
        torch.randn(4, 9, 6) * torch.logspace(-1, 0, 6) + 1j * 0.2 * torch.randn(4, 9, 6)
    ).requires_grad_()
    quantizer = calibrate(nn.Sequential(ComplexQuantizer(8, channels, mode)), [z.detach()])
    y = quantizer(z)
    assert y.shape == z.shape and y.dtype == torch.complex64
    error = (y - z).abs().max().item()
    assert 0 < error < 0.05 and (y.imag - z.imag).abs().max() < 0.05
    y.backward(torch.full_like(z, 2 + 3j))
    if mode == "polar":
        assert torch.isfinite(torch.view_as_real(z.grad)).all() and z.grad.abs().min() > 0
    else:
        assert torch.allclose(z.grad, torch.full_like(z, 2 + 3j))
    first, second = quantizer[0].codes(z)
    assert first.dtype == second.dtype == torch.int8 and first.shape == z.shape


def test_scales_of_the_two_parts_are_apart_or_shared():
    z = torch.complex(torch.tensor([[4.0, -4.0]]), torch.tensor([[0.5, -0.5]]))
    steps = {
        mode: calibrate(nn.Sequential(ComplexQuantizer(8, None, mode)), [z])[0]
        for mode in ("separate", "joint")
    }
    ratio = {
        mode: (q.first.qparams()[0] / q.second.qparams()[0]).item() for mode, q in steps.items()
    }
    assert ratio == {"separate": pytest.approx(8), "joint": 1}


def test_polar_phase_grid_covers_the_circle_whatever_was_seen():
    quantizer = calibrate(
        nn.Sequential(ComplexQuantizer(8, None, "polar")), [torch.tensor([1 + 0j, 1 + 0.1j])]
    )[0]
    z = torch.polar(torch.full((200,), 0.9), torch.linspace(-math.pi, math.pi, 200))
    assert (quantizer(z) - z).abs().max() < 0.9 * math.pi / 254 + 0.01


def test_per_channel_ranges_err_less_than_one_range():
    torch.manual_seed(0)
    spread = torch.logspace(-2, 0, 12)
    z = torch.randn(64, 12, dtype=torch.complex64) * spread
    error = {
        c: ((calibrate(nn.Sequential(ComplexQuantizer(8, c)), [z])(z) - z).abs() / spread).mean()
        for c in (None, 12)
    }
    assert error[12] < 0.2 * error[None]


def small_lm(**config):
    torch.manual_seed(0)
    return build_model(
        "ResNetBK",
        {"vocab_size": 60, "d_model": 16, "layers": 2, "d_ff": 24, "channels": 8, **config},
    ).eval()


def test_bk_core_in_int8_is_close_and_per_channel_closer():
    model, tokens = (
        small_lm(),
        torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(1)),
    )
    wanted, errors = model(tokens), {}
    for per_channel in (False, True):
        quantized = calibrate(quantize_bk_core(copy.deepcopy(model), 8, per_channel), [tokens])
        errors[per_channel] = (
            quantized(tokens) - wanted
        ).square().mean().item() / wanted.var().item()
    assert errors[True] < errors[False] < 0.03


def test_bk_core_modules_compute_between_their_quantizers():
    from kit.models.bk_core import staggered_reflection

    torch.manual_seed(0)
    v, energy, hopping, eta = (
        torch.randn(2, 10, 4),
        torch.zeros(4),
        torch.rand(2, 10, 4),
        torch.full((4,), 0.5),
    )
    core = PerChannelQuantizedBKCore(4)
    core.quantize_v.observing = core.quantize_g.first.observing = (
        core.quantize_g.second.observing
    ) = True
    exact = core(v, energy, hopping, eta)
    assert torch.allclose(exact, staggered_reflection(v - energy, hopping, eta), rtol=1e-6)
    core.quantize_v.observing = core.quantize_g.first.observing = (
        core.quantize_g.second.observing
    ) = False
    assert 0 < (core(v, energy, hopping, eta) - exact).abs().max() < 0.05
    codes_v, (real, imaginary) = core.codes(v, energy, hopping, eta)
    assert codes_v.dtype == real.dtype == imaginary.dtype == torch.int8
    assert isinstance(core, QuantizedBKCore)


# Packing and packed layers


@given(st.lists(st.integers(-128, 127), max_size=50), st.sampled_from(BITS))
def test_packing_is_exact_and_as_small_as_it_says(values, bits):
    format = Format(bits)
    codes = np.clip(np.array(values, np.int8), format.qmin, format.qmax)
    data = pack(codes, bits)
    assert (
        len(data)
        == packed_bytes(len(codes), bits)
        == math.ceil(len(codes) * (1.6 if bits == "ternary" else bits) / 8)
    )
    assert np.array_equal(unpack(data, len(codes), bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor", "rows"])
def test_group_wise_quantizer_gives_the_values_of_the_fake_quantizer(bits, granularity):
    x, format = (
        matrix((5, 7, 19), 3),
        Format(bits, bits == "ternary" or granularity == "rows", granularity, 8),
    )
    packed = GroupWiseQuantizer(format).encode(x)
    assert torch.equal(packed(), FakeQuantize(x, format)(x))
    scales = formats.block_count((35, 19), format) * (
        2 if format.symmetric else 2 + format.integer.itemsize
    )
    assert packed.nbytes == packed_bytes(x.numel(), bits) + scales


def test_group_wise_int4_takes_half_a_byte_and_scales():
    assert (
        GroupWiseQuantizer().encode(torch.randn(4, 128, 64)).nbytes
        == 4 * 128 * 64 // 2 + 2 * 4 * 128
    )


PLANS = [
    Format(8),
    Format(4, granularity="group", group_size=12),
    Format(4, False, "group", 5),
    Format("ternary", range="mse"),
    Format(3, granularity="tensor", scale="log8"),
    "original",
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_packed_model_equals_the_fake_quantized_one(plan, tied):
    model, tokens = small_lm(tied=tied), torch.randint(0, 60, (2, 16))
    quantize_weights(model, original_mix(model) if plan == "original" else plan)
    packed = pack_layers(model)
    assert torch.equal(packed(tokens), model(tokens))
    layers = [m for m in packed.modules() if isinstance(m, (QuantizedMoELayer, QuantizedLinear))]
    assert len(layers) >= 2 and packed.layers[0].moe.usage.shape == model.layers[0].moe.usage.shape
    assert packed.layers[0].moe.w_in.shape == model.layers[0].moe.w_in.shape
    assert torch.equal(pack_layers(packed)(tokens), packed(tokens))


def test_moe_layer_from_float_counts_usage_and_keeps_shapes():
    torch.manual_seed(0)
    moe, x = MoE(16, 32, 4).eval(), torch.randn(3, 5, 16)
    packed = QuantizedMoELayer.from_float(moe)
    y = packed(x)
    assert (
        y.shape == (3, 5, 16) and packed.usage.sum() == 15 and packed.router.packed.format.bits == 8
    )
    assert (y - moe(x)).square().mean() < 0.05 * moe(x).square().mean()
    packed.reset_usage()
    assert packed.usage.sum() == 0


# Other code


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_group_wise_codes_and_scales_equal_torchaos(bits, symmetric):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x, format = matrix((6, 64), 5), Format(bits, symmetric, "group", 16, scale="float32")
    kind = (
        primitives.MappingType.SYMMETRIC_NO_CLIPPING_ERR
        if symmetric
        else primitives.MappingType.ASYMMETRIC
    )
    block, span = (1, 16), (format.qmin, format.qmax)
    scale, zero = primitives.choose_qparams_affine(
        x,
        kind,
        block,
        torch.int8,
        *span,
        eps=1e-9,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    theirs = primitives.quantize_affine(x, block, scale, zero, torch.int8, *span)
    step = fake(x, format)
    codes, ours, our_zero = step.codes(x)
    if (
        symmetric
    ):  # torchao divides the negative side by |qmin|: compare where the largest value is positive
        same = (x.reshape(-1, 16).amax(1) >= -x.reshape(-1, 16).amin(1)).reshape(6, 4)
        assert same.any()
    else:
        same = torch.ones(6, 4, dtype=torch.bool)
        assert torch.equal(our_zero.reshape(6, 4).int(), zero.int())
    assert torch.allclose(ours.reshape(6, 4)[same], scale[same], rtol=1e-6)
    assert torch.equal(codes.reshape(6, 4, 16)[same], theirs.reshape(6, 4, 16)[same])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_its_own_norm(bits, symmetric):
    x, format = matrix((8, 64), 2), Format(bits, symmetric)
    error = [
        (formats.dequantize(formats.quantize(x, *grid, format), *grid) - x).abs().pow(0.7).sum(1)
        for grid in (formats.choose_qparams(x, format), hqq_qparams(x, format))
    ]
    assert (error[1] <= error[0] * 1.0001).all() and error[1].sum() < 0.99 * error[0].sum()


def test_hqq_shrinks_residuals_as_its_penalty_says(monkeypatch):
    """The threshold is a stationary point of |e|^p + beta / 2 (e - x)^2 for large x, 0 for small x;
    beta grows."""
    import sys

    module, x = (
        sys.modules["kit.quantization.hqq"],
        torch.tensor([-4.0, -0.01, 0.0, 0.02, 3.0, 9.0], dtype=torch.float64),
    )
    e = module.shrink(x, 10.0)
    slope = 0.7 * e.abs().pow(-0.3) * e.sign() + 10.0 * 0.7 * (e - x)
    assert (
        torch.equal(e[1:4], torch.zeros(3, dtype=torch.float64))
        and (slope[[0, 4, 5]].abs() < 0.01).all()
    )
    seen, original = [], module.shrink
    monkeypatch.setattr(module, "shrink", lambda x, beta: seen.append(beta) or original(x, beta))
    module.hqq_qparams(matrix((2, 32), 3), Format(3))
    assert len(seen) == 21 and all(a < b for a, b in zip(seen, seen[1:]))


def test_hqq_fixes_the_grid_of_a_model():
    model = hqq(nn.Sequential(nn.Linear(32, 8)), Format(3))
    step = weight_of(model[0]).find(FakeQuantize)
    assert torch.equal(step.scale, hqq_qparams(weight_of(model[0]).original, Format(3))[0])


@pytest.mark.parametrize("bits", [12, 8, 3, 2, "ternary"])
def test_compiled_rounding_is_that_of_torch(bits, monkeypatch):
    torch.manual_seed(0)
    found, weight, grad = [], 4 * torch.randn(7, 33), torch.randn(7, 33)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(kernels, "fits", lambda *_: False)
        x, scale = weight.clone().requires_grad_(), torch.full((7, 1), 0.3).requires_grad_()
        formats.fake_quantize(x, scale, None, Format(bits), 0.5).backward(grad)
        found.append(
            (formats.fake_quantize(x, scale, None, Format(bits)).detach(), x.grad, scale.grad)
        )
    (ours, dx, dscale), (torchs, dx_torch, dscale_torch) = found
    assert torch.equal(ours, torchs) and torch.equal(dx, dx_torch)
    torch.testing.assert_close(dscale, dscale_torch)
