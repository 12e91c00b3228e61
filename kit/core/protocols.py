"""What training, evaluation, distillation and compression need of a model, written down once.

A *call* says how a model is called for a batch, an *output* may be any nest of tensors, and a
`LanguageModel` gives its last hidden state and its output layer apart, so that the logits of a
large vocabulary are never all in memory. `adapt` gives that protocol to somebody else's model.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kit.core.weights import class_of


class LanguageModel(nn.Module):
    """A model of tokens whose logits are ``F.linear(hidden(*inputs), *output())``.

    hidden(*inputs, **options) -> (B, T, D); output() -> weight (V, D) and bias (V,) or None;
    auxiliary_loss() -> scalar, the load-balancing loss of the last forward pass (0 without
    experts).
    """

    def hidden(self, *inputs, **options) -> Tensor:
        raise NotImplementedError

    def output(self) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def auxiliary_loss(self) -> Tensor:
        return self.output()[0].new_zeros(())

    def forward(self, *inputs, **options) -> Tensor:
        return nn.functional.linear(self.hidden(*inputs, **options), *self.output())


class Adapted(LanguageModel):
    """Somebody's model with the language-model protocol; the model itself is `model`, whose
    attributes and methods, such as `config` and `generate`, are found here too."""

    def __init__(self, model: nn.Module, hidden: Callable, output: Callable, auxiliary_loss):
        super().__init__()
        self.model, self._hidden = model, hidden
        self._output, self._auxiliary = output, auxiliary_loss
        self.training = model.training

    def hidden(self, *inputs, **options) -> Tensor:
        return self._hidden(self.model, *inputs, **options)

    def output(self) -> tuple[Tensor, Tensor | None]:
        return self._output(self.model)

    def auxiliary_loss(self) -> Tensor:
        return super().auxiliary_loss() if self._auxiliary is None else self._auxiliary(self.model)

    def __getattr__(self, name: str):
        if name.startswith("_") or name in ("model", "parametrizations") or name in self._modules:
            return super().__getattr__(name)
        return getattr(self.model, name)


class Transformers(Adapted):
    """A model of transformers whose logits are its output layer's, called as the model itself."""

    def forward(self, *inputs, **options):
        return self.model(*inputs, **options)


_LINEAR: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def adapt(
    model: nn.Module, hidden: Callable | None = None, output: Callable | None = None,
    auxiliary_loss: Callable | None = None,
) -> nn.Module:  # fmt: skip
    """The model under the language-model protocol where it has one, sharing its weights.

    Without further arguments, models of transformers that end in an output layer (causal, masked,
    sequence to sequence) get it, if on three tokens their logits are those of that layer, not
    scaled or capped; any other model is returned as it is: what it returns are logits.

    Args:
        hidden: (model, *inputs, **options) -> last hidden state (B, T, D).
        output: (model) -> weight (V, D) and bias (V,) or None of the output layer.
        auxiliary_loss: (model) -> scalar, added to the training loss with a small weight.
    """
    if hidden is not None:
        return Adapted(model, hidden, output, auxiliary_loss)
    if not isinstance(model, LanguageModel) and model not in _LINEAR:
        _LINEAR[model] = _has_linear_logits(model)
    return Transformers(model, _before_head, _head, None) if _LINEAR.get(model) else model


def bare(model: nn.Module) -> nn.Module:
    """The model of transformers that `adapt` wrapped; any other as it is."""
    return model.model if isinstance(model, Transformers) else model


def _before_head(model: nn.Module, *inputs, **options) -> Tensor:
    """What the output layer is called with; no logits are formed."""
    head, seen = model.get_output_embeddings(), []
    head.forward = lambda x: seen.append(x) or x.new_zeros(*x.shape[:-1], 0)
    try:
        model(*inputs, **options)
    finally:
        del head.forward
    return seen[-1]


