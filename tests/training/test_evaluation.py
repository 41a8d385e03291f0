"""Evaluation: keys, averages, order, best model, early stopping."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import TrainerCallback

from camtl.errors import UsageError


class Counter(TrainerCallback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.steps = 0
        self.announced = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.metrics.append(metrics)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any
    ) -> None:
        self.steps += 1
        self.announced = len(eval_dataloader)


def test_keys_and_averages(make_trainer):
    counter = Counter()
    trainer = make_trainer(trainer={"callbacks": [counter]})
    metrics = trainer.evaluate()
    scores = {
        "eval_tone_accuracy", "eval_tone_f1", "eval_relation_accuracy", "eval_relation_mismatched_accuracy",
        "eval_closeness_pearson", "eval_closeness_spearmanr",
    }  # fmt: skip
    losses = {"eval_tone_loss", "eval_relation_loss", "eval_relation_mismatched_loss", "eval_closeness_loss"}
    rest = {"eval_average", "eval_task_sigma", "eval_loss", "eval_runtime", "eval_samples_per_second",
            "eval_steps_per_second"}  # fmt: skip
    assert set(metrics) - {"epoch"} == scores | losses | rest
    assert counter.metrics == [metrics]
    assert counter.steps == counter.announced == 3 + 3 + 2 + 2
    per_task = [
        (metrics["eval_tone_accuracy"] + metrics["eval_tone_f1"]) / 2,
        (metrics["eval_relation_accuracy"] + metrics["eval_relation_mismatched_accuracy"]) / 2,
        (metrics["eval_closeness_pearson"] + metrics["eval_closeness_spearmanr"]) / 2,
    ]
    assert metrics["eval_average"] == pytest.approx(statistics.fmean(per_task))
    assert metrics["eval_task_sigma"] == pytest.approx(statistics.pstdev(per_task))
    assert metrics["eval_loss"] == pytest.approx(
        statistics.fmean(
            [
                metrics["eval_tone_loss"],
                (metrics["eval_relation_loss"] + metrics["eval_relation_mismatched_loss"]) / 2,
                metrics["eval_closeness_loss"],
            ]
        )
    )
    assert trainer.state.log_history[-1]["eval_average"] == metrics["eval_average"]


def test_predictions_are_the_models_row_by_row(make_trainer, data):
    trainer = make_trainer()
    model, held = trainer.model.eval(), data["eval"]
    predicted = trainer.predict(held)
    assert set(predicted.predictions) == {"tone", "relation", "relation_mismatched", "closeness"}
    flat = {"tone": held["tone"], "relation": held["relation"]["validation"], "closeness": held["closeness"],
            "relation_mismatched": held["relation"]["validation_mismatched"]}  # fmt: skip
    for name, rows in flat.items():
        task = trainer.model.config.task_index(name.removesuffix("_mismatched"))
        info = trainer.model.config.task_info[task]
        for i, row in enumerate(rows):
            with torch.no_grad():
                one = model(
                    input_ids=torch.tensor([row["input_ids"]]),
                    token_type_ids=torch.tensor([row["token_type_ids"]]),
                    task_ids=torch.tensor([task]),
                ).logits[0, : info["num_labels"]]
            if info["type"] == "regression":
                one = one * info["label_std"] + info["label_mean"]
            np.testing.assert_allclose(predicted.predictions[name][i], one.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(predicted.label_ids[name], np.asarray(rows["labels"]))
    best = predicted.predictions["tone"].argmax(1)
    labels = np.asarray(held["tone"]["labels"]).astype(int)
    assert predicted.metrics["test_tone_accuracy"] == pytest.approx(accuracy_score(labels, best))
    assert predicted.metrics["test_tone_f1"] == pytest.approx(f1_score(labels, best, zero_division=0))
    logits = torch.from_numpy(predicted.predictions["tone"])
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
    assert predicted.metrics["test_tone_loss"] == pytest.approx(loss, rel=1e-5)
    np.testing.assert_array_equal(trainer.predict_task("tone", held["tone"]), predicted.predictions["tone"])


def test_a_task_scores_the_same_alone_and_with_others(make_trainer, data):
    trainer = make_trainer()
    together = trainer.evaluate()
    alone = trainer.evaluate({"closeness": data["eval"]["closeness"]})
    for key in ("eval_closeness_pearson", "eval_closeness_loss"):
        assert alone[key] == together[key]
    assert "eval_tone_accuracy" not in alone


def test_regression_loss_is_in_the_training_scale(make_trainer, data):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    predicted = trainer.predict({"closeness": data["eval"]["closeness"]})
    info = trainer.model.config.task_info[2]
    errors = (predicted.predictions["closeness"][:, 0] - predicted.label_ids["closeness"]) / info["label_std"]
    assert metrics["eval_closeness_loss"] == pytest.approx(float((errors**2).mean()), rel=1e-4)


def test_rows_without_labels_can_be_predicted_only(make_trainer, raw, tokenizer, data):
    trainer = make_trainer(trainer={"processing_class": tokenizer})
    rows = raw({"tone": 5}, 3)["tone"].remove_columns("label")
    predicted = trainer.predict({"tone": rows})
    assert predicted.predictions["tone"].shape == (5, 2)
    assert predicted.label_ids == {}
    assert not any(key.endswith("accuracy") for key in predicted.metrics)
    with pytest.raises(UsageError, match="no label"):
        trainer.evaluate({"tone": data["eval"]["tone"].remove_columns("labels")})


def test_evaluation_does_not_change_training(make_trainer, losses):
    runs = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make_trainer(max_steps=4, **options)
        recorder = losses(trainer)
        trainer.train()
        runs.append(recorder.values)
    assert runs[0] == runs[1]


def scripted(trainer: Any, averages: list[float]) -> None:
    """Let the evaluations report given averages, whatever the model does."""
    original = trainer.callback_handler.on_evaluate
    remaining = iter(averages)

    def on_evaluate(args: Any, state: Any, control: Any, metrics: Any) -> Any:
        metrics["eval_average"] = next(remaining)
        return original(args, state, control, metrics)

    trainer.callback_handler.on_evaluate = on_evaluate


def test_early_stopping_and_best_model(make_trainer):
    trainer = make_trainer(
        max_steps=12, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        early_stopping_patience=2, load_best_model_at_end=True, save_total_limit=1, learning_rate=0.01,
    )  # fmt: skip
    scripted(trainer, [0.3, 0.5, 0.4, 0.45])
    result = trainer.train()
    assert result.global_step == 8
    assert trainer.state.best_metric == 0.5
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4"
    from safetensors.torch import load_file

    saved = load_file(best / "model.safetensors")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-4"]


def test_result_files(make_trainer):
    trainer = make_trainer()
    trained = trainer.train()
    folder = Path(trainer.args.output_dir)
    trainer.save_metrics("train", trained.metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.save_model()
    assert json.loads((folder / "eval_results.json").read_text()) == metrics
    assert json.loads((folder / "all_results.json").read_text()) == {**trained.metrics, **metrics}
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "training_args.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt")) or "tmp" in name]


def test_history_has_losses_and_scores_by_step(make_trainer):
    trainer = make_trainer(max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    rows = trainer.history()
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert {"loss", "loss_tone", "eval_average", "eval_tone_accuracy", "learning_rate"} <= set(row)
        assert "eval_runtime" not in row


def test_evaluation_during_training_needs_data(make_model, tmp_path, data):
    from camtl.training import CaMtlTrainer, CaMtlTrainingArguments

    args = CaMtlTrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps")
    with pytest.raises(UsageError, match="eval_dataset"):
        CaMtlTrainer(make_model(), args, train_dataset=data["train"])


@pytest.mark.parametrize("metric", ["eval_tone_acuracy", "tone_pearson", "accuracy"])
def test_a_best_metric_that_no_evaluation_has_is_refused(make_trainer, metric):
    often = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric}
    for options in (
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1},
        {"early_stopping_patience": 2},
    ):
        with pytest.raises(UsageError, match=f"'{metric}', which no evaluation .*eval_tone_accuracy"):
            make_trainer(**often, **options)


@pytest.mark.parametrize("metric", ["eval_relation_mismatched_accuracy", "closeness_pearson", "eval_loss"])
def test_every_result_can_be_the_best_metric(make_trainer, metric):
    options = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
    trainer = make_trainer(metric_for_best_model=metric, max_steps=1, **options)
    trainer.train()
    assert trainer.state.best_metric is not None


def test_a_diverged_run_says_so_once(make_trainer, caplog):
    trainer = make_trainer(save_strategy="steps", save_steps=2, logging_steps=3)
    compute = trainer.compute_loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        return (result[0] * math.nan, result[1]) if isinstance(result, tuple) else result * math.nan

    trainer.compute_loss = broken
    assert not math.isfinite(trainer.train().training_loss)
    assert not math.isfinite(trainer.evaluate()["eval_loss"])
    lines = [record.getMessage() for record in caplog.records if "diverged" in record.getMessage()]
    assert lines == [
        "the training loss is nan: the training has diverged and the model is of no use; "
        "use a lower learning_rate or more warmup_steps"
    ]
    shutil.rmtree(Path(trainer.args.output_dir) / "checkpoint-3", ignore_errors=True)
    caplog.clear()
    again = make_trainer(save_strategy="steps", save_steps=2, logging_steps=3)
    assert not math.isfinite(again.train(resume_from_checkpoint="auto").training_loss)
    assert "the training has diverged" in caplog.text


def test_a_good_run_is_not_called_diverged(make_trainer, caplog):
    trainer = make_trainer()
    trainer.train()
    trainer.evaluate()
    assert "diverged" not in caplog.text
