"""What every language model here shares: embedding, output layer, and the (tokens) -> logits interface."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from kit.core import protocols


def check_positive(config) -> None:
    """Raises ValueError for the first integer field (or entry of a tuple field) below 1, or dropout outside [0, 1)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for entry in value if isinstance(value, tuple) else (value,):
            if type(entry) is int and entry < 1:
                raise ValueError(f"{type(config).__name__}.{field.name} = {value!r} must be at least 1")
    if not 0 <= getattr(config, "dropout", 0.0) < 1:
        raise ValueError(f"{type(config).__name__}.dropout = {config.dropout!r} must be in [0, 1)")


class LanguageModel(protocols.LanguageModel):
    """Embedding and output layer around a subclass's ``body`` (B, T, D) -> (B, T, D).

    The config needs ``vocab_size, d_model, tied, embedding_rank, dropout``. With ``embedding_rank`` r both (V, D)
    matrices are products (V, r) (r, D).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        rank = config.embedding_rank or config.d_model
        self.embedding = nn.Embedding(config.vocab_size, rank)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.embedding_up = nn.Linear(rank, config.d_model, bias=False) if config.embedding_rank else None
        self.dropout = nn.Dropout(config.dropout)
        self.head = self.head_down = None
        if config.tied:
            self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.head = nn.Linear(rank, config.vocab_size)
            nn.init.zeros_(self.head.bias)
            if config.embedding_rank:
                self.head_down = nn.Linear(config.d_model, rank, bias=False)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) int64 -> last hidden state (B, T, D), the output layer's input."""
        x = self.embedding(tokens)
        if self.embedding_up is not None:
            x = self.embedding_up(x)
        return self.body(self.dropout(x))

    def output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output layer: weight (V, D) and bias (V,), so that ``logits = F.linear(hidden, *output())``."""
        if self.head is None:
            weight = self.embedding.weight
            return weight if self.embedding_up is None else weight @ self.embedding_up.weight.t(), self.output_bias
        weight = self.head.weight
        return weight if self.head_down is None else weight @ self.head_down.weight, self.head.bias

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return F.linear(self.hidden(tokens), *self.output())

    def auxiliary_loss(self) -> torch.Tensor:
        """Sum of the load-balancing losses of the last forward (scalar; 0 without mixtures)."""
        losses = [module.balance_loss for module in self.modules() if hasattr(module, "balance_loss")]
        return torch.stack(losses).sum() if losses else self.embedding.weight.new_zeros(())