def _head(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    return head.weight, head.bias


def _has_linear_logits(model: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    with_routers = getattr(getattr(model, "config", None), "output_router_logits", False)
    if head is None or class_of(head) is not nn.Linear or with_routers:  # trained by its own loss
        return False
    inputs = {"input_ids": torch.tensor([[0, 1, 2]], device=head.weight.device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    try:
        with evaluating(model):
            logits, hidden = model(**inputs).logits, _before_head(model, **inputs)
            return torch.allclose(logits, nn.functional.linear(hidden, *_head(model)).to(logits))
    except Exception:  # it takes something else than tokens, and is called as it is
        return False


@dataclass(frozen=True)
class Call:
    """How a model is called: `model(*args, **kwargs)`; and what the answer is compared with. Raises
    ValueError where that looks like the mask which the model takes next."""

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    targets: Tensor | None = None

    def __call__(self, model: Callable):
        y, mask = self.targets, _mask_at(type(model), len(self.args))
        if mask and isinstance(y, Tensor) and y.shape == getattr(self.args[0], "shape", None):
            if ((y == 0) | (y == 1)).all():
                what = f"the last entry of a batch is its labels, but this one looks like {mask!r}"
                advice = f"give a dictionary such as {{'labels': ...}}, or (inputs, {mask}, labels)"
                raise ValueError(f"{what} of {type(model).__name__}: {advice}")
        return model(*self.args, **self.kwargs)

    def to(self, device: torch.device | str) -> "Call":
        parts = self.args, self.kwargs, self.targets
        return Call(*(tree_map(lambda t: t.to(device), part) for part in parts))


@functools.lru_cache(256)
def _mask_at(kind: type, place: int) -> str:
    """The name of the argument at this place of a model's forward, if it is a mask; or ""."""
    try:
        names = list(inspect.signature(kind.forward).parameters)[1:]
    except (AttributeError, TypeError, ValueError):
        return ""
    return names[place] if 0 < place < len(names) and "mask" in names[place] else ""


TARGETS = ("labels", "targets", "target", "label")  # keys of a mapping for what is to be predicted


def call_of(batch, model: nn.Module | None = None) -> Call:
    """A batch of a loader as a call: a tensor is the input; of a tuple or list the last entry is
    the targets, the others are inputs; of a mapping the entry named like one of TARGETS, the others
    are keyword arguments.

    model: what is called. Models of transformers are made for labels in mappings that they shift
        themselves: for a causal one the targets are the labels one token on, and an encoder-decoder
        gets its decoder's inputs from them.
    """
    if model is not None:
        return _shifted(call_of(batch), bare(model))
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Mapping):
        name = next((key for key in TARGETS if key in batch), None)
        rest = {key: value for key, value in batch.items() if key != name}
        return Call((), rest, batch.get(name))
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return Call(tuple(batch[:-1]), {}, batch[-1])
    return call_with(batch)


def _shifted(call: Call, model: nn.Module) -> Call:
    labels, config = call.targets, getattr(model, "config", None)
    if not isinstance(labels, Tensor) or not hasattr(config, "is_encoder_decoder"):
        return call
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    start = getattr(config, "decoder_start_token_id", None)
    if not prepare and config.is_encoder_decoder and labels.ndim == 2 and start is not None:
        prepare = functools.partial(_after_start, start=start, pad=config.pad_token_id or 0)
    if prepare:
        given = "decoder_input_ids" in call.kwargs
        inputs = {} if given else {"decoder_input_ids": prepare(labels)}
        return replace(call, kwargs={**inputs, **call.kwargs})
    tokens = call.kwargs.get("input_ids")
    if call.args or tokens is None or tokens.shape != labels.shape or not model.can_generate():
        return call
    return replace(call, targets=nn.functional.pad(labels[:, 1:], (0, 1), value=-100))


def _after_start(labels: Tensor, start: int, pad: int) -> Tensor:
    """What a decoder reads where it is to say `labels` (B, T): the token before each."""
    moved = nn.functional.pad(labels[:, :-1], (1, 0), value=start)
    return moved.masked_fill(moved == -100, pad)


def call_with(inputs) -> Call:
    """Inputs without targets as a call: a tensor, a tuple or list of arguments, or a mapping of
    keyword arguments."""
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    return Call(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))


def tree_map(function: Callable[[Tensor], object], value):
    """`value` with every tensor in it replaced: nests of tuples, named tuples, lists, mappings
    (such as transformers' ModelOutput) and dataclasses keep their class."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        mapped = copy.copy(value)
        for key, item in value.items():
            mapped[key] = tree_map(function, item)
        return mapped
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(tree_map(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(tree_map(function, item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value)]
        return type(value)(**{name: tree_map(function, getattr(value, name)) for name in names})
    return value


def tensors_of(value) -> list[Tensor]:
    """All tensors in a nest, in order."""
    found: list[Tensor] = []
    tree_map(lambda tensor: found.append(tensor) or tensor, value)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer is; the CPU if it has none."""
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; "auto" is "cuda" or else "cpu": "mps" has neither the float64 of
    calibration nor the complex128 of the BK-core. Raises ValueError for one that is not there."""
    count, there = torch.cuda.device_count(), ["mps"] * torch.backends.mps.is_available()
    there += ["cpu", *(f"cuda:{i}" for i in range(count)), *["cuda"] * (count > 0)]
    name = there[-1] if name == "auto" else name
    if name not in there:
        raise ValueError(f"there is no device {name!r}: choose auto or one of {', '.join(there)}")
    return torch.device(name)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(
    model: nn.Module, batches: Iterable, watch: Mapping[str, Callable] | None = None
) -> list[Tensor]:
    """Forward passes in evaluation mode, on the model's device.

    A language model's logits are not formed; its hidden states are returned, a tensor a batch (else
    an empty list).

    Args:
        watch: dotted name of a submodule -> function(x, output), called with its first argument and
            its output whenever it is called.
    Raises ValueError without a batch.
    """

    def hook(function: Callable) -> Callable:
        return lambda module, args, kwargs, output: function([*args, *kwargs.values()][0], output)

    device, seen, states = device_of(model), False, []
    handles = [
        model.get_submodule(name).register_forward_hook(hook(function), with_kwargs=True)
        for name, function in (watch or {}).items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                call, seen = call_of(batch, model).to(device), True
                if isinstance(model, LanguageModel):
                    states.append(call(model.hidden))
                else:
                    call(model)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("calibration got no batch: give at least one batch of inputs")
    return states
