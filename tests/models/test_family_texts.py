"""From texts to answers with the tokenizers of other families than BERT, which tell no token types."""

from __future__ import annotations

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    DistilBertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from camtl.models import CaMtlForMultiTask

TASKS = [{"name": "demo_entailment", "num_labels": 3}, {"name": "demo_sentiment", "num_labels": 2}]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["the", "a", "cat", "dog", "bird", "sat", "ran", "on", "mat", "is", "not", "so", "good"]
TEXTS = [
    ("the cat sat on the mat", "a cat sat"),
    "so good",
    ("", "the dog"),
    "a bird " * 40,
    ("a", "b " * 90),
]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a byte-level BPE learned from a few words, and the tokenizer behind it."""
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        ["the cat sat on the mat", "a dog ran", "so good"] * 3,
        vocab_size=290,
        min_frequency=1,
        special_tokens=SPECIAL,
        show_progress=False,
    )
    folder = tmp_path_factory.mktemp("bpe")
    learner.save_model(str(folder))
    return folder, learner


@pytest.fixture(params=["roberta", "roberta, types of its own", "distilbert"])
def folder(request, learned, tmp_path):
    """A folder with an encoder of random values and its tokenizer, as on the hub."""
    torch.manual_seed(0)
    if request.param == "distilbert":
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
        tokenizer = DistilBertTokenizer(vocab=str(tmp_path / "vocab.txt"))
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 32}
        encoder = DistilBertModel(DistilBertConfig(vocab_size=len(WORDS), **sizes))
    else:
        where, learner = learned
        tokenizer = RobertaTokenizer(vocab=str(where / "vocab.json"), merges=str(where / "merges.txt"))
        if request.param != "roberta":  # without RoBERTa's template: the second text's tokens have type 1
            names = {"pad_token": "<pad>", "unk_token": "<unk>"}
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, **names)
        encoder = RobertaModel(
            RobertaConfig(
                vocab_size=300,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=48,
                max_position_embeddings=34,
                type_vocab_size=1,
            )
        )
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(str(tmp_path))
    return tmp_path


def load(folder) -> CaMtlForMultiTask:
    torch.manual_seed(1)
    return CaMtlForMultiTask.from_pretrained(folder, tasks=TASKS, max_seq_length=32)


def test_predict_from_texts(folder, tmp_path):
    model = load(folder)
    rows = model.predict(TEXTS, task="demo_entailment")
    for text, row in zip(TEXTS, rows, strict=True):
        pair = (text,) if isinstance(text, str) else text
        encoded = model.tokenizer(*pair, truncation="longest_first", max_length=32, return_tensors="pt")
        assert "token_type_ids" not in encoded
        with torch.no_grad():
            logits = model(**encoded, task_ids=torch.tensor([0])).logits[0]
        want = logits.double().softmax(-1).tolist()
        assert list(row["probabilities"].values()) == pytest.approx(want, abs=1e-5)
    assert len({row["score"] for row in rows}) == len(rows)
    model.save_pretrained(tmp_path / "ours")
    model.tokenizer.save_pretrained(str(tmp_path / "ours"))
    again = CaMtlForMultiTask.from_pretrained(tmp_path / "ours")
    assert type(again.tokenizer) is type(model.tokenizer)
    assert again.predict(TEXTS, task="demo_entailment") == rows


def test_a_tokenizer_that_knows_no_token_types(folder):
    model = load(folder)
    tokenizer = model.tokenizer
    want = model.predict(TEXTS, task="demo_entailment")

    class WithoutTypes:
        pad_token_id = tokenizer.pad_token_id

        def __call__(self, *texts, return_token_type_ids, **rules):
            encoded = tokenizer(*texts, **rules)
            return {name: encoded[name] for name in encoded if name != "token_type_ids"}

    model.tokenizer = WithoutTypes()
    assert model.predict(TEXTS, task="demo_entailment") == want


def test_from_rows_to_a_loss(folder, tmp_path):
    from camtl.data import MultiTaskCollator, MultiTaskDataset, load_task, subset, tokenize
    from camtl.tasks import get_task

    model = load(folder)
    tasks = [get_task(name) for name in model.config.tasks]
    tokens = {
        task.name: tokenize(
            task, subset(load_task(task)["train"], 6), model.tokenizer, 32, cache_dir=tmp_path
        )
        for task in tasks
    }
    rows = MultiTaskDataset(tokens, model.config.tasks)
    batch = MultiTaskCollator(model.tokenizer.pad_token_id)([rows[i] for i in (0, 7, 3, 11)])
    assert batch["task_ids"].tolist() == [0, 1, 0, 1]
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == model.config.pad_token_id).all()
    output = model(**batch)
    without = model(**{name: value for name, value in batch.items() if name != "token_type_ids"})
    assert torch.equal(output.loss, without.loss)
    output.loss.backward()
    assert model.bert.embeddings.position_embeddings.weight.grad.abs().sum() > 0
