"""Continuing a text with a language model."""

import torch
from torch import nn


@torch.no_grad()
def continue_text(model: nn.Module, tokenizer, prompt: str, tokens: int = 40, temperature: float = 0.7, seed: int = 0,
                  window: int = 128) -> str:
    """The prompt and `tokens` sampled tokens after it, as text; temperature 0 takes the likeliest token each time.

    The model sees the last `window` tokens. Raises ValueError for an empty prompt.
    """
    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        raise ValueError("the prompt is empty: give a text to continue")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.eval()
    for _ in range(tokens):
        logits = model(torch.tensor([ids[-window:]], device=device))[0, -1].cpu()
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
    return tokenizer.decode(ids)
