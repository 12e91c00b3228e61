"""A pointer into the text so far: what a text says again need not be stored in weights.

    p(w | x_1 .. x_t) = s p_model(w) + sum_{i < t} a_i [x_{i+1} = w]

The sentinel's share s and the a_i are one softmax: over earlier places by how much they resemble this one, and over what the
sentinel asks for. With a sentinel as in Merity et al. 2016 (arXiv:1609.07843); places compared by the model's own hidden
states, without training it, as in Grave et al. 2016 (arXiv:1612.04426), and by how many tokens back they agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kit.models
from kit.training.losses import linear_token_losses

LONGEST = 3  # tokens up to which a longer match counts for more


@dataclass(frozen=True)
class PointerLMConfig:
    """Name (in kit.models.MODELS) and config of the language model that points."""

    model: str
    config: dict


class PointerLM(nn.Module):
    """A language model (`hidden`, `output`) mixed with a pointer of five numbers: tokens (B, T) int64 -> log p (B, T, V).

    T^2 comparisons of hidden states a window; nothing of the model is changed. `fit_pointer` sets the five numbers.
    """

    def __init__(self, config: PointerLMConfig, model: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.model = kit.models.build_model(config.model, config.config) if model is None else model
        self.similarity = nn.Parameter(torch.tensor([8.0]))
        self.match = nn.Parameter(torch.arange(1.0, LONGEST + 1))
        self.sentinel = nn.Parameter(torch.tensor([10.0]))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.hidden(tokens)
        shares = self.shares(*places(hidden, tokens))
        own = F.linear(hidden, *self.model.output()).softmax(-1) * shares[..., -1:]
        following = F.pad(tokens[:, 1:], (0, 1))[:, None].expand(-1, tokens.shape[1], -1)  # the last points nowhere
        mixed = own.scatter_add(2, following, shares[..., :-1])
        return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()

    def shares(self, likeness: Tensor, length: Tensor) -> Tensor:
        """`places` -> (B, T, T + 1): of each earlier place (0 for this one and later ones), and of the sentinel."""
        by_match = torch.cat([self.match.new_zeros(1), self.match])[length]
        scores = self.similarity * likeness + by_match
        earlier = torch.ones_like(scores[0], dtype=torch.bool).tril(-1)
        return torch.cat([scores.masked_fill(~earlier, -torch.inf), self.sentinel.expand(*scores.shape[:2], 1)], -1).softmax(-1)


def places(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair of places (B, T, T) the cosine of their hidden states, and the length, up to LONGEST, of the longest
    text that ends at both."""
    direction = F.normalize(hidden, dim=-1)
    same = matches = tokens[:, :, None] == tokens[:, None]
    length = same.long()
    for _ in range(LONGEST - 1):
        matches = same & F.pad(matches, (1, 0, 1, 0))[:, :-1, :-1]
        length += matches
    return direction @ direction.mT, length


def fit_pointer(model: nn.Module, loader: Iterable) -> PointerLM:
    """One of the kit's language models with a pointer whose five numbers maximize the likelihood of the loader's text: of
    validation text, since training text is what the model itself remembers, and five numbers learn nothing by heart.

    loader: batches (inputs, targets) int64 (B, T), targets -100 ignored. The model itself is not changed.
    Raises ValueError for a model that is not in kit.models.MODELS, and for a loader without tokens.
    """
    made = kit.models.recipe(model)
    if made is None or not hasattr(model, "output"):
        raise ValueError(f"a pointer needs one of the kit's language models; this is a {type(model).__name__}")
    pointer = PointerLM(PointerLMConfig(made["class"], made["config"]), model).to(next(model.parameters()).device).eval()
    with torch.no_grad():
        batches = [_seen(model, *(t.to(pointer.sentinel.device) for t in batch)) for batch in loader]
    tokens = sum(int(known.sum()) for *_, known in batches)
    if not tokens:
        raise ValueError("the loader holds no tokens to fit a pointer to: pass that of the validation split")
    search = torch.optim.LBFGS([pointer.similarity, pointer.match, pointer.sentinel], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> float:
        search.zero_grad()
        losses = (_loss(pointer, *batch) / tokens for batch in batches)
        return sum(loss.backward() or loss.item() for loss in losses)

    search.step(closure)
    return pointer


def _seen(model: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """What the loss needs of a batch: the model's own losses (B, T), likeness and length (B, T, T), which places the target
    followed, and which targets are known."""
    hidden = model.hidden(tokens)
    own, _ = linear_token_losses(hidden, *model.output(), targets)
    following = F.pad(tokens[:, 1:], (0, 1), value=-1)
    return own, *places(hidden, tokens), following[:, None] == targets[:, :, None], targets != -100


def _loss(pointer: PointerLM, own: Tensor, likeness: Tensor, length: Tensor, right: Tensor, known: Tensor) -> Tensor:
    """Nats of all known targets."""
    shares = pointer.shares(likeness, length)
    likelihood = shares[..., -1] * (-own).exp() + (shares[..., :-1] * right).sum(-1)
    return -likelihood[known].log().sum()
