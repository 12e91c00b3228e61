from types import SimpleNamespace as Named

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kit.core.protocols import LanguageModel
from kit.models import build_model
from kit.training.losses import (
    VocabularySample,
    chunked_linear_loss,
    classification_loss,
    linear_cross_entropy,
    linear_token_losses,
    logits_of,
    next_token_loss,
    training_loss,
)


def problem(
    shape=(3, 5), vocab_size=17, width=6, dtype=torch.float64, bias=True, seed=0, scale=1.0
):
    g = torch.Generator().manual_seed(seed)
    hidden = (
        (torch.randn(*shape, width, generator=g, dtype=torch.float64) * scale)
        .to(dtype)
        .requires_grad_()
    )
    weight = (
        torch.randn(vocab_size, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    )
    offset = (
        torch.randn(vocab_size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        if bias
        else None
    )
    return hidden, weight, offset, torch.randint(vocab_size, shape, generator=g)


def reference(hidden, weight, bias, targets):
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None])


@given(
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 50),
    st.booleans(),
    st.integers(0, 99),
)
def test_equals_cross_entropy_of_all_logits(tokens, vocab_size, width, chunk, bias, seed):
    hidden, weight, offset, targets = problem((tokens,), vocab_size, width, bias=bias, seed=seed)
    targets[torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.2] = -100
    targets[0] = 0
    loss = linear_cross_entropy(hidden, weight, offset, targets, chunk=chunk)
    expected = reference(hidden, weight, offset, targets)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        gradients(loss, hidden, weight, offset), gradients(expected, hidden, weight, offset)
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    hidden, weight, bias, targets = problem((2, 4))
    assert torch.autograd.gradcheck(
        lambda h, w, b: 3 * linear_cross_entropy(h, w, b, targets, chunk=3), (hidden, weight, bias)
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_low_precision_is_as_good_as_its_inputs(dtype, tolerance):
    hidden, weight, bias, targets = problem((4, 64), 999, 16, dtype, scale=0.3)
    loss, expected = (
        linear_cross_entropy(hidden, weight, bias, targets, chunk=50),
        reference(hidden, weight, bias, targets),
    )
    assert loss.dtype == torch.float32 and abs(loss - expected) < tolerance * expected
    for ours, theirs in zip(
        gradients(loss, hidden, weight, bias), gradients(expected, hidden, weight, bias)
    ):
        assert ours.dtype == dtype and (ours - theirs).norm() < 2 * tolerance * theirs.norm()


def test_autocast_keeps_float32_gradients():
    tensors = *arguments, targets = problem((4, 64), 999, 16, torch.float32, scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*tensors)
    expected = reference(*tensors)
    assert loss.dtype == torch.float32 and abs(loss - expected) < 4e-3 * expected
    for ours, theirs in zip(gradients(loss, *arguments), gradients(expected, *arguments)):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.01 * theirs.norm()


def test_huge_logits_stay_exact():
    hidden, weight, bias, targets = problem((2, 8), dtype=torch.float32, scale=1e4)
    loss, expected = (
        linear_cross_entropy(hidden, weight, bias, targets),
        reference(hidden, weight, bias, targets),
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        linear_token_losses(hidden, weight, bias, targets)[0].mean().double(),
        expected,
        rtol=1e-6,
        atol=0,
    )


def test_frozen_tensors_get_no_gradient_and_trained_ones_do():
    hidden, weight, bias, targets = problem()
    full = gradients(linear_cross_entropy(hidden, weight, bias, targets), hidden, weight, bias)
    linear_cross_entropy(hidden, weight.detach(), bias.detach(), targets).backward()
    assert torch.equal(hidden.grad, full[0]) and weight.grad is None
    linear_cross_entropy(hidden.detach(), weight, bias.detach(), targets).backward()
    assert torch.equal(weight.grad, full[1]) and bias.grad is None
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert not loss.requires_grad and torch.allclose(loss, reference(hidden, weight, bias, targets))


def test_token_losses_and_hits():
    hidden, weight, bias, targets = problem((4, 30), vocab_size=5)
    targets[1, 3:] = -100
    losses, hits = linear_token_losses(hidden, weight, bias, targets, chunk=7)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        4, 30
    )
    torch.testing.assert_close(losses, expected.detach())
    assert torch.equal(hits, logits.argmax(-1) == targets) and losses.shape == targets.shape
    constant = linear_token_losses(torch.zeros(6, 2), torch.ones(3, 2), None, torch.arange(6) % 3)
    assert constant[1].tolist() == [True, False, False] * 2  # a tie counts once, as argmax does


