"""The loop one writes first, kept to time `kit.training` against: all logits at once in float32,
experts one by one with masked assignment, AdamW and clipping as they come."""

import copy
import types
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.core.measurement import Latency, measure
from kit.models.moe import MoE
from kit.training import TrainConfig, train
from kit.training.losses import AUXILIARY_WEIGHT


def plain_next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same number as `kit.training.losses.next_token_loss`, from all logits at once."""
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    return loss + AUXILIARY_WEIGHT * model.auxiliary_loss()


def plain_experts(model: nn.Module) -> nn.Module:
    """A copy of `model` whose MoE layers compute the same, expert by expert."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, MoE):
            module.forward = types.MethodType(_experts_one_by_one, module)
    return model


def _experts_one_by_one(moe: MoE, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    probabilities = moe.router(rows).softmax(-1)
    gates, chosen = probabilities.topk(moe.top_k)
    mixture = torch.zeros_like(rows)
    for expert, (w_in, b_in, w_out, b_out) in enumerate(
        zip(moe.w_in, moe.b_in, moe.w_out, moe.b_out)
    ):
        for k in range(moe.top_k):
            mine = chosen[:, k] == expert
            output = F.linear(F.gelu(F.linear(rows[mine], w_in, b_in)), w_out, b_out)
            mixture[mine] += gates[mine, k, None] * output
    share = torch.bincount(chosen.flatten(), minlength=len(moe.w_in)) / chosen.numel()
    moe.balance_loss = len(moe.w_in) * (share * probabilities.mean(0)).sum()
    return mixture.reshape(x.shape)


def plain_train(model: nn.Module, batches: Iterable, steps: int, lr: float = 3e-3) -> float:
    """Trains in place for `steps` batches; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _, batch in zip(range(steps), batches):
        loss = plain_next_token_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def training_latency(model: nn.Module, batches: list, seconds: float = 1.0) -> dict[str, Latency]:
    """Seconds to train on `batches` once, by the plain loop and by `kit.training` in both
    precisions, in turn."""
    plain, *ours = plain_experts(model), copy.deepcopy(model), copy.deepcopy(model)
    calls = {"plain": lambda: plain_train(plain, batches, len(batches))}
    for precision, own in zip(("float32", "bfloat16"), ours):
        config = TrainConfig(steps=len(batches), precision=precision, eval_every=len(batches))
        calls[precision] = lambda own=own, config=config: train(own, batches, config, log=False)
    return measure(calls, seconds)
