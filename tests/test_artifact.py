"""The compressed file: exact in every layout, really as small as it says, and clear about
damage."""

import copy
import hashlib
import json
import math
import os
import re
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from kit import artifact
from kit.artifact.header import SAID, sealed, unsealed
from kit.artifact.layouts import LAYOUTS, Reader, Writer
from kit.budget import round_to_budget
from kit.core.steps import STEPS, Step, register_step
from kit.core.weights import copy_model, materialize, weight_of, weights
from kit.models import build_model
from kit.pruning.mask import Mask, set_mask
from kit.quantization import (
    HALF,
    ComplexQuantizer,
    FakeQuantize,
    Format,
    calibrate,
    original_mix,
    quantize_bk_core,
    quantize_weights,
    quantizers,
)
from kit.quantization.integers import QuantizedEmbedding, QuantizedLinear, pack_layers
from kit.quantization.packing import packed_bytes
from kit.quantization.token_tables import order_rows

FORMATS = [
    Format(8),
    Format(6, False, "tensor"),
    Format(5, False),
    Format(4, granularity="group", group_size=10),
    Format(3, False, "group", 7, scale="log8"),
    Format(2, granularity="rows", group_size=5, range="mse"),
    Format("ternary", granularity="tensor", range="mse"),
    Format(8, scale="float32"),
    Format(4, range="percentile"),
]
CONFIG = {"vocab_size": 50, "d_model": 16, "layers": 2, "d_ff": 24, "channels": 8, "experts": 2}


def small_lm(**changes):
    torch.manual_seed(0)
    return build_model("ResNetBK", {**CONFIG, **changes}).eval()


TOKENS = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))


def bits(x):
    return x.detach().contiguous().numpy().view(np.int32)


# Tensors


def rounded(weight, format, layout):
    """A weight as it comes back from its codes in one layout, and the bytes of the codes."""
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    quantizer = FakeQuantize(weight, format)
    write = Writer((layout,) if layout else tuple(LAYOUTS))
    entry = json.loads(json.dumps(quantizer.encode(weight, quantizer(weight), write)))
    entry = msgspec.convert(entry, FakeQuantize.settings)
    step, value = FakeQuantize.decode(
        entry, Reader(write.letters, write.blobs), weight_of(module), None, None
    )
    return quantizer(weight), value, step, write


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_are_exact_in_every_layout(format, layout):
    weight = torch.randn(4, 6, 23, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[weight.abs() < 0.05] = 0
    expected, value, step, write = rounded(weight, format, layout)
    assert write.letters[-1] == LAYOUTS[layout].letter
    assert np.array_equal(bits(value), bits(expected)) and np.array_equal(
        bits(step(value)), bits(expected)
    )


@pytest.mark.parametrize("layout", ["dense", "bitmap", "gaps"])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.bool,
        torch.complex64,
    ],
)
@pytest.mark.parametrize("shape", [(5, 7), (), (0, 3), (1,)])
def test_plain_tensors_are_exact_in_every_dtype(dtype, layout, shape):
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    if x.numel() > 3:
        x.view(-1)[::3] = 0
    y = returned(x, layout)
    assert torch.equal(y, x) and y.dtype == dtype and y.shape == x.shape


def returned(x, layout, like=None):
    write = Writer((layout,))
    write.tensor(x)
    return Reader(write.letters, write.blobs).tensor(x.shape, x.dtype, like)


def test_special_floats_come_back_to_the_bit():
    x = torch.tensor(
        [
            0.0,
            float("inf"),
            -float("inf"),
            float("nan"),
            1e-45,
            -0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
        ]
    )
    for layout in ("dense", "bitmap", "gaps"):
        assert np.array_equal(bits(returned(x, layout, like=x)), bits(x))
        with pytest.raises(artifact.ArtifactError, match="NaN or infinite"):
            returned(x, layout)


