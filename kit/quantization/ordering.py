"""Rows of token tables by falling frequency, whatever the tokenizer's numbers say.

What an error in a row costs goes with the token's frequency, so rows of like frequency share a step and are coded one after
another. Byte-pair encoding numbers tokens by the merges that made them: "compress" has a low number and is hardly ever
met, now that "compression" has its own. So each token's class, the logarithm of its frequency in whole factors of four, is in
the file (about two bits a token), rows are kept in the order of the classes, and within a class in the tokenizer's.
"""

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from kit import coding
from kit.parametrization import named_weights, original_of, set_steps, steps_of
from kit.quantization.composition import Composition


def frequency_classes(counts: Tensor) -> Tensor:
    """Class of each token, 0 the most frequent: uint8 (V,) of how often each occurs (V,)."""
    rarity = torch.log2((counts.max() + 1.0) / (counts + 1.0)) / 2
    return rarity.round().to(torch.uint8)


class _Permute(torch.autograd.Function):
    """x[order]; its gradient goes by the inverse permutation, which is quicker than adding up."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class RowOrder(nn.Module):
    """Parametrization: rows by class, (V, ...) -> rows by token, the same shape and dtype.

    classes: uint8 (V,), of each token.
    """

    def __init__(self, classes: Tensor):
        super().__init__()
        self.register_buffer("classes", classes)
        self.register_buffer("tokens", classes.argsort(stable=True), persistent=False)  # of each row
        self.register_buffer("rows", self.tokens.argsort(), persistent=False)  # of each token

    def forward(self, rows: Tensor) -> Tensor:
        return _Permute.apply(rows, self.rows, self.tokens)

    def encode(self) -> bytes:
        return coding.encode(self.classes[:, None].cpu().numpy())

    @classmethod
    def decode(cls, data: bytes, count: int) -> "RowOrder":
        return cls(torch.from_numpy(coding.decode(data, (count, 1))[:, 0].astype(np.uint8)))


def order_rows(model: nn.Module, counts: Tensor) -> nn.Module:
    """Puts one `RowOrder` on every tensor with an entry for each token (embedding, output layer and its bias), in place, and
    returns the model. What it computes stays the same; masks and formats of these tensors are dropped.

    counts: (V,), how often each token occurs in the training data.
    """
    order = RowOrder(frequency_classes(counts))
    for _, module, attribute in list(named_weights(model)):
        weight = original_of(module, attribute)
        if len(weight.shape) and len(weight) == len(counts):
            composed = [step for step in steps_of(module, attribute) if isinstance(step, Composition)]
            rows = (weight if composed else getattr(module, attribute)).detach()
            set_steps(model, module, attribute, [])
            original_of(module, attribute).data.copy_(rows[order.tokens])
            set_steps(model, module, attribute, [order, *composed])
    return model
