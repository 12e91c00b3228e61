import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kit.core.protocols import LanguageModel
from kit.training.evaluation import Evaluation, evaluate, paired_interval


class ToyLM(LanguageModel):
    def __init__(self, vocab_size=13, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dropout = nn.Embedding(vocab_size, width), nn.Dropout(0.5)
        self.head = nn.Linear(width, vocab_size)

    def hidden(self, tokens):
        return self.dropout(self.embedding(tokens))

    def output(self):
        return self.head.weight, self.head.bias


def batches(lengths=(3, 3, 1), seed=0):
    g = torch.Generator().manual_seed(seed)
    data = [
        (torch.randint(13, (n, 6), generator=g), torch.randint(13, (n, 6), generator=g))
        for n in lengths
    ]
    data[-1][1][-1, 2:] = -100
    return data


def test_tokens_are_weighed_not_batches():
    model = ToyLM()
    result = evaluate(model, batches())
    losses = [
        F.cross_entropy(model.head(model.embedding(x)).flatten(0, 1), y.flatten(), reduction="none")
        for x, y in batches()
    ]
    hits = [(model.head(model.embedding(x)).argmax(-1) == y).sum().item() for x, y in batches()]
    assert result.nll == pytest.approx(sum(loss.sum().item() for loss in losses), rel=1e-6)
    assert (
        result.tokens == 38
        and result.window_tokens.tolist() == [6] * 6 + [2]
        and result.correct == sum(hits)
    )
    assert (
        result.perplexity == pytest.approx(math.exp(result.nll / 38))
        and result.accuracy == sum(hits) / 38
    )
    assert result.bits_per_byte(100) == pytest.approx(result.nll / 100 / math.log(2))
    assert evaluate(model, batches()).nll == result.nll


def test_modes_are_restored_and_gradients_off():
    model = ToyLM().train()
    model.head.eval()
    evaluate(model, batches())
    assert model.training and model.dropout.training and not model.head.training
    with pytest.raises(IndexError):
        evaluate(model, [(torch.tensor([[99]]), torch.tensor([[0]]))])
    assert model.training and all(p.grad is None for p in model.parameters())


def test_classifier_and_plain_language_model():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4), torch.randn(50, 3), torch.randint(4, (50,))
    result = evaluate(model, [(x[:30], y[:30]), (x[30:], y[30:])])
    assert (
        result.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
        and result.tokens == 50
    )
    assert result.accuracy == (model(x).argmax(1) == y).double().mean().item()
    low, high = result.interval()
    assert 0 <= low < result.accuracy < high <= 1
    kit_lm = ToyLM()
    foreign = nn.Sequential(kit_lm.embedding, kit_lm.head)
    theirs, ours = evaluate(foreign, batches()), evaluate(kit_lm, batches())
    np.testing.assert_allclose(theirs.window_nll, ours.window_nll, rtol=1e-6)
    assert theirs.interval() == pytest.approx(ours.interval())  # of the perplexity for both


def evaluation(window_nll, tokens=10):
    n = len(window_nll)
    return Evaluation(
        window_nll.sum(), n * tokens, window_nll, np.full(n, tokens), 0, np.zeros(n, int)
    )


def test_interval_matches_the_normal_theory():
    nll = np.random.default_rng(0).normal(50, 8, 400)
    result = evaluation(nll)
    low, high = np.log(result.interval())
    half = 1.96 * nll.std() / 10 / math.sqrt(400)
    assert low == pytest.approx(result.loss - half, abs=0.1 * half) and high == pytest.approx(
        result.loss + half, abs=0.1 * half
    )
    assert result.interval(seed=1) == result.interval(seed=1) != result.interval(seed=2)
    narrow = result.interval(level=0.5)
    assert np.exp(low) < narrow[0] < result.perplexity < narrow[1] < np.exp(high)


def test_paired_interval_is_narrower_and_signed():
    rng = np.random.default_rng(0)
    a = evaluation(rng.normal(50, 8, 300))
    b = evaluation(a.window_nll + rng.normal(0.5, 1, 300))
    low, high = paired_interval(a, b)
    assert 0 < low < 0.05 < high and high - low < 0.2 * (
        np.log(a.interval()[1]) - np.log(a.interval()[0])
    )
    assert paired_interval(b, a) == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="different windows"):
        paired_interval(a, evaluation(a.window_nll[1:]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no tokens"):
        evaluate(ToyLM(), [])
    with pytest.raises(ValueError, match="no tokens"):
        evaluate(ToyLM(), [(torch.zeros(1, 2, dtype=int), torch.full((1, 2), -100))])
    model = ToyLM()
    model.head.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="7 of 7 windows is not finite"):
        evaluate(model, batches())
    assert evaluation(np.array([1e5])).perplexity == math.inf


def test_batches_and_outputs_of_other_models():
    class Returns(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            torch.manual_seed(0)
            self.hidden, self.output, self.wrap = nn.Linear(3, 5), nn.Linear(5, 4), wrap

        def forward(self, x, scale=1.0):
            return self.wrap(self.output(self.hidden(x * scale)))

    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    plain = evaluate(Returns(lambda z: z), [(x, y)])
    for wrap in (lambda z: (z, x), lambda z: {"logits": z, "loss": z.sum()}):
        assert evaluate(Returns(wrap), [{"x": x, "labels": y}]).nll == plain.nll
    halved = evaluate(Returns(lambda z: z), [(2 * x, torch.tensor(0.5), y)])
    assert halved.nll == pytest.approx(plain.nll) and halved.classifier
    with pytest.raises(ValueError, match="holds no targets"):
        evaluate(Returns(lambda z: z), [x])
    for labels in (y.int(), y.byte(), F.one_hot(y, 4).float()):
        other = evaluate(Returns(lambda z: z), [(x, labels)])
        assert other.nll == pytest.approx(plain.nll) and other.correct == plain.correct
        assert other.classifier and other.tokens == 6
    ignored = evaluate(Returns(lambda z: z), [(x, torch.where(y == y[0], -100, y))])
    assert ignored.tokens == (y != y[0]).sum() and ignored.correct <= plain.correct
    pixels = evaluate(nn.Conv2d(3, 4, 1), [(torch.randn(2, 3, 6, 6), torch.randint(4, (2, 6, 6)))])
    assert pixels.tokens == 72 and not pixels.classifier
