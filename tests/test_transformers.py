"""Models of transformers: called, evaluated, trained, compressed and stored without a class of the
user's own."""

import copy
from dataclasses import replace

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import BatchEncoding

from kit import CompressionPipeline, artifact
from kit.budget import round_to_budget
from kit.core.calibration import input_grams
from kit.core.protocols import Call, LanguageModel, adapt, bare, call_of
from kit.core.weights import copy_model, weights
from kit.distillation import DistillationTrainer
from kit.distillation.cache import build_cache
from kit.hub import from_pretrained, load, save_pretrained
from kit.pruning import prune_layers
from kit.pruning.layers import skipped
from kit.quantization import FakeQuantize, Format, quantize_weights
from kit.quantization.integers import QuantizedEmbedding, QuantizedLinear
from kit.training import TrainConfig, train
from kit.training.evaluation import evaluate
from kit.training.losses import next_token_loss, training_loss
from notebooks.reference.any_model import CASES, run

TEXT = ["bert", "gpt2", "llama", "mixtral", "t5"]
GEMMA = dict(vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
GEMMA |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)


def loss_of(model, batch):
    """What transformers says."""
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("name", TEXT)
def test_the_protocol_gives_the_loss_that_the_model_itself_returns(name):
    case = CASES[name]
    model, batch = case.model(), case.batch(6, 12)
    batch.pop("decoder_input_ids", None)  # made of the labels
    adapted = adapt(model)
    assert isinstance(adapted, LanguageModel) and adapt(adapted) is adapted
    for one in (model, adapted):
        found = evaluate(one, [batch, BatchEncoding(batch)])
        assert found.loss == pytest.approx(loss_of(model, batch), rel=1e-5)
        with torch.no_grad():
            value = float(next_token_loss(one, batch))
        assert value == pytest.approx(loss_of(model, batch), rel=1e-5)
    assert bare(adapted) is model and adapted.config is model.config


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids, mask=None, labels=None):
        x = self.table(ids)
        return x if mask is None else x * mask[..., None]


def test_a_mask_is_not_taken_for_labels():
    model, ids = Masked(), torch.randint(9, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for one in (mask, mask.bool(), mask.float()):
        with pytest.raises(ValueError, match="looks like 'mask' of Masked: give a dict"):
            round_to_budget(model, [(ids, one)], 100)
    for batch in ((ids, mask, ids), {"ids": ids, "mask": mask}):
        assert torch.equal(call_of(batch)(model), model(ids, mask))
    for labels in (ids, ids[:, 0], mask[:, 0], None):
        assert torch.equal(call_of((ids, labels))(model), model(ids))
    assert call_of((ids, mask))(nn.Embedding(9, 4)).shape == (2, 5, 4)


def test_no_logits_are_formed_and_gradients_are_those_of_the_model():
    case = CASES["gpt2"]
    model, batch = case.model(), case.batch(4, 12)
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, seen = training_loss(model), []
    handle = model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.numel()))
    loss(model, batch).backward()
    handle.remove()
    assert sum(seen) == 0
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-6), name


def test_targets_of_tuples_are_those_of_the_next_token_already():
    model = CASES["llama"].model()
    tokens = torch.randint(0, 96, (3, 10))
    found = evaluate(model, [(tokens[:, :-1], tokens[:, 1:])])
    assert found.loss == pytest.approx(loss_of(model, {"input_ids": tokens, "labels": tokens}))
    assert found.tokens == 27


