"""Models to compare with: an LSTM and a Transformer language model, a CNN and an MLP for digits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.core.settings import BelowOne, Count, settings
from kit.models.base import LanguageModel


@settings
class LSTMLMConfig:
    """Shapes of an LSTMLM; `hidden` units a layer, projected back to d_model before the output."""

    vocab_size: Count = 30000
    d_model: Count = 64
    layers: Count = 2
    hidden: Count = 128
    tied: bool = False
    embedding_rank: Count | None = None
    dropout: BelowOne = 0.0


class LSTMLM(LanguageModel):
    """LSTM language model."""

    def __init__(self, config: LSTMLMConfig):
        super().__init__(config)
        width, hidden, layers = config.d_model, config.hidden, config.layers
        between = config.dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True, dropout=between)
        self.project = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.project(self.dropout(self.lstm(x)[0])))


@settings
class TransformerLMConfig:
    """Shapes of a TransformerLM."""

    vocab_size: Count = 30000
    d_model: Count = 64
    layers: Count = 4
    heads: Count = 4
    d_ff: Count = 256
    tied: bool = False
    embedding_rank: Count | None = None
    dropout: BelowOne = 0.0

    def __post_init__(self):
        if self.d_model % (2 * self.heads):
            need = f"a multiple of twice the number of heads, {self.heads}"
            raise ValueError(f"d_model = {self.d_model} must be {need}")


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x (B, H, T, d), d even."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device).float().unsqueeze(1) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class TransformerLayer(nn.Module):
    """Pre-norm block: causal self-attention with rotary positions, then a GELU layer."""

    def __init__(self, d_model: int, heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_ff = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.output = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.ff_in, self.ff_out = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.ff_out(F.gelu(self.ff_in(self.norm_ff(x)))))


class TransformerLM(LanguageModel):
    """Causal Transformer language model."""

    def __init__(self, config: TransformerLMConfig):
        super().__init__(config)
        shape = config.d_model, config.heads, config.d_ff, config.dropout
        self.layers = nn.ModuleList(TransformerLayer(*shape) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)

    def shapes(self) -> dict:
        return {"d_ff": self.layers[0].ff_in.out_features, "layers": len(self.layers)}


@settings
class DigitsCNNConfig:
    """Output channels of each 3x3 convolution, and the number of classes."""

    channels: tuple[Count, ...] = (16, 32)
    classes: Count = 10


class DigitsCNN(nn.Sequential):
    """images (B, 1, 8, 8) -> logits (B, classes): convolutions, 2x2 max pooling, a linear layer."""

    def __init__(self, config: DigitsCNNConfig = DigitsCNNConfig()):
        blocks, widths = [], (1, *config.channels)
        for i, o in zip(widths, config.channels):
            blocks += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        head = nn.Linear(16 * widths[-1], config.classes)
        super().__init__(*blocks, nn.MaxPool2d(2), nn.Flatten(), head)
        self.config = config

    def shapes(self) -> dict:
        return {"channels": tuple(m.out_channels for m in self if isinstance(m, nn.Conv2d))}


@settings
class DigitsMLPConfig:
    """Widths of the hidden layers, and the number of classes."""

    hidden: tuple[Count, ...] = (64, 64)
    classes: Count = 10


class DigitsMLP(nn.Sequential):
    """images (B, 1, 8, 8) -> logits (B, classes)."""

    def __init__(self, config: DigitsMLPConfig = DigitsMLPConfig()):
        blocks, widths = [], (64, *config.hidden)
        for i, o in zip(widths, config.hidden):
            blocks += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(nn.Flatten(), *blocks, nn.Linear(widths[-1], config.classes))
        self.config = config

    def shapes(self) -> dict:
        return {"hidden": tuple(m.out_features for m in self if isinstance(m, nn.Linear))[:-1]}