def test_the_smallest_layout_is_taken():
    rng = torch.Generator().manual_seed(0)
    spread = torch.rand(100, 100, generator=rng) - 0.5
    sparse = torch.where(torch.rand(100, 100, generator=rng) > 0.97, spread, 0.0)
    even = torch.randint(-7, 8, (100, 100), generator=rng).float()
    finer = torch.randint(-127, 128, (100, 100), generator=rng).float()
    for x, letter in ((spread, "d"), (sparse, "g")):
        write = Writer()
        write.tensor(x)
        assert write.letters == letter
    chosen = {}
    for name, weight, width in (
        ("even", finer, 8),
        ("sparse", sparse, 4),
        ("peaked", even * even.abs() ** 3, 4),
    ):
        format = Format(width, granularity="tensor")
        sizes = {layout: len(rounded(weight, format, layout)[3].blobs[-1]) for layout in LAYOUTS}
        write = rounded(weight, format, None)[3]
        assert len(write.blobs[-1]) == min(sizes.values()) and sizes["dense"] == packed_bytes(
            10_000, width
        )
        chosen[name] = write.letters[-1]
    assert chosen["peaked"] == "e" and chosen["even"] == "d"


# Models

PLANS = {
    "original mix": original_mix,
    "asymmetric": lambda m: Format(5, False, "group", 6),
    "half": lambda m: HALF,
    "ternary": lambda m: Format("ternary", range="mse"),
    "log scales": lambda m: Format(3, scale="log8"),
    "float": None,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_saved_and_loaded_models_agree_to_the_last_bit(plan, tied, tmp_path):
    model = small_lm(tied=tied)
    if PLANS[plan]:
        quantize_weights(model, PLANS[plan](model))
    size = artifact.save(model, tmp_path / "a")
    assert (
        size == os.stat(tmp_path / "a").st_size == artifact.describe(tmp_path / "a")["bytes"].sum()
    )
    loaded, trainable = artifact.load(tmp_path / "a"), artifact.load(tmp_path / "a", trainable=True)
    assert not loaded.training
    for other in (loaded, trainable, materialize(model)):
        assert np.array_equal(bits(other(TOKENS)), bits(model(TOKENS)))
    assert quantizers(trainable).keys() == quantizers(model).keys()
    again = artifact.save(trainable, tmp_path / "b")
    assert again == size and artifact.load(tmp_path / "b")(TOKENS).equal(model(TOKENS))


@pytest.mark.parametrize("learned", [False, True])
def test_masks_learned_steps_and_activations_come_back_for_training(learned, tmp_path):
    model = small_lm()
    for layer in model.layers:
        set_mask(layer.moe, "w_in", torch.rand_like(layer.moe.w_in) > 0.7)
    quantize_weights(model, Format(4, range="mse"), learned=learned)
    with torch.no_grad():
        for step in quantizers(model).values():
            if learned:
                step.scale.mul_(1.0123)
    calibrate(quantize_bk_core(model, 8, per_channel=True, mode="polar"), [TOKENS])
    artifact.save(model, tmp_path / "a")
    loaded = artifact.load(tmp_path / "a", trainable=True)
    assert loaded(TOKENS).equal(model(TOKENS)) and artifact.load(tmp_path / "a")(TOKENS).equal(
        model(TOKENS)
    )
    moe, same = model.layers[1].moe, loaded.layers[1].moe
    mask = weight_of(moe, "w_in").find(Mask).mask
    assert torch.equal(weight_of(same, "w_in").find(Mask).mask, mask)
    assert all(step.learned == learned for step in quantizers(loaded).values())
    assert isinstance(loaded.layers[0].mixer.quantize_g, ComplexQuantizer)
    loaded.train()(TOKENS).square().mean().backward()
    grad = weight_of(same, "w_in").original.grad
    assert grad[mask].abs().sum() > 0 and (grad[~mask] == 0).all()


def test_any_module_is_loaded_into_an_instance(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.lstm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LSTM(4, 6)
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.lstm(self.norm(self.conv(x)).mean(-1).permute(2, 0, 1))[0]))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 1, 8, 8)
    model.norm.running_mean += 0.3
    quantize_weights(model, Format(4))
    size = artifact.save(model, tmp_path / "a")
    for trainable in (False, True):
        assert torch.equal(artifact.load(tmp_path / "a", Net(), trainable)(x), model(x))
    assert size < artifact.float32_bytes(model)
    with pytest.raises(artifact.ArtifactError, match="pass load\\(path, model="):
        artifact.load(tmp_path / "a")