def test_logits_that_are_scaled_after_the_output_layer_are_used_as_they_are():
    config = transformers.Gemma2Config(**GEMMA, final_logit_softcapping=1.0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    batch = {"input_ids": (t := torch.randint(0, 96, (2, 8))), "labels": t}
    assert adapt(model) is model
    assert evaluate(model, [batch]).loss == pytest.approx(loss_of(model, batch), rel=1e-5)


def test_a_head_that_adds_something_of_its_own_is_not_taken_apart():
    model = CASES["llama"].model()

    class Louder(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Louder
    assert adapt(model) is model


def test_other_models_are_returned_as_they_are():
    for model in (nn.Linear(2, 3), CASES["vit"].model(), CASES["graph"].model()):
        assert adapt(model) is model


def test_a_call_of_no_model_of_transformers_stays_as_it_is():
    batch = {"input_ids": torch.arange(4)[None], "labels": torch.arange(4)[None]}
    assert torch.equal(call_of(batch, nn.Linear(2, 2)).targets, batch["labels"])
    call = call_of(batch, CASES["gpt2"].model())
    assert call.targets.tolist() == [[1, 2, 3, -100]] and isinstance(call, Call)
    assert call_of(batch, CASES["bert"].model()).targets.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_distillation_and_its_cache(name, tmp_path):
    case = CASES[name]
    teacher, loader = case.model(), case.loader()
    student = quantize_weights(copy_model(teacher), Format(2))
    trainer = DistillationTrainer(teacher, student, 1.0, 1.0, 0.0)
    batch = next(iter(loader))
    whole = float(trainer(student, batch))
    p, q = (F.log_softmax(run(m, {k: v for k, v in batch.items() if k != "labels"}).logits, -1)
            for m in (teacher, student))  # fmt: skip
    kept = call_of(batch, teacher).targets != -100
    assert whole == pytest.approx(float((p.exp() * (p - q)).sum(-1)[kept].mean()), rel=1e-4)
    cache = build_cache(teacher, loader, tmp_path / "cache", k=96, temperature=1.0)
    cached = DistillationTrainer(cache, student, 1.0, 1.0, 0.0)
    assert float(cached(student, next(iter(cache.wrap(loader))))) == pytest.approx(whole, abs=2e-3)
    trainer.fit(loader, TrainConfig(steps=20, lr=1e-3), log=False)
    assert float(trainer(student, batch)) < whole


def test_training_with_masked_labels_learns():
    case = CASES["bert"]
    model, loader = case.model(), case.loader()
    before = evaluate(model, loader).loss
    train(model, loader, TrainConfig(steps=20, lr=1e-3), loss=training_loss(model), log=False)
    assert evaluate(model, loader).loss < before


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit"])
def test_the_pipeline_ends_in_a_file_that_gives_the_same_model(name, tmp_path):
    case = CASES[name]
    loader, inputs = case.loader(), case.inputs(3, 16 if name == "vit" else 10)
    epochs = (0.25, 0.25, 0.5)
    model, metrics = CompressionPipeline(case.model(), 8.0, log=False).run_pipeline(
        loader, loader, *epochs, tmp_path
    )
    again, _ = CompressionPipeline(case.model(), 8.0, log=False).run_pipeline(
        loader, loader, *epochs, tmp_path
    )
    loaded = artifact.load(tmp_path / "distillation.kit", case.model())
    assert type(model) is type(case.model())
    expected = run(model, inputs).logits
    for other in (again, loaded):
        assert torch.equal(run(other, inputs).logits, expected)
    found, last = evaluate(loaded, loader), metrics["stage_metrics"]["distillation"]
    quality = found.accuracy if name == "vit" else found.perplexity
    assert quality == last["final_accuracy" if name == "vit" else "final_perplexity"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5"])
def test_generation_after_compression_and_from_a_file(name, tmp_path):
    case = CASES[name]
    model = quantize_weights(case.model(), Format(4))
    ids = case.inputs(2, 6)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, **options)
    artifact.save(adapt(model), tmp_path / "a.kit")  # named as without the adapter
    loaded = artifact.load(tmp_path / "a.kit", case.model())
    for other in (loaded, adapt(loaded), copy.deepcopy(adapt(model))):
        assert torch.equal(other.generate(ids, **options), tokens)
    greedy = ids
    for _ in range(5 if name != "t5" else 0):
        logits = run(loaded, {"input_ids": greedy}).logits
        greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], 1)
    assert name == "t5" or torch.equal(greedy[:, : tokens.shape[1]], tokens)
    assert all(weight.steps for weight in weights(model, matrices=True))


