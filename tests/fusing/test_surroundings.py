"""A fused model among the libraries that people put around it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizerFast, EncoderDecoderModel, Trainer, TrainingArguments, pipeline

import camtl
from camtl.fusing._family import is_fused

from .conftest import FAMILIES, assert_same, check, make_batch, make_model, results

WORDS = ("the", "a", "cat", "dog", "house", "river", "sees", "small", "old", "red", "runs", "never")


class Lora(nn.Module):
    """A linear layer with a low-rank addition, as adapter libraries put one in a layer's place."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.2)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) * 0.2)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T


def add_lora(model: nn.Module) -> nn.Module:
    """Every linear layer of the encoder's layers gets one, the same on every call."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(11)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layer." in f".{name}":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Lora(module))
    torch.random.set_rng_state(generator)
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("first", ["fuse", "lora"])
def test_lora(family: str, first: str, packed: bool) -> None:
    """Wrapped layers are called, before and after fusing alike."""
    model, batch = make_model(family, "ForTokenClassification"), make_batch()

    def fuse(m: Any) -> Any:
        return camtl.fuse(m, packed=packed, strict=True)

    plain = add_lora(copy.deepcopy(model))
    truth = add_lora(copy.deepcopy(model)).double()
    if first == "fuse":
        fused = add_lora(fuse(copy.deepcopy(model)))
    else:
        fused = fuse(add_lora(copy.deepcopy(model)))
    ours = results(fused, batch)
    assert_same(ours, results(plain, batch), results(truth, batch), torch.float32)
    assert any(key.endswith(".a") for key in ours)
    if family != "distilbert":
        assert "but for the bias: its dense layer is a Lora" in str(camtl.fuse_report(fused))
    camtl.unfuse(fused)
    assert not any(is_fused(type(module)) for module in fused.modules())


@pytest.mark.parametrize("first", ["fuse", "peft"])
def test_peft(family: str, first: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_lin", "lin1", "lin2"] if family == "distilbert" else ["query", "value", "dense"]
    adapter = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    model, batch = make_model(family, "ForSequenceClassification"), make_batch()
    torch.manual_seed(2)
    plain = peft.get_peft_model(copy.deepcopy(model), adapter)
    torch.manual_seed(2)
    if first == "fuse":
        fused = peft.get_peft_model(camtl.fuse(copy.deepcopy(model), packed=True), adapter)
    else:
        fused = camtl.fuse(peft.get_peft_model(copy.deepcopy(model), adapter), packed=True)
    ours, theirs = results(fused, batch), results(plain, batch)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)
    merged = fused.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits.double(), theirs["logits"], rtol=1e-4, atol=1e-5)


class Around(nn.Module):
    """Somebody's own model around a Hugging Face one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(32)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        # sentence-transformers' mean pooling
        mask = batch["attention_mask"].unsqueeze(-1).float()
        hidden = self.encoder(**batch).last_hidden_state
        return {"embedding": self.norm((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9))}


@pytest.mark.parametrize("packed", [False, True])
def test_inside_another_module_with_mean_pooling(family: str, packed: bool) -> None:
    fused = check(
        Around(make_model(family)), make_batch(side="holes"), lambda m: camtl.fuse(m, packed=packed)
    )
    assert type(fused.norm) is nn.LayerNorm  # not of a Hugging Face model
    assert camtl.fuse_report(fused).counts["attention"] == (2, 2)


