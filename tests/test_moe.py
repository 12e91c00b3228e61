import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kit.models import MoE
from kit.models.moe import all_experts, grouped_experts


def naive(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """One token at a time, one expert at a time."""
    out = torch.zeros_like(x)
    for index in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).reshape(-1, x.ndim - 1):
        token = x[tuple(index)]
        _, (gates,), (chosen,) = moe.route(token.unsqueeze(0))
        for gate, e in zip(gates, chosen):
            hidden = F.gelu(moe.w_in[e] @ token + moe.b_in[e])
            out[tuple(index)] += gate * (moe.w_out[e] @ hidden + moe.b_out[e])
    return out


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_equals_a_loop_over_tokens(experts, top_k, tokens, training, seed):
    torch.manual_seed(seed)
    moe = MoE(5, 7, experts, min(top_k, experts)).double().train(training)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, tokens, 5, dtype=torch.float64)
    torch.testing.assert_close(moe(x), naive(moe, x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_equal_those_of_the_loop(top_k):
    torch.manual_seed(0)
    moe = MoE(4, 6, 3, top_k).double()
    x = torch.randn(17, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(17, 4, dtype=torch.float64)
    inputs = [x, *moe.parameters()]
    for ours, theirs in zip(
        *(
            torch.autograd.grad((f(x) * target).sum(), inputs)
            for f in (moe, lambda x: naive(moe, x))
        )
    ):
        torch.testing.assert_close(ours, theirs)


def test_experts_without_tokens():
    torch.manual_seed(0)
    weights = torch.randn(4, 6, 3), torch.randn(4, 6), torch.randn(4, 3, 6), torch.randn(4, 3)
    x, expert = torch.randn(9, 3), torch.full((9,), 2)
    torch.testing.assert_close(grouped_experts(x, expert, *weights), all_experts(x, *weights)[:, 2])


@pytest.mark.parametrize("top_k", [1, 2])
def test_usage_counts_every_routed_token(top_k):
    moe = MoE(4, 6, 3, top_k)
    moe(torch.randn(5, 11, 4))
    moe.eval()(torch.randn(2, 4))
    assert moe.usage.sum() == 57 * top_k
    assert "usage" not in moe.state_dict()
    moe.reset_usage()
    assert moe.usage.tolist() == [0, 0, 0]


def test_tokens_do_not_compete():
    """What a token gets does not depend on which other tokens are in the batch (no capacity)."""
    torch.manual_seed(0)
    moe = MoE(4, 6, 3, 2)
    x = torch.randn(50, 4)
    torch.testing.assert_close(moe(x)[:7], moe(x[:7]))


def test_balance_loss():
    moe = MoE(4, 6, 4)
    torch.nn.init.zeros_(moe.router.weight)
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([50.0, 0, 0, 0]))
    moe(torch.randn(8, 4))
    assert moe.balance_loss.item() == pytest.approx(4)  # all tokens to one of four
    torch.nn.init.eye_(moe.router.weight)
    torch.nn.init.zeros_(moe.router.bias)
    moe(100 * torch.eye(4))
    assert moe.balance_loss.item() == pytest.approx(1)
    moe.balance_loss.backward()
    assert moe.router.weight.grad is not None


def test_can_be_copied_after_a_forward():
    moe = MoE(4, 6, 2)
    moe(torch.randn(3, 4))
    twin = copy.deepcopy(moe)
    assert twin.balance_loss == moe.balance_loss and not twin.balance_loss.requires_grad


def test_learns_through_the_router():
    torch.manual_seed(0)
    moe = MoE(4, 6, 3)
    moe(torch.randn(64, 4)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in moe.parameters())


@pytest.mark.parametrize("top_k", [0, 3])
def test_top_k_must_fit(top_k):
    with pytest.raises(
        ValueError, match=f"top_k = {top_k} must be between 1 and the number of experts, 2"
    ):
        MoE(4, 6, 2, top_k)