def experts(kind):
    """(module, call(x, chosen, gates), the tensors' names) of stacked experts, as each is held."""
    torch.manual_seed(0)
    if kind == "mixtral":
        module = CASES["mixtral"].model().model.layers[0].mlp.experts
    else:
        config = transformers.GptOssConfig(**GEMMA, num_local_experts=4)
        module = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts(config).eval()
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
    return module


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_row_of_stacked_experts_is_one_output_of_one_expert(kind):
    module = experts(kind)
    width = module.down_proj.shape[2 if kind == "gpt_oss" else 1]
    x, chosen = torch.randn(5, width), torch.tensor([[0], [1], [1], [2], [3]])
    (weight,) = weights(module, "down_proj")
    assert weight.view.rows == 4 * width
    before = module(x, chosen, torch.ones(5, 1)).detach()
    matrix = weight.view.matrix(weight.original.detach()).clone()
    matrix[width + 3] = 0  # output 3 of expert 1
    weight.assign(weight.view.tensor(matrix))
    changed = (module(x, chosen, torch.ones(5, 1)).detach() != before).nonzero().tolist()
    assert changed == [[1, 3], [2, 3]]


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("quantized", [False, True])
def test_inputs_of_stacked_experts_are_those_of_the_tokens_routed_to_them(how, quantized):
    model = CASES["mixtral"].model()
    if quantized:
        quantize_weights(model, Format(4))
    model.set_experts_implementation(how)
    batch, seen = CASES["mixtral"].inputs(3, 8), []
    module = model.model.layers[0].mlp.experts
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args))
    grams = input_grams(model, [batch], "*.layers.0.mlp.experts.*", strict=False)
    handle.remove()
    if how == "batched_mm":  # each token has its own copy of a weight: not reached, and named
        assert not grams
        return
    x, chosen, _ = seen[0]
    for expert in range(4):
        rows = x[(chosen == expert).any(1)].double()
        assert torch.allclose(
            grams["model.layers.0.mlp.experts.gate_up_proj"][expert], rows.T @ rows
        )
        gate, up = (rows.float() @ module.gate_up_proj[expert].T).chunk(2, -1)
        inner = (F.silu(gate) * up).double()
        down = grams["model.layers.0.mlp.experts.down_proj"][expert]
        assert torch.allclose(down, inner.T @ inner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_inputs_of_conv1d(quantized):
    model = CASES["gpt2"].model()
    if quantized:
        quantize_weights(model, Format(4))
    batch, seen = CASES["gpt2"].inputs(3, 8), []
    layer = model.transformer.h[1].mlp.c_proj
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    (gram,) = input_grams(model, [batch], "transformer.h.1.mlp.c_proj.weight").values()
    handle.remove()
    assert torch.allclose(gram[0], seen[0].double().T @ seen[0].double())
    scale = weights(quantize_weights(model, Format(4)), "transformer.h.1.mlp.c_fc.weight")[0]
    assert len(scale.find(FakeQuantize).qparams(scale.original)[0]) == 128  # one an output


@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral", "t5", "vit"])
def test_a_folder_gives_the_compressed_model_back(name, tmp_path):
    case = CASES[name]
    model, inputs = quantize_weights(case.model(), Format(4)), case.inputs(2, 16)
    if name == "gpt2":
        model.generation_config.max_new_tokens = 3
    size = save_pretrained(adapt(model), tmp_path)
    assert {f.name for f in tmp_path.iterdir()} >= {"config.json", "model.kit"}
    assert size < 0.3 * artifact.float32_bytes(model)
    state = torch.get_rng_state()
    for again in (from_pretrained(tmp_path), from_pretrained(tmp_path, True)):
        assert torch.equal(run(again, inputs).logits, run(model, inputs).logits)
    assert torch.equal(torch.get_rng_state(), state)
    if name == "gpt2":
        assert again.generation_config.max_new_tokens == 3
        again = from_pretrained(tmp_path)
        assert again.lm_head.weight is again.transformer.wte.weight  # tied


def test_a_tokenizer_goes_with_the_model(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    save_pretrained(CASES["gpt2"].model(), tmp_path, tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("b a c")["input_ids"] == [1, 0, 2]


def test_what_no_folder_could_give_back_is_refused(tmp_path):
    model = CASES["gpt2"].model()
    for weight in weights(model, "*.mlp.c_fc.*"):
        weight.select(lambda tensor: tensor[..., ::2])
    with pytest.raises(ValueError, match="another shape than GPT2Config"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_trainer_of_transformers_trains_a_fake_quantized_model(tmp_path):
    pytest.importorskip("accelerate")
    case = CASES["gpt2"]
    model, loader = quantize_weights(case.model(), Format(4)), case.loader()
    before = evaluate(model, loader).loss
    settings = {"max_steps": 10, "learning_rate": 1e-2, "use_cpu": True, "report_to": []}
    settings |= {"output_dir": str(tmp_path), "save_strategy": "no", "disable_tqdm": True}
    arguments = transformers.TrainingArguments(**settings)
    transformers.Trainer(model, arguments, train_dataset=loader.dataset).train()
    assert evaluate(model, loader).loss < before
    assert all(len(w.value.unique()) <= 16 * w.view.rows for w in weights(model, "*.c_fc.weight"))


def test_lora_learns_beside_a_fake_quantized_model():
    peft = pytest.importorskip("peft")
    case = CASES["llama"]
    model, loader = quantize_weights(case.model(), Format(4)), case.loader()
    frozen = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = evaluate(lora, loader).loss
    train(lora, loader, TrainConfig(steps=10, lr=1e-2), loss=training_loss(lora), log=False)
    assert evaluate(lora, loader).loss < before
    base = lora.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert torch.equal(base.weight, frozen)


def test_a_model_is_read_by_name_or_the_sentence_says_which_files_to_give(tmp_path):
    model = CASES["gpt2"].model()
    model.save_pretrained(tmp_path)
    again = load(f"hf:{tmp_path}")
    inputs = CASES["gpt2"].inputs(2, 16)
    assert torch.equal(run(again, inputs).logits, run(model.eval(), inputs).logits)
    (tmp_path / "damaged").mkdir()
    for name, text in (
        ("config.json", (tmp_path / "config.json").read_text()),
        ("model.safetensors", "{}"),
        ("pytorch_model.bin", "{}"),
    ):
        (tmp_path / "damaged" / name).write_text(text)
    for nothing in (tmp_path / "nothing", tmp_path / "config.json", tmp_path / "damaged"):
        with pytest.raises(ValueError, match="config.json and model.safetensors") as error:
            load(f"hf:{nothing}")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="hf:"):
        load("gpt2")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5", "vit"])
def test_a_folder_is_read_in_the_memory_of_its_codes(name, tmp_path, monkeypatch):
    """At no time are there the floats of more than the layers that are being read."""
    case, floats, decode = CASES[name], [], artifact.file._decode
    model = quantize_weights(case.model().eval(), Format(4))
    save_pretrained(model, tmp_path)

    def noting(entry, weight, *rest):
        decode(entry, weight, *rest)
        tables = [w.original for w in weights(weight.model, matrices=True) if w.steps]
        floats.append(sum(x.numel() for x in tables if not x.is_meta))

    monkeypatch.setattr(artifact.file, "_decode", noting)
    packed, inputs = from_pretrained(tmp_path, packed=True), case.inputs(2, 16)
    found, wanted = (run(m, inputs)[0] for m in (packed, model))
    assert torch.equal(found, wanted)
    layers = [m for m in packed.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    plain = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    assert len(layers) == len(plain)
    assert max(floats) <= max(m.weight.numel() for m in plain)


def test_what_has_no_values_is_refused(tmp_path):
    model = CASES["llama"].model()
    artifact.save(model, tmp_path / "a.kit")
    with torch.device("meta"):
        empty = type(model)._from_config(model.config)
    with pytest.raises(artifact.ArtifactError, match=r"inv_freq.*kit\.artifact\.without_values"):
        artifact.load(tmp_path / "a.kit", empty)
    with artifact.without_values():
        empty = type(model)._from_config(model.config)
    assert all(p.is_meta for p in empty.parameters())
    inputs = CASES["llama"].inputs(2, 16)
    again = artifact.load(tmp_path / "a.kit", empty)
    assert torch.equal(run(again, inputs).logits, run(model.eval(), inputs).logits)
    with pytest.raises(ValueError, match="trainable=True and packed=True"):
        artifact.load(tmp_path / "a.kit", model, trainable=True, packed=True)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5", "vit"])
def test_whole_layers_go_and_the_folder_gives_the_smaller_model_back(name, tmp_path):
    case, counts = CASES[name], {"num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"}
    kind, config = type(case.model()), case.model().config
    vars(config).update(dict.fromkeys(counts & set(vars(config)), 4))
    model = replace(case, build=lambda: kind._from_config(copy.deepcopy(config))).model()
    inputs, gone = case.inputs(3, case.sizes[0]), {}
    small = prune_layers(adapt(model), [inputs], 0.5)
    assert len(small.removed) == (4 if name == "t5" else 2)
    assert not {"encoder.block.0", "decoder.block.0"} & set(small.removed)  # hold T5's positions
    for stack, _, number in (removed.rpartition(".") for removed in small.removed):
        gone.setdefault(stack, []).append(int(number))
    with skipped(model, gone):
        expected = run(model, inputs).logits
    assert torch.equal(run(small, inputs).logits, expected)
    assert model.config.num_hidden_layers == 4 and small.config.num_hidden_layers == 2
    save_pretrained(quantize_weights(small, Format(4)), tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs).logits, run(small, inputs).logits)
    if name in ("gpt2", "llama", "mixtral", "t5"):  # with a cache, whose layers are numbered
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        ids = inputs["input_ids"][:2, :6]
        tokens = small.generate(ids, use_cache=False, **options)
        assert torch.equal(again.generate(ids, **options), tokens)


def test_a_layer_whose_number_counts_goes_only_where_it_is_the_last():
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    config.scale_attn_by_inverse_layer_idx = True
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.h[0].requires_grad_(False).apply(
        lambda m: m.weight.zero_() if hasattr(m, "nf") else None
    )  # it adds nothing, and would be the first to go
    small = prune_layers(model, [CASES["gpt2"].inputs(3, 12)], 1 / 3)
    assert small.removed == ["transformer.h.2"]


@pytest.mark.parametrize("labels", [1, 3])
def test_regression_is_trained_by_its_own_loss_and_not_taken_for_classes(labels):
    kind = {"num_labels": labels, "problem_type": "regression" if labels == 3 else None}
    shape = dict(vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    config = transformers.BertConfig(**shape, num_attention_heads=2, **kind)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    targets = torch.eye(3)[[0, 1, 2, 0]] if labels == 3 else torch.zeros(4, dtype=torch.long)
    batch = {"input_ids": torch.randint(0, 96, (4, 5)), "labels": targets}
    with pytest.raises(ValueError, match="BertForSequenceClassification solves a regression"):
        evaluate(model, [batch])
    with pytest.raises(ValueError, match="solves a regression"):
        DistillationTrainer(model, copy_model(model), 1.0, 1.0, 0.0)(model, batch)
    batch["labels"] = targets.float()
    assert float(training_loss(model)(model, batch)) == loss_of(model, batch)


def test_a_decoder_of_speech_gets_its_inputs_from_the_labels():
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {"d_model": 16}
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16)
    sizes |= {"vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 10}
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    config = transformers.WhisperConfig(**sizes, **tokens, max_target_positions=12)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    labels = torch.randint(3, 60, (2, 6))
    labels[0, 4:] = -100
    batch = {"input_features": torch.randn(2, 8, 20), "labels": labels}
    assert evaluate(model, [batch]).loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)
