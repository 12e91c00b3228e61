import pytest
import torch

from kit.models import build_model
from kit.training import TrainConfig, train
from kit.training.losses import next_token_loss
from notebooks.reference.plain import (
    plain_experts,
    plain_next_token_loss,
    plain_train,
    training_latency,
)

SMALL = {"vocab_size": 50, "d_model": 8, "layers": 2, "experts": 3, "d_ff": 16, "channels": 4}


def batches(count=3):
    torch.manual_seed(1)
    tokens = torch.randint(50, (count, 4, 9))
    return [(rows[:, :-1], rows[:, 1:]) for rows in tokens]


@pytest.mark.parametrize("top_k", [1, 2])
def test_plain_loop_computes_the_same(top_k):
    torch.manual_seed(0)
    model = build_model("ResNetBK", SMALL | {"top_k": top_k})
    plain = plain_experts(model)
    batch = batches()[0]
    ours, theirs = next_token_loss(model, batch), plain_next_token_loss(plain, batch)
    torch.testing.assert_close(ours, theirs)
    ours.backward(), theirs.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_plain_training_learns_as_ours_does():
    torch.manual_seed(0)
    model = build_model("ResNetBK", SMALL)
    plain = plain_experts(model)
    data = batches(1) * 30
    last = plain_train(plain, data, 30)
    config = TrainConfig(steps=30, warmup=0, final_lr=1)
    assert last == pytest.approx(
        train(model, data, config, log=False).history[-1]["loss"], rel=0.02
    )


def test_training_latency_names_the_loops():
    model = build_model("ResNetBK", SMALL)
    before = [p.clone() for p in model.parameters()]
    assert list(training_latency(model, batches(1), seconds=0)) == ["plain", "float32", "bfloat16"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