def test_writing_twice_gives_the_same_bytes_and_leaves_the_model_alone(tmp_path):
    model = quantize_weights(small_lm(), Format(4))
    before = model(TOKENS)
    artifact.save(model, tmp_path / "a")
    artifact.save(copy_model(model), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    state = torch.random.get_rng_state()
    artifact.load(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state) and model(TOKENS).equal(before)
    assert not [f for f in tmp_path.iterdir() if f.name not in "ab"]


def test_sizes_on_linear_dominated_models(tmp_path):
    """INT8 at least 3.9x, INT4 in groups of 128 at least 7.5x smaller than float32, without help
    from the range coder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    dense = artifact.float32_bytes(model)
    for layouts in (LAYOUTS, ("dense",)):
        for format, least in ((Format(8), 3.9), (Format(4, granularity="group"), 7.5)):
            size = artifact.save(
                quantize_weights(copy.deepcopy(model), format), tmp_path / "a", layouts
            )
            assert dense / size >= least


def test_expert_tensors_in_int4_groups_of_128_are_7_5_times_smaller(tmp_path):
    model = build_model(
        "ResNetBK", {"vocab_size": 50, "d_model": 128, "layers": 1, "d_ff": 256, "channels": 8}
    )
    quantize_weights(model, original_mix(model))
    artifact.save(model, tmp_path / "a", ("dense",))
    rows = artifact.describe(tmp_path / "a")
    rows = rows[rows.tensor.str.contains("moe.w_")]
    assert len(rows) == 2 and 4 * rows["values"].sum() / rows.bytes.sum() >= 7.5


# Damage


@pytest.fixture
def saved(tmp_path):
    artifact.save(quantize_weights(small_lm(), Format(4)), tmp_path / "a.kit")
    return tmp_path / "a.kit"


def test_every_flipped_bit_is_found(saved):
    data = saved.read_bytes()
    for position in np.random.default_rng(0).integers(4, len(data), 60):
        edited = bytearray(data)
        edited[position] ^= 1 << (position % 8)
        saved.write_bytes(edited)
        with pytest.raises(artifact.ArtifactError, match="damaged"):
            artifact.load(saved)


def test_every_cut_is_found(saved):
    data = saved.read_bytes()
    for length in [4, 5, 7, 8, 39, 40, 41, *np.linspace(42, len(data) - 1, 30).astype(int)]:
        saved.write_bytes(data[:length])
        with pytest.raises(artifact.ArtifactError, match="damaged"):
            artifact.load(saved)


@pytest.mark.parametrize("data", [b"", b"KI", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_no_artifacts(saved, data):
    saved.write_bytes(data)
    with pytest.raises(artifact.ArtifactError, match="is not a kit artifact"):
        artifact.load(saved)


def opened(path):
    with open(path, "rb") as file:
        header = unsealed(file, path)
        return header, [file.read(n) for entry in header["tensors"] for n in entry["sizes"]]


def rewrite(path, change):
    """The file with another header and a checksum that fits."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[4:8])[0]
    header, _ = opened(path)
    change(header)
    text = zlib.compress(json.dumps(header).encode())  # as files had it before the dictionary
    body = data[:4] + struct.pack("<I", len(text)) + text + data[8 + length : -32]
    path.write_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["tensors"].pop(),
        lambda h: h["tensors"][0].update(sizes=[1]),
        lambda h: h["tensors"][0]["sizes"].append(-1),
        lambda h: h["tensors"][0].update(name="other"),
        lambda h: h.pop("model"),
        lambda h: h["model"]["config"].update(vocab_size=51),
        lambda h: h["modules"].update({"layers.0.mixer.quantize_v": {"class": "Popen"}}),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(saved, change):
    rewrite(saved, change)
    with pytest.raises(artifact.ArtifactError):
        artifact.load(saved)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda h: h["model"]["config"].update(layers=10**12), "its config has layers"),
        (lambda h: h["model"]["config"].update(layers=700), "more layers than"),
        (lambda h: h["model"]["config"].update(vocab_size=2**40), "its config has vocab_size"),
        (lambda h: h["model"]["config"].update(d_model="16"), "d_model"),
        (lambda h: h["model"].update(more=1), "unknown field `more`"),
        (lambda h: h["tensors"][0].update(shape=[2**47, 2**47]), "hardly a model"),
        (lambda h: h["tensors"][0].update(shape=[-1, 16]), "int` >= 0"),
        (lambda h: h["tensors"][0].update(shape=16), "Expected `array`"),
        (lambda h: h["tensors"][0].update(dtype="float16"), "as float16 of shape"),
        (lambda h: h["tensors"][1].update(name=h["tensors"][0]["name"]), "two tensors of one name"),
        (lambda h: h["tensors"][0].update({"in": "zz"}), "layout"),
        (lambda h: h["tensors"][0].update(steps=[["=", 7]]), "shares step 7"),
        (lambda h: h["tensors"][0].update(steps=[["=", None]]), "Expected `int | object`"),
        (lambda h: h["tensors"][0]["steps"].append(["mask", {}]), "not in their order"),
        (lambda h: h["tensors"][0]["steps"][0][1].update(more=1), "unknown field `more`"),
        (lambda h: h["tensors"][0]["steps"][0][1].update(rows=7), "cannot be seen as 7 rows"),
        (lambda h: h.update(extra={"layers.0": 1}), "extra state of 'layers.0'"),
        (lambda h: h.update(modules={"layers.0": QUANTIZER}), "no place for a quantizer"),
        (lambda h: h.update(modules={"norm.quantize": QUANTIZER}), "not in the file"),
        (lambda h: h.update(modules={"": QUANTIZER}), "no place for a quantizer"),
    ],
)
def test_what_a_header_may_not_state_is_refused_before_anything_is_made(saved, change, says):
    rewrite(saved, change)
    for trainable in (False, True):
        start = time.process_time()
        with pytest.raises(artifact.ArtifactError, match=re.escape(says)) as error:
            artifact.load(saved, trainable=trainable)
        assert "\n" not in str(error.value) and str(saved) in str(error.value)
        assert time.process_time() - start < 2