def test_one_block_of_logits_is_all_there_is(monkeypatch):
    monkeypatch.setattr("kit.training.losses.CPU_BLOCK", 8 * 1000)
    sizes, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **kw: (sizes.append(size), empty(*size, **kw))[1]
    )
    linear_cross_entropy(*problem((20, 10), vocab_size=50)).backward()
    assert (20, 50) in sizes and max(size[0] * (size[1:] or (1,))[0] for size in sizes) == 1000


def test_tied_and_auxiliary_loss():
    class Tied(LanguageModel):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4, dtype=torch.float64)

        def hidden(self, tokens):
            return self.embedding(tokens)

        def output(self):
            return self.embedding.weight, None

        def auxiliary_loss(self):
            return self.embedding.weight.square().sum()

    model, tokens = Tied(), torch.arange(6).view(2, 3)
    weight = model.embedding.weight
    expected = (
        F.cross_entropy((weight[tokens] @ weight.T).flatten(0, 1), (tokens + 1).flatten())
        + 0.01 * weight.square().sum()
    )
    loss = next_token_loss(model, (tokens, tokens + 1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, weight), gradients(expected, weight))


def test_classification_loss():
    model, x, labels = nn.Linear(3, 4), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(
        classification_loss(model, (x, labels)), F.nll_loss(model(x).log_softmax(1), labels)
    )


def test_misfits_are_named():
    hidden, weight, bias, targets = problem()
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, bias, targets[:, 1:])
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden[..., 1:], weight, bias, targets)
    with pytest.raises(ValueError, match="bias has shape"):
        linear_cross_entropy(hidden, weight, bias[1:], targets)
    with pytest.raises(ValueError, match="outside the vocabulary of 17"):
        linear_token_losses(hidden, weight, bias, targets + 17)


