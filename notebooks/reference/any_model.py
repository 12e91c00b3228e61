"""Other people's models against everything that the kit does with a model. A cell of the table is
right, with its error measured against the model itself, or refused in one sentence.

    python -m notebooks.reference.any_model --rows gpt2 llama --columns gptq sparsegpt

writes what came of each cell into `any_model.json`, beside what stands there.
"""

import argparse
import copy
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kit import CompressionPipeline, QuantizedModel, artifact, quick_optimize, quick_quantize
from kit.core.calibration import input_grams
from kit.core.measurement import relative_error
from kit.core.protocols import call_with, evaluating, tensors_of
from kit.core.store import write_json
from kit.core.weights import copy_model, materialize, weights
from kit.distillation import DistillationTrainer
from kit.hub import from_pretrained, save_pretrained
from kit.models import parameter_count
from kit.production import ProductionModelOptimizer
from kit.pruning import MagnitudePruner, prune_channels, prune_layers, prune_sparsegpt
from kit.pruning.layers import skipped
from kit.quantization import Format, quantize_weights
from kit.quantization.gptq import gptq
from kit.training import TrainConfig
from kit.training.evaluation import evaluate

RECORD = Path(__file__).with_suffix(".json")
VOCABULARY, CLASSES = 96, 5
INT8_ERROR = 2e-2  # of the power of an output: INT8 weights and inputs, random weights
EXACT = 1e-9  # the same numbers, computed in another order
INT4 = Format(4, granularity="group", group_size=16)


class Wrong(Exception):
    """A number that is not what it should be."""


@dataclass(frozen=True)
class Case:
    """A model, and how it is called: `inputs(examples, size)` is a mapping of keyword arguments or
    a tuple; `sizes` are lengths of text or sides of images, `labels(inputs)` the targets."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict | tuple]
    labels: Callable[[dict | tuple], Tensor]
    sizes: tuple[int, int] = (12, 9)

    def model(self) -> nn.Module:
        """The same each time. Weights are random, of a size that keeps signals alive through all
        layers, and batch norms hold what they saw once."""
        torch.manual_seed(0)
        model = self.build()
        for weight in weights(model, matrices=True):
            weight.assign(torch.randn_like(weight.original) * weight.view.columns**-0.5)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for momentum in (1.0, 0.1):
            for norm in norms:
                norm.momentum = momentum
            with torch.no_grad():
                call_with(self.inputs(16, self.sizes[0]))(model.train())
        return model.eval()

    def batch(self, examples: int, size: int) -> dict | tuple:
        inputs = self.inputs(examples, size)
        labels = self.labels(inputs)
        return inputs | {"labels": labels} if isinstance(inputs, dict) else (*inputs, labels)

    def loader(self) -> DataLoader:
        batch = self.batch(16, self.sizes[0])
        named = batch if isinstance(batch, dict) else dict(enumerate(batch))
        rows = [{key: value[i] for key, value in named.items()} for i in range(16)]
        rows = rows if isinstance(batch, dict) else [tuple(row.values()) for row in rows]
        return DataLoader(rows, batch_size=4)


def of_config(auto: str, config: str, **fields) -> Callable[[], nn.Module]:
    """A builder of a transformers model with random weights."""
    made = getattr(transformers, config)(**fields)
    return lambda: getattr(transformers, auto).from_config(copy.deepcopy(made))


def _drawn(*shape: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(shape)))


def ids(n: int, t: int) -> dict:
    tokens = torch.randint(3, VOCABULARY, (n, t), generator=_drawn(n, t))
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def translated(n: int, t: int) -> dict:
    return ids(n, t) | {"decoder_input_ids": ids(n, t - 2)["input_ids"]}


def pixels(n: int, side: int) -> dict:
    return {"pixel_values": torch.randn(n, 3, side, side, generator=_drawn(n, side))}


def classes(inputs) -> Tensor:
    first = tensors_of(inputs)[0]
    return (first.float().flatten(1).mean(1) * 7).long() % CLASSES


def own_tokens(inputs: dict) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def hidden_tokens(inputs: dict) -> Tensor:
    tokens = inputs["input_ids"]
    return tokens.masked_fill(torch.rand(tokens.shape, generator=_drawn(*tokens.shape)) > 0.3, -100)


class Recurrent(nn.Module):
    """An LSTM that classifies a text by its last state."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.lstm = nn.LSTM(24, 32, batch_first=True, bidirectional=True)
        self.classes = nn.Linear(64, CLASSES)

    def forward(self, tokens):
        _, (state, _) = self.lstm(self.embedding(tokens))
        return self.classes(state.transpose(0, 1).flatten(1))