QUANTIZER = {"class": "ActivationQuantizer", "bits": 8, "symmetric": True}
QUANTIZER |= {"channels": None, "bounds": None}


def test_a_header_that_unpacks_to_more_than_it_may_is_refused(saved):
    data = saved.read_bytes()
    bomb = zlib.compress(b" " * 2**27)
    body = data[:4] + struct.pack("<I", len(bomb)) + bomb
    saved.write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(artifact.ArtifactError, match="longer or shorter"):
        artifact.load(saved)


def test_a_header_longer_than_its_file_is_refused_before_it_is_unpacked(saved, monkeypatch):
    data = saved.read_bytes()[:-32]
    long = data[:4] + struct.pack("<I", len(data)) + data[8:]
    saved.write_bytes(long + hashlib.sha256(long).digest())
    monkeypatch.setattr(zlib, "decompressobj", lambda zdict: None)
    with pytest.raises(artifact.ArtifactError, match=f"{len(data)} bytes in a file of"):
        artifact.load(saved)


def test_headers_are_packed_with_a_dictionary_that_never_changes(saved):
    """Files with it and from before it are read alike."""
    assert zlib.adler32(SAID) == 1358907766
    size, before = saved.stat().st_size, artifact.load(saved)
    rewrite(saved, lambda header: None)
    assert size < saved.stat().st_size - 150
    for one, two in zip(before.parameters(), artifact.load(saved).parameters(), strict=True):
        assert torch.equal(one, two)


