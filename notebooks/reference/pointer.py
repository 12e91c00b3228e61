"""A pointer into the text so far: what a text says again need not be stored in weights.

    p(w | x_1 .. x_t) = s p_model(w) + sum_{i < t} a_i [x_{i+1} = w]

The sentinel's share s and the a_i are one softmax: over earlier places by how much they resemble
this one, and over what the sentinel asks for. With a sentinel as in Merity et al. 2016
(arXiv:1609.07843); places compared by the model's own hidden states, without training it, as in
Grave et al. 2016 (arXiv:1612.04426), and by how many tokens back they agree.

Importing this module makes `PointerLM` one of `kit.models.MODELS`, so that its files can be loaded.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kit.core.protocols import LanguageModel, device_of
from kit.models import MODELS, build_model, recipe
from kit.training.losses import linear_token_losses

LONGEST = 3  # tokens up to which a longer match counts for more


@dataclass(frozen=True)
class PointerLMConfig:
    """Name (in kit.models.MODELS) and config of the language model that points."""

    model: str
    config: dict


class PointerLM(nn.Module):
    """A language model mixed with a pointer: tokens (B, T) int64 -> log p (B, T, V).

    A window takes T^2 comparisons of hidden states; nothing of the model is changed. `fit_pointer`
    sets the pointer's five numbers.
    """

    def __init__(self, config: PointerLMConfig, model: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.model = build_model(config.model, config.config) if model is None else model
        self.similarity = nn.Parameter(torch.tensor([8.0]))
        self.match = nn.Parameter(torch.arange(1.0, LONGEST + 1))
        self.sentinel = nn.Parameter(torch.tensor([10.0]))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.hidden(tokens)
        shares = self.shares(*places(hidden, tokens))
        own = F.linear(hidden, *self.model.output()).softmax(-1) * shares[..., -1:]
        following = F.pad(tokens[:, 1:], (0, 1))[:, None]  # of the last place there is none
        following = following.expand(-1, tokens.shape[1], -1)
        mixed = own.scatter_add(2, following, shares[..., :-1])
        return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()

    def shares(self, likeness: Tensor, length: Tensor) -> Tensor:
        """What `places` returns -> (B, T, T + 1): the share of each earlier place (0 for this one
        and later ones), and of the sentinel."""
        by_match = torch.cat([self.match.new_zeros(1), self.match])[length]
        scores = self.similarity * likeness + by_match
        earlier = torch.ones_like(scores[0], dtype=torch.bool).tril(-1)
        scores = scores.masked_fill(~earlier, -torch.inf)
        return torch.cat([scores, self.sentinel.expand(*scores.shape[:2], 1)], -1).softmax(-1)


MODELS["PointerLM"] = (PointerLM, PointerLMConfig)


def places(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair of places the cosine of their hidden states, and the length, up to LONGEST, of
    the longest text that ends at both: (B, T, T) each."""
    direction = F.normalize(hidden, dim=-1)
    same = matches = tokens[:, :, None] == tokens[:, None]
    length = same.long()
    for _ in range(LONGEST - 1):
        matches = same & F.pad(matches, (1, 0, 1, 0))[:, :-1, :-1]
        length += matches
    return direction @ direction.mT, length


def fit_pointer(model: nn.Module, loader: Iterable) -> PointerLM:
    """One of the kit's language models with a pointer whose five numbers maximize the likelihood of
    the loader's text. The model itself is not changed.

    Args:
        loader: batches (inputs, targets) int64 (B, T), targets -100 ignored, of validation text:
            training text is what the model remembers, and five numbers learn nothing by heart.

    Raises:
        ValueError: the model is not one of kit.models.MODELS, or the loader holds no tokens.
    """
    made = recipe(model)
    if made is None or not isinstance(model, LanguageModel):
        kind = type(model).__name__
        raise ValueError(f"a pointer needs one of the kit's language models; this is a {kind}")
    pointer = PointerLM(PointerLMConfig(made["class"], made["config"]), model)
    pointer.to(device := device_of(model)).eval()
    with torch.no_grad():
        batches = [_seen(model, *(t.to(device) for t in batch)) for batch in loader]
    tokens = sum(int(known.sum()) for *_, known in batches)
    if not tokens:
        raise ValueError(
            "the loader holds no tokens to fit a pointer to: pass the validation split"
        )
    numbers = [pointer.similarity, pointer.match, pointer.sentinel]
    search = torch.optim.LBFGS(numbers, max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> float:
        search.zero_grad()
        losses = (_loss(pointer, *batch) / tokens for batch in batches)
        return sum(loss.backward() or loss.item() for loss in losses)

    search.step(closure)
    return pointer


def _seen(model: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """What the loss needs of a batch: the model's own losses (B, T), likeness, length and which
    places the target followed (B, T, T), and which targets are known (B, T)."""
    hidden = model.hidden(tokens)
    own, _ = linear_token_losses(hidden, *model.output(), targets)
    following = F.pad(tokens[:, 1:], (0, 1), value=-1)
    right = following[:, None] == targets[:, :, None]
    return own, *places(hidden, tokens), right, targets != -100


def _loss(pointer: PointerLM, own, likeness, length, right, known) -> Tensor:
    """Nats of all known targets."""
    shares = pointer.shares(likeness, length)
    likelihood = shares[..., -1] * (-own).exp() + (shares[..., :-1] * right).sum(-1)
    return -likelihood[known].log().sum()
