import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kit import artifact
from kit.models import build_model
from kit.training.evaluation import evaluate
from notebooks.reference.pointer import LONGEST, PointerLM, PointerLMConfig, fit_pointer, places

VOCABULARY = 12
SHAPE = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "layers": 1,
    "experts": 2,
    "d_ff": 8,
    "channels": 4,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("ResNetBK", SHAPE).eval()


def pointing(model):
    pointer = PointerLM(PointerLMConfig("ResNetBK", SHAPE), model).eval()
    with torch.no_grad():
        (
            pointer.similarity.fill_(1.5),
            pointer.match.copy_(torch.tensor([0.7, 1.9, 2.4])),
            pointer.sentinel.fill_(1.1),
        )
    return pointer


def brute_force(pointer, tokens):
    """The definition, place by place, in float64."""
    hidden, (weight, bias) = pointer.model.hidden(tokens[None])[0].double(), pointer.model.output()
    hidden, result = hidden.detach(), []
    own = F.linear(hidden, weight.double(), bias.double()).softmax(-1).detach()
    for t in range(len(tokens)):
        scores = []
        for i in range(t):
            length = 0
            while length < LONGEST and length <= i and tokens[t - length] == tokens[i - length]:
                length += 1
            likeness = float(hidden[t] @ hidden[i] / hidden[t].norm() / hidden[i].norm())
            scores.append(
                pointer.similarity.item() * likeness
                + (pointer.match[length - 1].item() if length else 0)
            )
        powers = np.exp([*scores, pointer.sentinel.item()])
        shares = powers / powers.sum()
        row = shares[-1] * own[t].numpy()
        for i in range(t):
            row[tokens[i + 1]] += shares[i]
        result.append(row)
    return np.log(result)


def test_is_the_mixture_of_its_definition(model):
    tokens, pointer = torch.randint(4, (2, 11)), pointing(model)
    found = pointer(tokens).detach()
    for row, truth in zip(found, tokens):
        np.testing.assert_allclose(row, brute_force(pointer, truth), rtol=2e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 11))


def test_never_sees_the_future(model):
    pointer, tokens = pointing(model), torch.randint(4, (1, 12))
    other = tokens.clone()
    other[0, 7:] = torch.randint(4, VOCABULARY, (5,))
    torch.testing.assert_close(pointer(tokens)[:, :7], pointer(other)[:, :7])


def test_matches_count_the_tokens_that_agree():
    tokens = torch.tensor([[1, 2, 3, 9, 1, 2, 3]])
    _, length = places(torch.randn(1, 7, 4), tokens)
    assert (
        length[0, 6, 2] == 3
        and length[0, 5, 1] == 2
        and length[0, 4, 0] == 1
        and length[0, 6, 1] == 0
    )


def test_fit_finds_the_likeliest_and_leaves_the_model_alone(model):
    """A text of random phrases said twice: without the pointer no better than chance, with it the
    second half is known."""
    torch.manual_seed(1)
    phrases = torch.randint(VOCABULARY, (32, 8))
    windows = torch.cat([phrases, phrases], 1)
    batches = [(windows[:16, :-1], windows[:16, 1:]), (windows[16:, :-1], windows[16:, 1:].clone())]
    batches[1][1][:, -2:] = -100
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointer = fit_pointer(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    best = evaluate(pointer, batches)
    assert best.loss < 0.75 * evaluate(model, batches).loss and not best.classifier
    for number in (pointer.similarity, pointer.match, pointer.sentinel):
        for change in (0.8, 1.25):
            kept = number.data.clone()
            number.data.mul_(change)
            assert evaluate(pointer, batches).loss >= best.loss - 1e-6
            number.data.copy_(kept)


def test_file_holds_five_numbers_more(model, tmp_path):
    pointer = pointing(model)
    more = artifact.save(pointer, tmp_path / "pointer.kit") - artifact.save(
        model, tmp_path / "model.kit"
    )
    assert 0 < more < 300
    tokens = torch.randint(VOCABULARY, (2, 9))
    assert torch.equal(artifact.load(tmp_path / "pointer.kit")(tokens), pointer(tokens))


def test_refuses_other_models():
    for other in (torch.nn.Linear(2, 2), build_model("DigitsMLP", {})):
        with pytest.raises(ValueError, match="language models"):
            fit_pointer(other, [])


def test_refuses_a_loader_without_tokens(model):
    with pytest.raises(ValueError, match="no tokens"):
        fit_pointer(model, [])
