"""The ends that the language models share."""

import torch
from torch import Tensor, nn

from kit.core import protocols


class LanguageModel(protocols.LanguageModel):
    """Embedding and output layer around a subclass's layers.

    The config needs vocab_size, d_model, tied, embedding_rank and dropout. With an embedding_rank r
    both (V, D) matrices are products (V, r) (r, D).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, size = config.d_model, config.vocab_size
        factored, rank = config.embedding_rank is not None, config.embedding_rank or width
        self.embedding = nn.Embedding(size, rank)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.embedding_up = nn.Linear(rank, width, bias=False) if factored else None
        self.dropout = nn.Dropout(config.dropout)
        self.head = self.head_down = None
        if config.tied:
            self.output_bias = nn.Parameter(torch.zeros(size))
        else:
            self.head = nn.Linear(rank, size)
            nn.init.zeros_(self.head.bias)
            self.head_down = nn.Linear(width, rank, bias=False) if factored else None

    def body(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D): `layers` one after the other, then `norm`."""
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> last hidden state (B, T, D), the output layer's input."""
        x = self.embedding(tokens)
        return self.body(self.dropout(x if self.embedding_up is None else self.embedding_up(x)))

    def output(self) -> tuple[Tensor, Tensor]:
        """Weight (V, D) and bias (V,) of the output layer."""
        if self.head is None:
            weight, up = self.embedding.weight, self.embedding_up
            return weight if up is None else weight @ up.weight.t(), self.output_bias
        weight, down = self.head.weight, self.head_down
        return weight if down is None else weight @ down.weight, self.head.bias

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return super().forward(tokens)

    def auxiliary_loss(self) -> Tensor:
        """Sum of the experts' load-balancing losses of the last forward pass, a scalar."""
        losses = [m.balance_loss for m in self.modules() if hasattr(m, "balance_loss")]
        return torch.stack(losses).sum() if losses else self.embedding.weight.new_zeros(())