def test_sentence_transformers(family: str, tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    library = pytest.importorskip("sentence_transformers")
    make_model(family).save_pretrained(tmp_path)
    if family == "distilbert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    model = library.SentenceTransformer(str(tmp_path), device="cpu")  # with mean pooling
    texts = ["the cat sees a red house", "never", "a dog runs"]
    plain = model.encode(texts, convert_to_tensor=True)
    ours = camtl.fuse(model, packed=True).encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizerFast:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizerFast(str(vocabulary), model_max_length=24)


TASKS = {
    "text-classification": ("ForSequenceClassification", ["the cat sees a red house", "never", "a dog runs"]),
    "token-classification": ("ForTokenClassification", ["the cat sees a red house", "never", "a dog runs"]),
    "fill-mask": ("ForMaskedLM", ["the cat sees a [MASK]", "never [MASK]", "[MASK] old dog runs"]),
    "feature-extraction": ("Model", ["the cat sees a red house", "never", "a dog runs"]),
}


def numbers(value: Any) -> list[float]:
    """All floats of nested lists and dicts, in order."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, float) or hasattr(value, "dtype") else []


@pytest.mark.parametrize("task", TASKS)
def test_pipeline(family: str, task: str, tokenizer: BertTokenizerFast) -> None:
    head, texts = TASKS[task]
    model = make_model(family, head)
    if family == "distilbert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    found = []
    for m in (model, camtl.fuse(copy.deepcopy(model), packed=True)):
        found.append(numbers(pipeline(task, model=m, tokenizer=tokenizer, device="cpu")(texts, batch_size=3)))
    plain, fused = found
    assert len(plain) >= 3
    if task == "feature-extraction":  # it returns padding too
        plain, fused = ([x for x, y in zip(p, fused, strict=True) if y != 0.0] for p in (plain, fused))
        assert len(plain) >= 3 * 32
    assert fused == pytest.approx(plain, rel=1e-4, abs=1e-5)


class Rows(torch.utils.data.Dataset):
    """Rows of different lengths."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = 3 + index
        return {"input_ids": [5 + (index * k) % 50 for k in range(length)], "labels": index % 2}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [1] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([r["labels"] for r in rows])}


def train(model: Any, folder: Path, **options: Any) -> tuple[dict[str, Tensor], Trainer]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        optim="sgd",  # Adam divides by the gradient's size: the roundings of one near 0 would show in full
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), data_collator=collate)
    trainer.train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, trainer


@pytest.mark.parametrize("packed", [False, True])
def test_trainer(family: str, packed: bool, tmp_path: Path) -> None:
    model = make_model(family, "ForSequenceClassification", num_labels=2)
    plain, before = train(copy.deepcopy(model), tmp_path)
    fused, after = train(camtl.fuse(copy.deepcopy(model), packed=packed, strict=True), tmp_path)
    start = model.state_dict()
    assert sum(not torch.equal(value, start[name]) for name, value in plain.items()) >= 0.8 * len(plain)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert before.get_decay_parameter_names(before.model) == after.get_decay_parameter_names(after.model)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_trainer_in_bfloat16_with_checkpointing(family: str, tmp_path: Path) -> None:
    model = make_model(family, "ForSequenceClassification", num_labels=2)
    options = {"bf16": True, "gradient_checkpointing": True,
               "gradient_checkpointing_kwargs": {"use_reentrant": False}}  # fmt: skip
    plain, _ = train(copy.deepcopy(model), tmp_path, **options)
    fused, trainer = train(camtl.fuse(copy.deepcopy(model), packed=True, strict=True), tmp_path, **options)
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    key = "classifier.weight" if "classifier.weight" in fused else "classifier.out_proj.weight"
    assert F.cosine_similarity(plain[key].flatten(), fused[key].flatten(), dim=0) > 0.999


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_gradient_checkpointing(family: str, packed: bool) -> None:
    """Dropout draws the same mask when a layer is computed again."""
    names = ("dropout", "attention_dropout") if family == "distilbert" else (
        "hidden_dropout_prob", "attention_probs_dropout_prob")  # fmt: skip
    model = camtl.fuse(make_model(family, **dict.fromkeys(names, 0.3)), packed=packed).train()
    batch, found = make_batch(), []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(results(model, batch))
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize(("family", "mask"), [*((family, True) for family in FAMILIES), ("bert", False)])
def test_compile(family: str, mask: bool) -> None:
    """One graph, with gradients; packed=True runs padded in it."""
    one = {"n_layers" if family == "distilbert" else "num_hidden_layers": 1}
    model, batch = make_model(family, "ForSequenceClassification", **one), make_batch()
    if not mask:
        del batch["attention_mask"]
    fused = camtl.fuse(copy.deepcopy(model), packed=True, strict=True)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    ours = compiled(**batch).logits
    ours.sum().backward()
    theirs = model(**batch).logits
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_compiled_dropout_draws_anew() -> None:
    half = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = camtl.fuse(make_model("bert", num_hidden_layers=1, **half)).train()
    torch.compiler.reset()
    compiled, batch = torch.compile(model, backend="aot_eager", fullgraph=True), make_batch()
    assert not torch.equal(compiled(**batch)[0], compiled(**batch)[0])


