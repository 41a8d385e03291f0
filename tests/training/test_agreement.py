"""What a resumed run must have in common with the run that was saved."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from camtl.data import tokenize
from camtl.errors import UsageError
from camtl.training.loader import fingerprint


def test_other_settings_are_refused_with_both_values(make_trainer, make_model, data, tasks):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(**options).train()

    def message(**changed: Any) -> str:
        with pytest.raises(UsageError) as error:
            make_trainer(**{**options, **changed}).train(resume_from_checkpoint="auto")
        return str(error.value)

    text = message(sampler="sqrt", per_device_train_batch_size=4)
    assert "sampler: the checkpoint has proportional, this run has sqrt" in text
    assert "batch size per device: the checkpoint has 6, this run has 4" in text
    assert "seed: the checkpoint has 3, this run has 4" in message(seed=4)
    text = message(model=make_model(tasks=[tasks[1], tasks[0], tasks[2]]))
    assert (
        "task list: the checkpoint has tone, relation, closeness, this run has relation, tone, closeness"
        in text
    )
    fewer = {**data["train"], "tone": data["train"]["tone"].select(range(30))}
    assert "tone 40" in message(train=fewer)
    assert "tone 30" in message(train=fewer)
    assert "gradient accumulation" in message(gradient_accumulation_steps=2)
    text = message(label_scale="raw")
    assert "label_scale: the checkpoint has closeness mean 13." in text
    assert "this run has closeness raw" in text
    other = data["train"]["tone"].select(range(39, -1, -1))  # as many rows, in another order
    text = message(train={**data["train"], "tone": other})
    assert text.count("this run has") == 1
    assert "hash of the training data: the checkpoint has tone " in text
    text = message(model=make_model(max_seq_length=23, freeze="0-0", bottleneck="none", num_hidden_layers=1))
    for part in (
        "max_seq_length: the checkpoint has 24, this run has 23",
        "freeze: the checkpoint has none, this run has 0-0",
        "bottleneck: the checkpoint has top, this run has none",
        "num_hidden_layers: the checkpoint has 2, this run has 1",
    ):
        assert part in text
    assert "packed" not in message(model=make_model(packed=True), seed=4)


def test_other_ways_to_choose_candidates_are_refused(make_trainer):
    options = {"sampler": "uncertainty", "save_strategy": "steps", "save_steps": 2}
    make_trainer(**options).train()
    changed = {"score": "reference", "score_dropout": True, "min_share": 0.2}
    changed["regression_places"] = "borrow:tone"
    with pytest.raises(UsageError) as error:
        make_trainer(**options, **changed).train(resume_from_checkpoint="auto")
    for part in (
        "score: the checkpoint has paper, this run has reference",
        "score_dropout: the checkpoint has False, this run has True",
        "min_share: the checkpoint has 0.0, this run has 0.2",
        "regression_places: the checkpoint has reserve, this run has borrow:tone",
    ):
        assert part in str(error.value)


def test_the_hash_of_rows_depends_on_the_rows_alone(data, tokenizer, raw, tasks, tmp_path):
    rows = data["train"]["tone"]
    again = tokenize(tasks[0], raw({"tone": 40}, 0)["tone"], tokenizer, 24, cache_dir=tmp_path)
    shuffled = again.select(range(39, -1, -1))
    assert fingerprint(shuffled) != fingerprint(rows)
    assert fingerprint(shuffled.select(range(39, -1, -1))) == fingerprint(again) == fingerprint(rows)
    plain = Dataset.from_dict({"input_ids": [[2, 7, 3], [2, 3]], "labels": [1.0, 0.0], "length": [3, 2]})
    assert fingerprint(plain) == "1ea88508a0c3"  # the same in every process
    for column in ("input_ids", "labels", "length"):
        values = again[column][:]
        values[7] = [*values[7][:-1], 9] if column == "input_ids" else values[7] + 1
        changed = again.remove_columns(column).add_column(column, values)
        assert fingerprint(changed) != fingerprint(rows)