def resealed(path, name, part, change):
    """The file with one part of one tensor changed, and a checksum that fits."""
    header, blobs = opened(path)
    at = 0
    for entry in header["tensors"]:
        if entry["name"] == name:
            blobs[at + part] = change(bytes(blobs[at + part]))
            entry["sizes"][part] = len(blobs[at + part])
        at += len(entry["sizes"])
    path.write_bytes(b"".join(sealed(header, blobs)))


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_unless_the_model_has_them(special, tmp_path):
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("causal", torch.full((2, 2), special))

    path = tmp_path / "a"
    artifact.save(Net(), path)
    assert artifact.load(path, Net()).causal.isfinite().sum() == 0
    finite = Net()
    finite.causal.zero_()
    with pytest.raises(artifact.ArtifactError, match="'causal': it holds NaN or infinite"):
        artifact.load(path, finite)
    resealed(path, "weight", 0, lambda data: np.full(6, special, "f4").tobytes())
    with pytest.raises(artifact.ArtifactError, match="'weight': it holds NaN or infinite"):
        artifact.load(path, Net())
    with torch.no_grad():
        finite.weight[0, 0] = special
    with pytest.raises(ValueError, match="'weight' holds NaN or infinities"):
        artifact.save(finite, path)


def test_parts_that_contradict_their_step_are_refused(tmp_path):
    torch.manual_seed(0)
    path, model = tmp_path / "a", nn.Linear(40, 30)
    set_mask(model, "weight", torch.rand(30, 40) > 0.5)
    quantize_weights(model, Format(4, False, scale="float32", range="mse"))
    artifact.save(model, path, ("dense", "entropy"))
    good = path.read_bytes()
    header, blobs = opened(path)
    entry = next(entry for entry in header["tensors"] if entry["name"] == "weight")
    assert entry["in"] == "ddee"  # scales, zero points, codes, mask of zeros
    wrong = {
        0: [b"", lambda d: d[:-1], lambda d: b"\0" * len(d), lambda d: b"\xff" * len(d)],
        1: [lambda d: b"\x7f" * len(d), lambda d: d + b"1"],
        2: [lambda d: d[:-2], lambda d: d + b"1", lambda d: bytes([d[0]]) + d[2:]],
    }
    for part, changes in wrong.items():
        for change in changes:
            path.write_bytes(good)
            resealed(path, "weight", part, change if callable(change) else lambda d: b"")
            for trainable in (False, True):
                with pytest.raises(artifact.ArtifactError, match="'weight': "):
                    artifact.load(path, nn.Linear(40, 30), trainable)


def test_steps_of_anybody_are_told_of_alike(tmp_path, monkeypatch):
    @register_step("odd")
    class Odd(Step):
        rank, how = 50, None

        def forward(self, x):
            return x * math.inf if self.how == "inf" else x[:1] if self.how == "shape" else x

        def encode(self, x, stored, write):
            write.tensor(torch.ones(3))
            return {"a": 1}

        @classmethod
        def decode(cls, entry, read, weight, stored, parts):
            if cls.how == "large":
                read.tensor((10**12,), torch.float32)
            if cls.how != "unread":
                read.tensor((3,), torch.float16 if cls.how == "dtype" else torch.float32)
            return [cls(), None] if cls.how != "key" else entry["b"]

    monkeypatch.delitem(STEPS, "odd")
    monkeypatch.setitem(STEPS, "odd", Odd)
    model = quantize_weights(nn.Linear(4, 3), Format(4))
    weight_of(model).put(Odd())
    artifact.save(model, tmp_path / "a")
    for trainable in (False, True):
        artifact.load(tmp_path / "a", nn.Linear(4, 3), trainable)
        for how in ("inf", "shape", "large", "unread", "dtype", "key"):
            Odd.how = how
            with pytest.raises(artifact.ArtifactError, match="'weight': "):
                artifact.load(tmp_path / "a", nn.Linear(4, 3), trainable)
        Odd.how = None


def test_a_file_for_another_model_names_what_differs(saved):
    with pytest.raises(artifact.ArtifactError, match="shape"):
        artifact.load(saved, small_lm(vocab_size=51))
    with pytest.raises(
        artifact.ArtifactError,
        match="in the file but not in the model|in the model but not in the file",
    ):
        artifact.load(saved, small_lm(layers=1))
    with pytest.raises(FileNotFoundError):
        artifact.load(saved.with_name("none.kit"))


def test_tensors_are_listed_once_under_the_names_of_the_plain_model(saved):
    table = artifact.describe(saved)
    names = [weight.name for weight in weights(small_lm())]
    assert [name for name in table.tensor if name in names] == names
    assert set(table[table.tensor.str.endswith("w_in")].bits) == {4}


