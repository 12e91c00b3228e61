"""Continuing a text with a language model."""

import torch
from torch import nn

from kit.core.protocols import device_of, evaluating
from kit.training.losses import logits_of


def continue_text(
    model: nn.Module, tokenizer, prompt: str, tokens=40, *, temperature=0.7, seed=0, window=128
) -> str:
    """The prompt and `tokens` sampled tokens after it, as text. The model sees the last `window`
    tokens; temperature 0 takes the likeliest each time. Raises ValueError for an empty prompt."""
    ids, device = tokenizer.encode(prompt).tolist(), device_of(model)
    if not ids:
        raise ValueError("the prompt is empty: give a text to continue")
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        for _ in range(tokens):
            logits = logits_of(model(torch.tensor([ids[-window:]], device=device)))[0, -1].cpu()
            drawn = logits.argmax()
            if temperature:
                p = (logits / temperature).softmax(-1)
                drawn = torch.multinomial(p, 1, generator=generator)
            ids.append(int(drawn))
    return tokenizer.decode(ids)