class UNet(nn.Module):
    """Two levels; the way up is a transposed convolution beside what came past it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = self._block(3, 8), self._block(8, 16)
        self.pool, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.three, self.classes = self._block(16, 8), nn.Conv2d(8, CLASSES, 1)

    def _block(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, x):
        high = self.one(x)
        low = self.up(self.two(self.pool(high)))
        return self.classes(self.three(torch.cat([high, low], 1)))


class Graph(nn.Module):
    """Two rounds of messages over a dense adjacency matrix; inputs and outputs by name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 32)
        self.classes = nn.Linear(32, CLASSES)

    def forward(self, nodes, adjacency):
        x = torch.relu(adjacency @ self.first(nodes))
        x = torch.relu(adjacency @ self.second(x))
        return {"logits": self.classes(x.mean(1)), "nodes": x}


def nodes(n: int, t: int) -> dict:
    edges = (torch.rand(n, t, t, generator=_drawn(n, t)) > 0.5).float()
    return {"nodes": torch.randn(n, t, 6, generator=_drawn(n, t)), "adjacency": edges / t}


def images(n: int, side: int) -> tuple:
    return tuple(pixels(n, side).values())


def tokens(n: int, t: int) -> tuple:
    return (ids(n, t)["input_ids"],)


def segments(inputs: tuple) -> Tensor:
    return (inputs[0].sum(1) > 0).long()


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
VIT = {key: value for key, value in SMALL.items() if key != "vocab_size"}
VIT |= {"image_size": 16, "patch_size": 4, "num_labels": CLASSES}
STAGES = {"hidden_sizes": [16, 24, 32, 32], "depths": [1, 1, 1, 1], "num_labels": CLASSES}