# Files of the version before

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["tables", "formats"])
def test_files_of_the_version_before_still_load(name, tmp_path):
    """Written by the code of KIT3, with the logits that it computed; every format, mask, layout and
    transform."""
    before, old = np.load(DATA / "kit3.npz"), DATA / f"kit3_{name}.kit"
    tokens = torch.arange(24)[None]
    for trainable in (False, True):
        model = artifact.load(old, trainable=trainable, parts=before["parts"])
        assert np.allclose(model(tokens).detach().numpy(), before[name], rtol=1e-5, atol=1e-5)
    assert artifact.save(model, tmp_path / "a") <= old.stat().st_size + 16  # steps told in full
    again = artifact.load(tmp_path / "a", parts=before["parts"])
    assert torch.equal(again(tokens), model(tokens))


def test_range_coded_files_of_the_first_versions_are_refused(tmp_path):
    body = b"KIT2" + (DATA / "kit3_tables.kit").read_bytes()[4 : -artifact.header.CHECKSUM]
    (tmp_path / "a").write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(artifact.ArtifactError, match="earlier version"):
        artifact.load(tmp_path / "a", parts=np.load(DATA / "kit3.npz")["parts"])


def test_rounded_and_arranged_models_are_packed_with_the_steps_behind_their_codes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    batches = torch.randn(6, 16, 64)
    round_to_budget(model, batches, artifact.float32_bytes(model) // 8)
    artifact.save(model, tmp_path / "a")
    with artifact.without_values():
        empty = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    packed = artifact.load(tmp_path / "a", empty, packed=True)
    assert [type(layer) for layer in packed] == [QuantizedLinear, nn.ReLU, QuantizedLinear]
    assert torch.equal(packed(batches[0]), model(batches[0]))
    held = sum(t.nbytes for t in (*packed.parameters(), *packed.buffers()))
    assert held < 0.4 * artifact.float32_bytes(model)
    table = small_lm(tied=True)
    order_rows(table, np.arange(50)[::-1].copy())
    packed = pack_layers(quantize_weights(table, Format(4)))
    assert type(packed.embedding) is QuantizedEmbedding
    assert torch.equal(packed(TOKENS), table(TOKENS))


def test_threads_that_read_at_once_leave_torch_as_it_was(tmp_path):
    model, plain = small_lm(), nn.Module.register_parameter
    artifact.save(model, tmp_path / "a")
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: artifact.load(tmp_path / "a"), range(32)))
    assert nn.Module.register_parameter is plain
    assert all(torch.equal(one(TOKENS), model(TOKENS)) for one in read)
    assert not nn.Linear(2, 2).weight.is_meta


class Mixed(nn.Module):
    """A table shared with an output layer of its own bias and, as a bare tensor, with the model;
    layers that can be packed and layers that cannot."""

    def __init__(self):
        super().__init__()
        self.table, self.output = nn.Embedding(30, 12), nn.Linear(12, 30)
        self.output.weight = self.bare = self.table.weight
        self.memory, self.inner = nn.LSTM(12, 12), nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, ids):
        x = self.norm(self.memory(self.table(ids))[0].mT).mT
        return self.output(torch.relu(self.inner(x))) + x @ self.bare.T


@pytest.mark.parametrize("which", ["*", "bare", "inner.*", "memory.*"])
def test_any_model_is_read_into_packed_layers(tmp_path, which):
    torch.manual_seed(0)
    model, other = Mixed(), Mixed()
    model(TOKENS % 30)  # statistics of the norm
    quantize_weights(model.eval(), {which: Format(4)})
    artifact.save(model, tmp_path / "a")
    with artifact.without_values():
        empty = Mixed()
    for into in (other, copy_model(model), empty):
        packed = artifact.load(tmp_path / "a", into, packed=True)
        assert torch.equal(packed(TOKENS % 30), model(TOKENS % 30))
        assert not any(p.is_meta for p in packed.parameters())
        assert (type(packed.inner) is nn.Linear) == (which not in ("*", "inner.*"))
