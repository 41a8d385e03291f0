from __future__ import annotations

import gzip
import json

import pytest

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "slept",
    "on",
    "mat",
    "rug",
    "and",
    "did",
    "not",
    ".",
    ",",
    "?",
    "'",
    "##s",
    "##ed",
    "red",
    "blue",
    "big",
    "small",
    "house",
]


@pytest.fixture(scope="session")
def tokenizer():
    """A WordPiece tokenizer of a few words, like BERT's."""
    return _make_tokenizer(WORDS)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Makes one like it: of these words and more, lower-casing or not."""
    return lambda *more, **rules: _make_tokenizer([*WORDS, *more], **rules)


def _make_tokenizer(words, lowercase=True):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words)}
    rules = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rules.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rules.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def jsonl(tmp_path):
    """Write rows as JSON Lines to a file under tmp_path."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        opener = gzip.open if name.endswith(".gz") else open
        with opener(path, "wt", encoding="utf-8") as handle:
            handle.write(text)
        return path

    return write
