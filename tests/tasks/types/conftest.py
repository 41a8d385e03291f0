from __future__ import annotations

import gzip
import json
import string

import numpy as np
import pytest

from camtl.tasks import Task
from camtl.tasks.types import Outputs

WORDS = [
    "the",
    "a",
    "an",
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
    "red",
    "blue",
    "big",
    "small",
    "house",
    "who",
    "where",
    "what",
    "it",
    "is",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def tokenizer():
    """A lower-casing WordPiece tokenizer of a few words; other words become letters, none is unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*SPECIAL, *WORDS, *(c for c in letters if c not in WORDS), *(f"##{c}" for c in letters)]
    rules = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rules.normalizer = normalizers.BertNormalizer(lowercase=True)
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rules.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=rules, **special)


@pytest.fixture
def tokens(tokenizer):
    """The tokens of a sequence as texts, those at which ``marks`` is not 0."""

    def tokens(ids, marks=None):
        texts = tokenizer.convert_ids_to_tokens(ids)
        return [text for text, mark in zip(texts, marks or [1] * len(texts), strict=True) if mark]

    return tokens


@pytest.fixture
def prepared():
    """Rows (dicts) as the task's type prepares them; twice, which must change nothing."""

    def prepared(task: Task, rows, allow_unlabelled=False):
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [row.get(name) for row in rows] for name in names}
        once = task.task_type.prepare(task, columns, where, allow_unlabelled)
        assert task.task_type.prepare(task, once, where, allow_unlabelled) == once
        assert set(once) <= set(task.task_type.features(task))
        return once

    return prepared


@pytest.fixture
def gold():
    """The outputs of a model that is always right and sure, on encoded rows."""
    return gold_outputs


@pytest.fixture
def jsonl(tmp_path):
    """Write rows as gzipped JSON Lines to a file under tmp_path."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        return path

    return write


def where(i: int) -> str:
    return f"rows.jsonl, line {i + 1}"


def gold_outputs(task: Task, rows, encoded) -> Outputs:
    head = task.task_type.head(task)
    if head.reads in ("pooled", "spans"):
        labels = np.array(encoded["labels"])
        if labels.ndim == 1 and task.type == "regression":
            logits = labels[:, None]
        elif labels.ndim == 1:
            logits = 9.0 * np.eye(head.outputs)[labels.astype(int)]
        else:
            logits = 18.0 * labels - 9.0
        return Outputs(sequences=encoded, logits=logits, rows=rows)
    found = []
    for marks, targets in zip(encoded["token_marks"], encoded["token_labels"], strict=True):
        logits = np.zeros((len(marks), head.outputs + 1))
        logits[:, head.outputs :] = -np.inf  # outputs that other tasks have more of
        for place, (mark, target) in enumerate(zip(marks, targets, strict=True)):
            if head.reads == "positions":
                logits[place, : head.outputs] = [9.0 * (target >> j & 1) for j in range(head.outputs)]
                if not mark:
                    logits[place] = -np.inf
            elif mark:
                logits[place, target] = 9.0
        found.append(logits)
    return Outputs(sequences=encoded, token_logits=found, rows=rows)