def test_export() -> None:
    model, batch = make_model("bert"), make_batch()
    expected = camtl.fuse(model, packed=True)(**batch)[0]
    program = torch.export.export(model, (), batch).module()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(program(**batch)[0][real], expected[real], rtol=1e-5, atol=1e-5)


def test_devices() -> None:
    fused = camtl.fuse(make_model("bert"), packed=True)
    moved = copy.deepcopy(fused).to("meta", torch.bfloat16)
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    assert moved(ids)[0].shape == (2, 5, 32)
    assert moved(ids, attention_mask=torch.ones_like(ids))[0].shape == (2, 5, 32)  # nothing to be read there
    moved = moved.float().to_empty(device="cpu")
    moved.load_state_dict(fused.state_dict(), strict=False)
    for name, buffer in fused.named_buffers():
        moved.get_buffer(name).copy_(buffer)
    batch = make_batch()
    assert torch.equal(moved(**batch)[0], fused(**batch)[0])


def test_the_encoder_of_an_encoder_decoder_is_packed() -> None:
    """Its model and its layers have configs of their own: both name the attention."""
    decoder = make_model("bert", "LMHeadModel", is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(encoder=make_model("bert"), decoder=decoder).eval()
    batch = {**make_batch(), "decoder_input_ids": torch.arange(20).view(4, 5)}
    expected = model(**batch).logits
    own = model.encoder.config
    rows = []
    camtl.fuse(model.encoder, packed=True, strict=True)
    hook = model.encoder.encoder.layer[0].register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape)
    )
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert rows == [(1, 21, 32)]
    hook.remove()
    assert camtl.unfuse(model).encoder.config is own
    assert torch.equal(model(**batch).logits, expected)


# -- models made later


def test_apply_to_bert(tmp_path: Path) -> None:
    plain = make_model("bert", "ForSequenceClassification")
    plain.save_pretrained(tmp_path)
    batch = make_batch()
    kinds = [type(module) for module in plain.modules()]
    applied = camtl.apply_camtl_kernels_to_bert(packed=True)
    try:
        assert not any(is_fused(kind) for kind in kinds)
        made = make_model("bert", "ForSequenceClassification")
        loaded = type(plain).from_pretrained(tmp_path)
        other = make_model("roberta")
    finally:
        applied.remove()
    for model in (made, loaded):
        assert camtl.fuse_report(model).counts == {
            "attention": (2, 2), "layer_norm": (5, 5), "gelu": (2, 2), "packed": (1, 1)
        }  # fmt: skip
        assert model.config is model.bert.config
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
        camtl.unfuse(model)
        assert [type(module) for module in model.modules()] == kinds
        assert model.config is model.bert.config
        assert model.config._attn_implementation == "sdpa"
    assert not any(is_fused(type(module)) for module in other.modules())
    later = make_model("bert")
    assert not any(is_fused(type(module)) for module in later.modules())
    assert "post_init" not in vars(FAMILIES["bert"][1].BertPreTrainedModel)


def test_apply_is_a_context_and_nests() -> None:
    base = FAMILIES["bert"][1].BertPreTrainedModel
    with camtl.apply_camtl_kernels_to_bert():
        with camtl.apply_camtl_kernels_to_bert(gelu=False):
            inner = make_model("bert")
        outer = make_model("bert")
    assert camtl.fuse_report(inner).counts["gelu"] == (0, 2)
    assert camtl.fuse_report(outer).counts["gelu"] == (2, 2)
    first, second = camtl.apply_camtl_kernels_to_bert(), camtl.apply_camtl_kernels_to_bert()
    first.remove()
    second.remove()
    second.remove()
    assert camtl.fuse_report(make_model("bert")).counts["gelu"] == (0, 2)
    with pytest.raises(ValueError, match="packed=True needs attention=True"):
        camtl.apply_camtl_kernels_to_bert(attention=False, packed=True)
    assert not any(is_fused(type(module)) for module in make_model("bert").modules())
    if "post_init" in vars(base):
        del base.post_init