def test_a_batch_without_targets_that_count_teaches_nothing():
    hidden, weight, bias, targets = problem()
    none = torch.full_like(targets, -100)
    loss = linear_cross_entropy(hidden, weight, bias, none)
    assert loss == 0 and not any(g.any() for g in gradients(loss, hidden, weight, bias))
    assert linear_cross_entropy(hidden.detach(), weight.detach(), bias.detach(), none) == 0
    model, x = nn.Linear(3, 4), torch.randn(2, 3)
    loss = classification_loss(model, (x, torch.tensor([-100, -100])))
    loss.backward()
    assert loss == 0 and not model.weight.grad.any()
    one = classification_loss(model, (x, torch.tensor([-100, 2])))
    torch.testing.assert_close(one, F.cross_entropy(model(x)[1:], torch.tensor([2])))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees():
    hidden, weight, bias, targets = problem((4, 64), 999, 16, torch.float32)
    on_gpu = linear_cross_entropy(
        *(
            t.detach().cuda().requires_grad_(t.is_floating_point())
            for t in (hidden, weight, bias, targets)
        )
    )
    torch.testing.assert_close(
        on_gpu.cpu().double(), reference(hidden, weight, bias, targets), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_weight_shows_in_the_loss(bad, dtype):
    hidden, weight, bias, targets = problem(vocab_size=500, dtype=dtype)
    weight.data[3, 2] = bad
    assert not linear_cross_entropy(hidden, weight, bias, targets).isfinite()


def test_bfloat16_keeps_the_gradient_of_learned_tokens():
    hidden, weight, _, _ = problem((64,), 50, 16, torch.bfloat16)
    targets = (hidden @ weight.T).argmax(-1)
    hidden = (6 * hidden).detach().requires_grad_()
    loss, expected = (
        linear_cross_entropy(hidden, weight, None, targets),
        reference(hidden, weight, None, targets),
    )
    assert expected < 0.1 and abs(loss - expected) < 0.15 * expected
    ours, theirs = (g.double() for (g,) in (gradients(loss, weight), gradients(expected, weight)))
    assert (
        ours - theirs
    ).norm() < 0.15 * theirs.norm()  # bfloat16 rounds logits near 40 by up to 0.13
    assert ours.sum(0).norm() < 0.01 * ours.norm()  # errors of a token add up to 0, as they must


def test_a_sample_of_the_vocabulary_estimates_the_denominator_without_bias():
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(200, 8), torch.randn(200), torch.randn(8)
    targets, sample = torch.tensor([3, 150, -100]), VocabularySample(frequent=20, every=4)
    whole, draws = (weight @ hidden + bias).double().exp().sum(), []
    for _ in range(4000):
        tokens, _ = sample.draw(targets, 200)
        own, (part, part_bias) = sample.restrict(targets, (weight, bias))
        draws.append((part @ hidden + part_bias).double().exp().sum())
    draws = torch.stack(draws)
    assert abs(draws.mean() - whole) < 4 * draws.std() / len(draws) ** 0.5
    assert {*range(20), 150} <= set(tokens.tolist()) and tokens.equal(tokens.sort().values)
    assert torch.equal(part[own[:2]], weight[targets[:2]]) and own[2] == -100


def test_a_sample_of_everything_is_the_loss_itself():
    torch.manual_seed(0)
    model = build_model("ResNetBK", {"vocab_size": 60, "d_model": 16, "layers": 1, "channels": 4})
    batch = torch.randint(0, 60, (2, 9)), torch.randint(0, 60, (2, 9))
    batch[1][0, 0] = -100
    whole = next_token_loss(model, batch)
    for sample in (VocabularySample(frequent=60), VocabularySample(frequent=1, every=1)):
        torch.testing.assert_close(next_token_loss(model, batch, sample), whole)


@given(
    st.integers(1, 40), st.integers(1, 30), st.integers(1, 50), st.booleans(), st.integers(0, 99)
)
def test_any_function_of_logits_in_chunks(tokens, vocab_size, chunk, bias, seed):
    hidden, weight, offset, targets = problem((tokens,), vocab_size, bias=bias, seed=seed)

    def focal(logits, rows):
        log_p = logits.log_softmax(-1).gather(1, targets[rows, None])
        return -((1 - log_p.exp()) ** 2 * log_p).sum(), log_p.sum()

    loss, log_p = chunked_linear_loss(hidden, weight, offset, focal, chunk)
    expected, plain = focal(F.linear(hidden, weight, offset), slice(None))
    torch.testing.assert_close((loss, log_p), (expected, plain))
    assert not log_p.requires_grad
    torch.testing.assert_close(
        gradients(3 * loss, hidden, weight, offset), gradients(3 * expected, hidden, weight, offset)
    )


def test_a_function_of_bfloat16_logits_sees_float32():
    hidden, weight, bias, targets = problem((64,), 99, 16, torch.bfloat16, scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss, kinds = chunked_linear_loss(
            hidden,
            weight,
            bias,
            lambda z, rows: (F.cross_entropy(z, targets[rows]), torch.tensor(z.itemsize)),
            64,
        )
    expected = reference(hidden, weight, bias, targets)
    assert loss.dtype == torch.float32 and kinds == 4 and abs(loss - expected) < 1e-5 * expected
    ours, theirs = gradients(loss, hidden, weight, bias), gradients(expected, hidden, weight, bias)
    assert all(
        a.dtype == torch.bfloat16 and (a - b).norm() < 0.01 * b.norm() for a, b in zip(ours, theirs)
    )


def test_logits_are_found_in_what_models_return():
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    for output in (
        logits,
        (logits, None),
        {"loss": logits.sum(), "logits": logits},
        [logits, targets],
    ):
        assert logits_of(output, targets) is logits
    images = torch.randn(2, 4, 6, 7)
    assert torch.equal(logits_of(images, torch.zeros(2, 6, 7)), images.permute(0, 2, 3, 1))
    square = torch.randn(2, 4, 4, 4)  # either axis could be the classes
    assert torch.equal(logits_of(square, torch.zeros(2, 4, 4)), square.permute(0, 2, 3, 1))
    assert torch.equal(logits_of(square[0], torch.zeros(4, 4)), square[0])


def test_classifiers_of_tokens_pixels_and_soft_labels():
    x, labels = torch.randn(2, 6, 3), torch.randint(4, (2, 6))
    model = nn.Linear(3, 4)
    expected = F.cross_entropy(model(x).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(classification_loss(model, {"input": x, "labels": labels}), expected)
    soft = F.one_hot(labels, 4).float()
    torch.testing.assert_close(classification_loss(model, (x, soft)), expected)
    pixels, convolution = torch.randint(4, (2, 5, 5)), nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 5)
    expected = F.cross_entropy(convolution(x), pixels)
    torch.testing.assert_close(classification_loss(convolution, (x, pixels)), expected)
    torch.testing.assert_close(classification_loss(convolution, (x, pixels.byte())), expected)


def test_targets_that_are_no_classes_are_refused_in_one_sentence():
    model, x = nn.Linear(3, 4), torch.randn(2, 3)
    for batch, message in (
        (x, "holds no targets"),
        ((x, {"a": x}), "a dict of targets"),
        ((x, torch.tensor([1, 4])), "span 1..4, outside the vocabulary of 4"),
        ((x, torch.tensor([-1, 2])), "span -1..2"),
        ((x, torch.zeros(2, 1)), r"float32 of shape \(2, 1\) for logits \(2, 4\)"),
        ((x, torch.ones(2, 4)), "probabilities over the last axis"),
    ):
        with pytest.raises(ValueError, match=message):
            classification_loss(model, batch)
    with pytest.raises(ValueError, match="a loss of your own"):  # would be 0 whatever is predicted
        classification_loss(nn.Linear(3, 1), (x, torch.ones(2, 1)))
    with pytest.raises(ValueError, match="Linear is no LanguageModel: adapt it"):
        next_token_loss(model, (x, x))


def test_a_model_that_takes_the_labels_is_trained_with_the_loss_it_returns():
    class Shifting(nn.Module):
        def __init__(self, returns):
            super().__init__()
            self.layer, self.returns = nn.Linear(1, 5), returns

        def forward(self, x, labels=None):
            logits = self.layer(x)
            loss = None if labels is None else F.cross_entropy(logits[:-1], labels[1:])
            return self.returns(loss, logits)

    x, labels = torch.randn(6, 1), torch.randint(5, (6,))
    for returns in (lambda a, b: {"loss": a, "logits": b}, lambda a, b: Named(loss=a, logits=b)):
        model = Shifting(returns)
        expected = F.cross_entropy(model.layer(x)[:-1], labels[1:])
        batch = {"x": x, "labels": labels}
        torch.testing.assert_close(training_loss(model)(model, batch), expected)
        torch.testing.assert_close(
            classification_loss(model, (x, labels)), F.cross_entropy(model.layer(x), labels)
        )
    with pytest.raises(ValueError, match="takes 'labels' and returns no loss"):
        classification_loss(Shifting(lambda a, b: b), batch)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_narrow_integers_are_targets(dtype):
    model = build_model("ResNetBK", {"vocab_size": 60, "d_model": 8, "layers": 1, "channels": 4})
    tokens = torch.randint(0, 60, (2, 9))
    for sample in (None, VocabularySample(frequent=60)):
        losses = [
            next_token_loss(model, (tokens, tokens.to(d)), sample) for d in (dtype, torch.int64)
        ]
        assert losses[0] == losses[1]


def test_the_loss_of_a_model_follows_from_what_it_is():
    class Tutorial(nn.Module):
        """Layers that happen to be called as a language model's methods."""

        def __init__(self):
            super().__init__()
            self.hidden, self.output = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.output(self.hidden(x))

    assert training_loss(Tutorial()) is classification_loss
    config = {"d_model": 4, "layers": 1, "channels": 4}
    assert training_loss(build_model("ResNetBK", {"vocab_size": 60, **config})) is next_token_loss
    large = training_loss(build_model("ResNetBK", {"vocab_size": 20_000, **config}))
    assert isinstance(large.keywords["sample"], VocabularySample)