CAUSAL, VISION = "AutoModelForCausalLM", "AutoModelForImageClassification"
CASES = {
    "bert": Case(of_config("AutoModelForMaskedLM", "BertConfig", **SMALL), ids, hidden_tokens),
    "gpt2": Case(
        of_config(CAUSAL, "GPT2Config", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4,
                  n_positions=64, bos_token_id=0, eos_token_id=0), ids, own_tokens),
    "llama": Case(of_config(CAUSAL, "LlamaConfig", **GROUPED), ids, own_tokens),
    "mixtral": Case(of_config(CAUSAL, "MixtralConfig", **GROUPED, **EXPERTS), ids, own_tokens),
    "t5": Case(
        of_config("AutoModelForSeq2SeqLM", "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8,
                  d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
        translated, lambda inputs: inputs["decoder_input_ids"].roll(-1, 1)),
    "vit": Case(of_config(VISION, "ViTConfig", **VIT), pixels, classes, (16, 16)),
    "resnet": Case(of_config(VISION, "ResNetConfig", embedding_size=16, **STAGES),
                   pixels, classes, (32, 40)),
    "convnext": Case(of_config(VISION, "ConvNextConfig", **STAGES), pixels, classes, (32, 64)),
    "mobilenet": Case(
        of_config(VISION, "MobileNetV2Config", depth_multiplier=0.25, num_labels=CLASSES),
        pixels, classes, (32, 40)),
    "lstm": Case(Recurrent, tokens, classes),
    "unet": Case(UNet, images, segments, (16, 24)),
    "graph": Case(Graph, nodes, classes, (8, 6)),
}  # fmt: skip


def within(error: float, limit: float, what: str = "") -> str:
    if not error <= limit:
        raise Wrong(f"{what or 'the output'} differs by {error:.1e} of its power, over {limit:.0e}")
    return f"{error:.0e}"


def run(model: nn.Module, inputs):
    with evaluating(model):
        return call_with(inputs)(model)


def compared(model: nn.Module, reference: nn.Module, inputs, limit: float) -> str:
    """The error of a model's output, which must have the form of the reference's."""
    output, expected = run(model, inputs), run(reference, inputs)
    if type(output) is not type(expected):
        raise Wrong(f"gives a {type(output).__name__}, the original a {type(expected).__name__}")
    shapes = [[tuple(t.shape) for t in tensors_of(value)] for value in (output, expected)]
    if shapes[0] != shapes[1]:
        raise Wrong(f"gives shapes {shapes[0]}, the original {shapes[1]}")
    return within(relative_error(output, expected), limit)


@cache
def tuned(case: Case) -> QuantizedModel:
    """quick_quantize, the engine chosen on a first call."""
    model = quick_quantize(case.model())
    run(model, case.inputs(4, case.sizes[0]))
    return model


def native(case: Case) -> str:
    """quick_quantize, called as the original is."""
    return _quantized(case, case.inputs(4, case.sizes[0]))


def _quantized(case: Case, inputs) -> str:
    """Its error, which is that of the floats that it holds."""
    model = tuned(case)
    error = compared(model, materialize(model.model), inputs, INT8_ERROR)
    whole = compared(model, case.model(), inputs, torch.inf)
    return f"{whole}, {error} from its own floats, {model.choice.name}"


def other_size(case: Case) -> str:
    """Another batch and another length than it was tuned on."""
    return _quantized(case, case.inputs(3, case.sizes[1]))


def optimized(case: Case) -> str:
    """quick_optimize, against the floats that its file holds."""
    inputs = case.inputs(4, case.sizes[0])
    model, result = quick_optimize(case.model(), inputs)
    error = compared(model, materialize(model.model), inputs, INT8_ERROR)
    form = "masks" if "masked" in " ".join(result.notes) else "units"
    return f"{error}, {result.compression_ratio:.1f}x, {form}, {result.engine}"


def structured(case: Case) -> str:
    """A third of the units gone; the smaller model is a model of its own."""
    dense, inputs = case.model(), case.inputs(4, case.sizes[0])
    small = prune_channels(dense, inputs, 0.3)
    for size in case.sizes:
        changed = compared(small, dense, case.inputs(3, size), torch.inf)
    return f"{parameter_count(small) / parameter_count(dense):.0%} left, changed by {changed}"


def layers(case: Case) -> str:
    """Half of the layers of each stack gone: as if the model skipped them, and from a folder."""
    model, gone = case.model(), {}
    small = prune_layers(model, [case.inputs(4, case.sizes[0])], 0.5)
    for stack, _, number in (name.rpartition(".") for name in small.removed):
        gone.setdefault(stack, []).append(int(number))
    inputs = [case.inputs(3, size) for size in case.sizes]
    with skipped(model, gone):
        error = [compared(small, model, each, EXACT) for each in inputs][-1]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(small, folder)
        compared(from_pretrained(folder), small, inputs[0], 0.0)
    left = parameter_count(small) / parameter_count(model)
    return f"{error}, {left:.0%} left, without {', '.join(small.removed)}"


def stored(case: Case) -> str:
    """Masks and INT4 codes through a file."""
    model, inputs = case.model(), case.inputs(4, case.sizes[0])
    quantize_weights(MagnitudePruner(model).prune(0.5), INT4)
    with tempfile.TemporaryDirectory() as folder:
        size = artifact.save(model, Path(folder) / "a.kit")
        loaded = artifact.load(Path(folder) / "a.kit", case.model())
    error = compared(loaded, model, inputs, 0.0)
    return f"{error}, {artifact.float32_bytes(case.model()) / size:.1f}x"


def repaired(case: Case) -> str:
    """GPTQ at 3 bits, against rounding to the nearest."""
    dense, batches, format = case.model(), [case.batch(8, case.sizes[0])], Format(3)
    nearest = quantize_weights(copy_model(dense), format)
    return _better(dense, gptq(copy_model(dense), format, batches), nearest, batches)


def _better(dense: nn.Module, ours: nn.Module, rival: nn.Module, batches: list) -> str:
    """The mean error of the repaired layers' outputs, each as a share of their power, on the inputs
    that reach them in `ours`; and the rival's on the same."""
    inputs = input_grams(ours, batches, strict=False)
    exact, errors = {weight.name: weight.value for weight in weights(dense)}, []
    for model in (ours, rival):
        shares = []
        for weight in weights(model, list(inputs), matrices=True):
            power = [
                torch.einsum("grc,gcd,grd->", stack, inputs[weight.name], stack)
                for value in (weight.value - exact[weight.name], exact[weight.name])
                for stack in [weight.view.stack(value.detach()).double()]
            ]
            shares.append(float(power[0] / power[1].clamp(min=1e-300)))
        errors.append(sum(shares) / len(shares))
    text = f"{errors[0]:.1e} for {errors[1]:.1e}"
    if not errors[0] < errors[1]:
        raise Wrong(f"the layers' error of {text}, which takes no inputs into account")
    return f"{_repaired_share(ours):.0%} of weights, {text}"


def _repaired_share(model: nn.Module) -> float:
    sizes = {weight.name: weight.original.numel() for weight in weights(model, matrices=True)}
    return 1 - sum(sizes[name] for name in model.unrepaired) / sum(sizes.values())


def surgeon(case: Case) -> str:
    """SparseGPT at a half of the weights whose inputs are known, against magnitudes."""
    dense, batches = case.model(), [case.batch(8, case.sizes[0])]
    pruned = prune_sparsegpt(copy_model(dense), batches, 0.5)
    every = {weight.name for weight in weights(dense, matrices=True)}
    rival = MagnitudePruner(copy_model(dense), every - set(pruned.unrepaired)).prune(0.5)
    return _better(dense, pruned, rival, batches)


def distilled(case: Case) -> str:
    """A damaged copy learns from the original."""
    teacher, loader = case.model(), case.loader()
    student = quantize_weights(copy_model(teacher), Format(3))
    trainer = DistillationTrainer(teacher, student, 1.0, 1.0, 0.0)

    def divergence():
        with evaluating(student):
            return sum(float(trainer(student, batch)) for batch in loader)

    before = divergence()
    trainer.fit(loader, TrainConfig(steps=30, lr=1e-3), log=False)
    after = divergence()
    if not after < before:
        raise Wrong(f"a divergence of {after:.1e} is left, it was {before:.1e}")
    return f"{before:.0e} to {after:.0e}"


def _exported(model: nn.Module, case: Case, limit: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        inputs, path = case.inputs(4, case.sizes[0]), Path(folder) / "a.onnx"
        found = ProductionModelOptimizer().export_onnx(model, path, inputs)
    return within(found["relative_error"], limit)


def exported(case: Case) -> str:
    """The float graph in ONNX Runtime."""
    return _exported(case.model(), case, EXACT)


def exported_int8(case: Case) -> str:
    """The integer graph in ONNX Runtime."""
    return _exported(tuned(case), case, INT8_ERROR)


def pipeline(case: Case) -> str:
    """QAT, pruning and distillation to an eighth of the bytes; the file gives the same model."""
    loader, inputs = case.loader(), case.inputs(4, case.sizes[0])
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for _ in range(2):  # the second only reads what the first left
            made = CompressionPipeline(case.model(), 8.0, log=False)
            runs.append(made.run_pipeline(loader, loader, 8, 8, 30, folder))
        (model, metrics), (again, _) = runs
        loaded = artifact.load(Path(folder) / "distillation.kit", case.model())
    within(relative_error(run(again, inputs), run(model, inputs)), 0.0, "the resumed run")
    compared(loaded, model, inputs, 0.0)
    quality, last = evaluate(loaded, loader), metrics["stage_metrics"]["distillation"]
    name = "accuracy" if quality.classifier else "perplexity"
    if getattr(quality, name) != last[f"final_{name}"]:
        raise Wrong(
            f"{name} {getattr(quality, name)} after loading, {last[f'final_{name}']} before"
        )
    met = "" if metrics["target_met"] else " (missed, as it says)"
    before = metrics["baseline"][name]
    return f"{last['ratio']:.1f}x{met}, {name} {before:.3g} to {last[f'final_{name}']:.3g}"


COLUMNS = {
    "quick_quantize": native,
    "other_size": other_size,
    "quick_optimize": optimized,
    "structured": structured,
    "layers": layers,
    "stored": stored,
    "gptq": repaired,
    "sparsegpt": surgeon,
    "distillation": distilled,
    "onnx": exported,
    "onnx_int8": exported_int8,
    "pipeline": pipeline,
}


def cell(row: str, column: str) -> str:
    """What came of one pair: "right: ...", "refused: ...", or FAILED with what was wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f"right: {COLUMNS[column](CASES[row])}"
    except Wrong as error:
        return f"FAILED: {error}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        home = Path(artifact.__file__).parents[1]
        text = " ".join(str(error).split())
        ours = Path(frames[-1].filename).is_relative_to(home) and isinstance(error, ValueError)
        if ours and "\n" not in str(error):
            return f"refused: {text}"
        at = [f for f in frames if Path(f.filename).is_relative_to(home)][-1:]
        where = "".join(f" at {Path(f.filename).relative_to(home)}:{f.lineno}" for f in at)
        return f"FAILED: {type(error).__name__}{where}: {text[:300]}"


def table(rows=tuple(CASES), columns=tuple(COLUMNS), log=print) -> pd.DataFrame:
    """A row a model, a column for what is done with it; `log` gets each cell as it is made."""
    made = {row: {} for row in rows}
    for row in rows:
        for column in columns:
            start = time.perf_counter()
            made[row][column] = cell(row, column)
            log(f"{row:10} {column:15} {time.perf_counter() - start:4.0f} s  {made[row][column]}")
    return pd.DataFrame(made).T


def recorded() -> pd.DataFrame:
    """What stands in `any_model.json`: a row a model, a column for what is done with it."""
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return pd.DataFrame(found, dtype=object).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    made = table(chosen.rows, chosen.columns, log=lambda text: print(text, flush=True))
    found = recorded().T.to_dict()
    for row, cells in made.T.to_dict().items():
        found[row] = {**found.get(row, {}), **cells}
    kept = {row: {c: found[row][c] for c in COLUMNS if c in found[row]} for row in found}
    write_json(RECORD, kept)
    failed = int(made.map(lambda text: text.startswith("FAILED")).to_numpy().sum())
    print(f"{made.size - failed} of {made.size} cells right or refused, {failed} failed")


if __name__ == "__main__":
    main()
