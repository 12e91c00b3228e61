"""Sparse mixture of experts: each token is computed by its top-k experts only."""

from collections import namedtuple
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESIDUAL_SCALE = 0.25  # of a block's first output weights: it begins close to the identity
ExpertRows = namedtuple("ExpertRows", "rows inputs hidden gates")


class Permute(torch.autograd.Function):
    """Rows of x in a new order; the backward is a gather, not index_select's scatter-add."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def grouped_experts(x, expert, w_in, b_in, w_out, b_out) -> Tensor:
    """w_out[e] gelu(w_in[e] x + b_in[e]) + b_out[e] with each row's own expert e.

    x (M, D), expert (M,) int64 in [0, E), w_in (E, F, D), b_in (E, F), w_out (E, D, F), b_out (E,
    D) -> (M, D). Rows are sorted by expert, so that each expert is two products; no row is dropped.
    """
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(expert, minlength=w_in.shape[0]).tolist()
    rows = Permute.apply(x, order, inverse).split(counts)
    experts = zip(rows, *(weight.unbind() for weight in (w_in, b_in, w_out, b_out)))
    outputs = [
        torch.addmm(c_out, F.gelu(torch.addmm(c_in, row, a.t())), b.t())
        for row, a, c_in, b, c_out in experts
    ]
    return Permute.apply(torch.cat(outputs), inverse, order)


def all_experts(x, w_in, b_in, w_out, b_out) -> Tensor:
    """Every expert on every row, (M, D) -> (M, E, D): no data-dependent shapes, for export."""
    hidden = F.gelu(torch.einsum("md,efd->mef", x, w_in) + b_in)
    return torch.einsum("mef,edf->med", hidden, w_out) + b_out


class MoE(nn.Module):
    """Mixture of E two-layer experts (D -> F -> D), top-k softmax routing.

    usage (E,) int64: tokens routed to each expert since `reset_usage`, not saved. balance_loss: the
    Switch load-balancing loss of the last forward pass, 1 when balanced (Fedus et al. 2021, eq. 4).

    d_model is D, d_ff the F of each expert, top_k, in 1..experts, those computed per token.
    """

    def __init__(self, d_model: int, d_ff: int, experts: int, top_k: int = 1):
        super().__init__()
        if not 1 <= top_k <= experts:
            need = f"between 1 and the number of experts, {experts}"
            raise ValueError(f"top_k = {top_k} must be {need}")
        self.top_k = top_k
        self.router = nn.Linear(d_model, experts)
        self.w_in = nn.Parameter(torch.randn(experts, d_ff, d_model) * d_model**-0.5)
        self.b_in = nn.Parameter(torch.zeros(experts, d_ff))
        scale = RESIDUAL_SCALE * d_ff**-0.5
        self.w_out = nn.Parameter(torch.randn(experts, d_model, d_ff) * scale)
        self.b_out = nn.Parameter(torch.zeros(experts, d_model))
        self.register_buffer("usage", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.balance_loss = torch.zeros(())

    def reset_usage(self) -> None:
        self.usage.zero_()

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rows (M, D) -> probabilities (M, E), gates (M, k), and experts (M, k) int64 chosen."""
        probabilities = self.router(rows).softmax(-1)
        return probabilities, *probabilities.topk(self.top_k)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        rows = x.reshape(-1, x.shape[-1])
        probabilities, gates, chosen = self.route(rows)
        weights = self.w_in, self.b_in, self.w_out, self.b_out
        if torch.compiler.is_exporting():
            mixture = torch.zeros_like(probabilities).scatter(1, chosen, gates)
            return torch.einsum("med,me->md", all_experts(rows, *weights), mixture).reshape(x.shape)
        counts = torch.bincount(chosen.flatten(), minlength=probabilities.shape[1])
        self.usage += counts
        self.balance_loss = len(counts) * (counts / chosen.numel() * probabilities.mean(0)).sum()
        copies = rows.repeat_interleave(self.top_k, 0) if self.top_k > 1 else rows
        outputs = grouped_experts(copies, chosen.flatten(), *weights).unflatten(0, chosen.shape)
        return (outputs * gates.unsqueeze(-1)).sum(1).reshape(x.shape)

    def __getstate__(self):
        """Copies and pickles leave the last forward's graph behind."""
        return {**self.__dict__, "balance_loss": self.balance_loss.detach()}


def expert_rows(moe: MoE, x: Tensor) -> Iterator[ExpertRows]:
    """Expert by expert, what it sees of the rows of x (..., D): their numbers (m,) int64, inputs
    (m, D), hidden units after GELU (m, F) and gates (m,)."""
    rows = x.reshape(-1, x.shape[-1])
    _, gates, chosen = moe.route(rows)
    for expert, (weight, bias) in enumerate(zip(moe.w_in, moe.b_in)):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        hidden = F.gelu(F.linear(rows[token], weight, bias))
        yield ExpertRows(token, rows[token], hidden, gates[token, choice])
