"""Tasks of every type in one model: learned, judged, predicted, packed like padded."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from camtl.data import tokenize
from camtl.errors import UsageError
from camtl.tasks import Task
from camtl.training import CaMtlTrainer, CaMtlTrainingArguments

LETTERS = [f"w{i}" for i in range(8, 40)]
TYPES = [
    Task(name="tone", type="classification", text_columns=["text"], labels=["bad", "good"]),
    Task(name="topics", type="multi_label", text_columns=["text"], labels=["a", "b", "c"]),
    Task(
        name="entities",
        type="tagging",
        text_columns=["words"],
        label_column="tags",
        labels=["O", "B-x", "I-x"],
        metrics=["f1", "accuracy"],
    ),
    Task(
        name="answers",
        type="span",
        text_columns=["question", "context"],
        label_column="answers",
        options={"stride": 4},
    ),
    Task(name="pick", type="choice", text_columns=["asked"], options={"choices": ["first", "second"]}),
    Task(
        name="sense",
        type="marked_spans",
        text_columns=["left", "right"],
        labels=["other", "same"],
        options={
            "spans": [
                {"text": "left", "start": "start1", "end": "end1"},
                {"text": "right", "start": "start2", "end": "end2"},
            ]
        },
    ),
    Task(
        name="group", type="grouped", text_columns=["about", "question", "answer"], labels=["wrong", "right"]
    ),
    Task(name="cloze", type="cloze", text_columns=["query", "passage"], label_column="answers"),
]


def _rows(name: str, rng: random.Random) -> dict[str, Any]:
    """A row whose answer a marker word gives away."""
    words = rng.sample(LETTERS, 5)
    right = rng.randint(0, 1)
    if name == "tone":
        return {"text": " ".join([f"w{right}", *words]), "label": right}
    if name == "topics":
        ids = [i for i in range(3) if rng.random() < 0.5]
        return {"text": " ".join([f"w{i}" for i in ids] + words), "label": ids}
    if name == "entities":
        at = rng.randint(0, 3)
        tags = ["O"] * 5
        words[at], tags[at] = "w0", "B-x"
        if right:
            words[at + 1], tags[at + 1] = "w1", "I-x"
        return {"words": words, "tags": tags}
    if name == "answers":
        context = [*rng.sample(LETTERS, 24)]
        at = rng.randint(0, 23)
        context[at] = "w0"
        text = " ".join(context)
        return {
            "question": "w1",
            "context": text,
            "answers": {"text": ["w0"], "answer_start": [len(" ".join([*context[:at], ""]))]},
        }
    if name == "pick":
        choices = [f"{words[0]} {words[1]}", f"{words[2]} {words[3]}"]
        choices[right] = f"w0 {words[4]}"
        return {"asked": "w2", "first": choices[0], "second": choices[1], "label": right}
    if name == "sense":
        left = f"{words[0]} w{right} {words[1]}"
        start = len(words[0]) + 1
        return {
            "left": left, "right": f"{words[2]} w5", "label": right, "start1": start, "end1": start + 2,
            "start2": len(words[2]) + 1, "end2": len(words[2]) + 3,
        }  # fmt: skip
    if name == "group":
        return {"about": words[0], "question": words[1], "answer": f"w{right}", "label": right}
    entities = rng.sample(LETTERS, 2)
    passage = f"w3 {entities[0]} w4 {entities[1]} {words[0]}"
    return {"query": "w1 @placeholder", "passage": passage, "entities": entities, "answers": [entities[0]]}


def rows_of(task: Task, count: int, seed: int = 0) -> Dataset:
    rng = random.Random(f"{task.name}-{seed}")
    return Dataset.from_list([_rows(task.name, rng) for _ in range(count)])


@pytest.fixture(scope="module")
def trained(make_model, tokenizer, tmp_path_factory):
    """A tiny model trained on all types at once, with its trainer."""
    model = make_model(
        tasks=TYPES, hidden_size=32, num_attention_heads=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout=0.0, initializer_range=0.1, packed=True,
    )  # fmt: skip
    trainer = CaMtlTrainer(
        model,
        CaMtlTrainingArguments(
            output_dir=str(tmp_path_factory.mktemp("types")),
            per_device_train_batch_size=32,
            max_steps=220,
            learning_rate=5e-3,
            sampler="uniform",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        ),
        train_dataset={task.name: rows_of(task, 400 if task.name == "topics" else 160) for task in TYPES},
        eval_dataset={task.name: rows_of(task, 24, seed=1) for task in TYPES},
        processing_class=tokenizer,
    )
    torch.manual_seed(0)
    trainer.train()
    return trainer


def test_every_type_is_learned(trained):
    scores = trained.evaluate()
    learned = {
        "tone_accuracy": 0.9,
        "topics_micro_f1": 0.9,
        "entities_f1": 0.9,
        "answers_exact_match": 0.9,
        "answers_f1": 0.9,
        "pick_accuracy": 0.9,
        "sense_accuracy": 0.9,
        "group_f1": 0.9,
        "group_exact_match": 0.9,
        "cloze_exact_match": 0.9,
    }
    low = {key: scores[f"eval_{key}"] for key, least in learned.items() if scores[f"eval_{key}"] < least}
    assert not low
    assert 0.9 <= scores["eval_average"] <= 1.0
    for task in TYPES:
        assert 0.0 <= scores[f"eval_{task.name}_loss"] < 0.5


@pytest.mark.parametrize("task", TYPES, ids=lambda task: task.name)
def test_prediction_says_what_evaluation_decodes(trained, task):
    rows = rows_of(task, 7, seed=2)
    model = trained.model
    given = [{name: value for name, value in row.items() if name != task.label_column} for row in rows]
    said = model.predict(given, task=task.name, batch_size=3)
    decoded = trained.decode_task(task.name, rows)
    assert len(said) == len(decoded) == 7
    for a, b in zip(said, decoded, strict=True):
        assert set(a) == set(b)
        for key in a.keys() & {"label", "labels", "tags", "answer", "choice", "begin", "end", "entities"}:
            assert a[key] == b[key]
        if "score" in a:
            assert a["score"] == pytest.approx(b["score"], abs=1e-4)


@pytest.mark.parametrize("task", TYPES, ids=lambda task: task.name)
def test_padded_like_packed(trained, task):
    rows = rows_of(task, 5, seed=3)
    packed = trained.predict({task.name: rows})
    config = trained.model.config
    try:
        config.packed = trained.model.bert.config.packed = False
        padded = trained.predict({task.name: rows})
    finally:
        config.packed = trained.model.bert.config.packed = True
    (a,), (b,) = packed.predictions.values(), padded.predictions.values()
    for left, right in zip(a, b, strict=True):
        finite = np.isfinite(left)
        assert (finite == np.isfinite(right)).all()
        np.testing.assert_allclose(left[finite], right[finite], atol=2e-5)
    assert packed.metrics[f"test_{task.name}_loss"] == pytest.approx(
        padded.metrics[f"test_{task.name}_loss"], abs=1e-5
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("regression_places", ["reserve"])
def test_uncertainty_chooses_among_all_types(make_model, tokenizer, tmp_path, packed, regression_places):
    model = make_model(tasks=TYPES, packed=packed)
    trainer = CaMtlTrainer(
        model,
        CaMtlTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=10, max_steps=4, sampler="uncertainty",
            candidates_per_task=4, regression_places=regression_places, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=True, learning_rate=1e-3,
        ),
        train_dataset={task.name: rows_of(task, 12) for task in TYPES},
        processing_class=tokenizer,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "heads" in name}
    result = trainer.train()
    assert np.isfinite(result.training_loss)
    shares = [result.metrics[f"train_share_{task.name}"] for task in TYPES]
    assert sum(shares) == pytest.approx(1.0)
    assert sum(share > 0 for share in shares) >= 4
    changed = [
        name for name, value in before.items() if not torch.equal(value, dict(model.named_parameters())[name])
    ]
    assert {"heads.weight", "token_heads.weight"} <= set(changed)


def test_a_long_context_is_read_in_windows(trained):
    parts = trained._parts({"answers": rows_of(TYPES[3], 5, seed=4)}, "dataset")
    rows = parts[0].dataset["row"][:]
    assert len(rows) > 5
    assert sorted(set(rows)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("task", TYPES, ids=lambda task: task.name)
def test_what_is_judged_by_rows_is_refused_tokenised(trained, tokenizer, tmp_path, task):
    """As soon as a trainer gets it, not after the training; every other type is judged as well without."""
    rows = rows_of(task, 6)
    tokenised = {task.name: tokenize(task, rows, tokenizer, 24, cache_dir=tmp_path)}
    if not task.task_type.judged_by_rows:
        (a, b) = trained.evaluate(tokenised), trained.evaluate({task.name: rows})
        assert all(a[key] == b[key] for key in b if key.startswith(f"eval_{task.name}_"))
        return
    columns = ", ".join([*task.task_type.columns(task), task.label_column])
    said = rf"rows of task '{task.name}' .* are tokenised.* judged by its rows; .*columns {columns}\)$"
    with pytest.raises(UsageError, match=f"^eval_dataset: {said}"):
        CaMtlTrainer(trained.model, trained.args, eval_dataset=tokenised, processing_class=tokenizer)
    with pytest.raises(UsageError, match=f"^test_dataset: {said}"):
        trained.predict(tokenised)
    # Without labels there is nothing to judge.
    bare = tokenize(
        task, rows.remove_columns(task.label_column), tokenizer, 24, tmp_path, allow_unlabelled=True
    )
    (logits,) = trained.predict({task.name: bare}).predictions.values()
    assert len(logits) == len(bare)


@pytest.mark.parametrize("task", TYPES, ids=lambda task: task.name)
@pytest.mark.parametrize("unlabelled", [1, 4])
def test_rows_of_which_some_have_no_label_are_predicted_but_not_judged(trained, task, unlabelled):
    rows = rows_of(task, 4).to_list()
    for row in rows[:unlabelled]:
        row[task.label_column] = None
    if unlabelled == len(rows):
        rows = [{name: value for name, value in row.items() if name != task.label_column} for row in rows]
    result = trained.predict({task.name: Dataset.from_list(rows)})
    assert len(result.predictions[task.name]) >= 4
    assert result.label_ids == {}
    assert not [key for key in result.metrics if key.startswith(f"test_{task.name}")]
    labelled = trained.predict({task.name: rows_of(task, 4)})
    assert set(labelled.label_ids) == {task.name}
    assert f"test_{task.name}_loss" in labelled.metrics


def test_logits_of_places_are_not_decoded_alone(trained):
    with pytest.raises(UsageError, match=r"'entities'.*use predict"):
        trained.model.decode_logits(torch.zeros(1, 3), "entities")


@pytest.mark.parametrize(
    ("task", "entry", "said"),
    [
        ("answers", "one text", "'answers' reads"),
        ("answers", {"question": "w1"}, "entry 1: has no 'context'"),
        ("pick", ("w1",), "'pick' reads asked, first, second"),
        ("sense", ("w1", "w2"), "'sense' needs more than texts"),
        ("entities", {"words": []}, "holds no word"),
        ("answers", 3, "3 is not accepted"),
    ],
)
def test_entries_that_are_no_rows(trained, task, entry, said):
    with pytest.raises(UsageError, match=said):
        trained.model.predict([entry], task=task)


def test_steps_without_a_label_are_no_part_of_a_mean(make_model, tokenizer, tmp_path):
    """A row whose answer fits into no window has no loss: a step of such rows says nothing of the task."""
    answers = TYPES[3]
    rows = rows_of(answers, 20).to_list()
    for row in rows[::2]:
        row["answers"] = {"text": [row["context"]], "answer_start": [0]}
    model = make_model(tasks=[TYPES[0], answers])
    trainer = CaMtlTrainer(
        model,
        CaMtlTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=40, logging_steps=40,
            sampler="uniform", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset={"tone": rows_of(TYPES[0], 20), "answers": Dataset.from_list(rows)},
        processing_class=tokenizer,
    )  # fmt: skip
    losses: dict[int, list[float]] = {0: [], 1: []}
    steps, original = [], trainer.compute_loss

    def record(model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss, outputs = original(model, inputs, **{**kwargs, "return_outputs": True})
        tasks = set(inputs["task_ids"].tolist())
        labelled = tasks & {0}
        if "token_labels" in inputs and (inputs["token_labels"] > 0).any():
            labelled.add(1)
        steps.append((tasks, labelled))
        for task in labelled:
            losses[task].append(outputs.loss_per_task[task].item())
        return loss

    trainer.compute_loss = record
    trainer.train()
    assert any(tasks != labelled for tasks, labelled in steps)
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    for name, values in (("tone", losses[0]), ("answers", losses[1])):
        assert entry[f"loss_{name}"] == pytest.approx(sum(values) / len(values), rel=1e-5)
