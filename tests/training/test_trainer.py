"""Training: loss, samplers, accumulation, logs, optimizer groups, autocast, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from camtl.data.samplers import MultiTaskBatchSampler, UniformSampler
from camtl.errors import UsageError
from camtl.training import CaMtlTrainer, CaMtlTrainingArguments

SAMPLERS = [
    "proportional",
    "sqrt",
    "temperature",
    "annealed",
    "uniform",
    "round_robin",
    "loss",
    "uncertainty",
]


def test_learns_all_tasks_from_raw_rows(make_model, raw, tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sizes = {"tone": 96, "relation": 96, "closeness": 96}
    held = raw({"tone": 48, "relation": 48, "closeness": 48}, 9)
    args = CaMtlTrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=16,
        max_steps=150,
        learning_rate=5e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = CaMtlTrainer(
        model, args, train_dataset=raw(sizes, 0), eval_dataset=held, processing_class=tokenizer
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_average"] > 0.8 > before["eval_average"] + 0.2
    assert after["eval_loss"] < 0.6 * before["eval_loss"]
    for task in ("tone", "relation", "closeness"):
        logged = [row[f"loss_{task}"] for row in trainer.history() if f"loss_{task}" in row]
        assert logged[-1] < 0.5 * logged[0]
    predicted = trainer.predict({"closeness": held["closeness"]})
    assert predicted.predictions["closeness"].shape == (48, 1)
    assert 9.0 < predicted.predictions["closeness"].mean() < 17.0  # the labels' own scale: 10 to 16
    assert trainer.model.predict(["w1 w9 w10"], task="tone")[0]["label"] == "good"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_trains(make_trainer, losses, sampler):
    trainer = make_trainer(sampler=sampler)
    recorder = losses(trainer)
    result = trainer.train()
    assert result.global_step == 3
    assert len(recorder.values) == 3
    assert all(math.isfinite(value) for value in recorder.values)
    assert [batch["task_ids"].numel() for batch in recorder.inputs] == [6, 6, 6]
    shares = trainer.selection_shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    trained = torch.cat([batch["task_ids"] for batch in recorder.inputs])
    for task, name in enumerate(trainer.tasks):
        assert shares[name] == pytest.approx((trained == task).float().mean().item())
        assert result.metrics[f"train_share_{name}"] == shares[name]


def test_sampler_given_as_class_and_function(make_trainer):
    by_class = make_trainer(trainer={"sampler": UniformSampler})
    by_class.train()
    assert isinstance(by_class.train_sampler, UniformSampler)
    only_last = make_trainer(trainer={"sampler": lambda sizes, epoch: [0, 0, 1]})
    only_last.train()
    assert isinstance(only_last.train_sampler, MultiTaskBatchSampler)
    assert only_last.selection_shares() == {"tone": 0.0, "relation": 0.0, "closeness": 1.0}


def test_epoch_has_all_rows_over_batch_size_steps(make_trainer):
    trainer = make_trainer(max_steps=-1, num_train_epochs=2)
    result = trainer.train()
    assert len(trainer.train_sampler) == math.ceil((40 + 24 + 17) / 6)
    assert result.global_step == 2 * math.ceil(81 / 6)
    uncertain = make_trainer(
        max_steps=-1, num_train_epochs=1, sampler="uncertainty", gradient_accumulation_steps=3
    )
    assert uncertain.train().global_step == math.ceil(math.ceil(81 / 6) / 3)


def test_every_epoch_is_a_new_pass_over_all_rows(make_trainer, make_model, losses):
    trainer = make_trainer(model=make_model(packed=False), max_steps=-1, num_train_epochs=2)
    recorder = losses(trainer)
    trainer.train()
    rows = [
        (task, *ids[mask.bool()].tolist())
        for batch in recorder.inputs
        for task, ids, mask in zip(
            batch["task_ids"].tolist(), batch["input_ids"], batch["attention_mask"], strict=True
        )
    ]
    assert len(rows) == 2 * 81
    assert sorted(rows[:81]) == sorted(rows[81:])
    assert rows[:81] != rows[81:]


def test_reference_epoch_length(make_trainer):
    trainer = make_trainer(epoch_mode="reference", percent_of_max_data_size=0.5, sampler="uncertainty")
    trainer.get_train_dataloader()
    assert len(trainer.train_sampler) == int(math.ceil(40 / 6) * 3 * 0.5)


def test_accumulated_gradient_is_the_mean_of_the_calls(make_trainer, make_model, losses):
    """Uneven micro-batches: 5 of 6 rows' worth of an epoch, the last one short and alone in its update."""
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    trainer = make_trainer(
        model=model, gradient_accumulation_steps=4, max_steps=4, max_grad_norm=0.0, learning_rate=1e-3
    )
    recorder = losses(trainer)
    gradients: list[dict[str, torch.Tensor]] = []
    weights: list[dict[str, torch.Tensor]] = []
    original = trainer.callback_handler.on_pre_optimizer_step

    def capture(*args: Any, **kwargs: Any) -> Any:
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return original(*args, **kwargs)

    trainer.callback_handler.on_pre_optimizer_step = capture  # type: ignore[method-assign]
    trainer.train()
    assert not model.accepts_loss_kwargs
    assert not trainer.model_accepts_loss_kwargs
    sizes = [4, 4, 4, 2]  # 14 batches of an epoch
    assert len(recorder.inputs) == sum(sizes)
    fresh = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    fresh.config.task_info[:] = model.config.task_info
    fresh.refresh_label_scale()
    fresh.train()
    start = 0
    for update, size in enumerate(sizes):
        fresh.load_state_dict(weights[update])
        fresh.zero_grad()
        calls = [fresh(**batch).loss for batch in recorder.inputs[start : start + size]]
        torch.stack(calls).mean().backward()
        for name, parameter in fresh.named_parameters():
            torch.testing.assert_close(gradients[update][name], parameter.grad, rtol=1e-4, atol=1e-6)
        reported = recorder.values[start : start + size]
        assert sum(reported) == pytest.approx(torch.stack(calls).mean().item(), rel=1e-5)
        start += size


def test_logged_losses_are_means_over_steps_where_the_task_was_present(make_trainer):
    trainer = make_trainer(max_steps=6, logging_steps=3, sampler="sqrt")
    seen: list[tuple[list[float], list[int]]] = []
    original = trainer.compute_loss

    def record(model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss, outputs = original(model, inputs, **{**kwargs, "return_outputs": True})
        seen.append((outputs.loss_per_task.tolist(), inputs["task_ids"].unique().tolist()))
        return loss

    trainer.compute_loss = record  # type: ignore[method-assign]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry, steps in zip(logs, (seen[:3], seen[3:]), strict=True):
        for task, name in enumerate(trainer.tasks):
            values = [per_task[task] for per_task, present in steps if task in present]
            if values:
                assert entry[f"loss_{name}"] == pytest.approx(sum(values) / len(values), rel=1e-5)
            else:
                assert f"loss_{name}" not in entry


def test_learning_rate_and_decay_groups(make_trainer, make_model):
    model = make_model(freeze="0-0")
    trainer = make_trainer(
        model=model,
        conditional_learning_rate=5e-3,
        head_learning_rate=7e-3,
        weight_decay=0.1,
        learning_rate=1e-4,
    )
    trainer.create_optimizer()
    names = {id(p): n for n, p in model.named_parameters()}
    conditional = {n for n, _ in model.conditional_parameters()}
    grouped: dict[str, tuple[float, float]] = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter.requires_grad
            grouped[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert set(grouped) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(grouped) < len(names)
    rates = {"conditional": 0, "heads": 0, "encoder": 0}
    for name, (rate, decay) in grouped.items():
        part = "conditional" if name in conditional else "heads" if name.startswith("heads.") else "encoder"
        rates[part] += 1
        assert rate == {"conditional": 5e-3, "heads": 7e-3, "encoder": 1e-4}[part], name
        assert decay == (0.0 if "bias" in name or "LayerNorm.weight" in name else 0.1), name
    assert all(rates.values())
    trainer = make_trainer(
        model=make_model(), conditional_learning_rate=5e-3, warmup_steps=2, logging_steps=1
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate_conditional" in entry]
    assert logs[1]["learning_rate_conditional"] == pytest.approx(5.0 * logs[1]["learning_rate_encoder"])
    assert logs[0]["learning_rate_conditional"] < logs[1]["learning_rate_conditional"]


def test_frozen_weights_do_not_move(make_trainer, make_model):
    model = make_model(freeze="half")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make_trainer(model=model, weight_decay=0.1).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert not moved & frozen
    assert moved


def test_bf16_autocast_step(make_trainer, make_model):
    trainer = make_trainer(bf16=True, use_cpu=False, sampler="uncertainty")
    dtypes = set()
    linear = trainer.model.bert.pooler.dense
    linear.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.train()
    metrics = trainer.evaluate()
    assert dtypes == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert math.isfinite(metrics["eval_loss"])


def test_a_part_of_the_models_tasks_can_be_trained(make_trainer, data, losses):
    for sampler in ("proportional", "uncertainty", "loss"):
        train = {"closeness": data["train"]["closeness"], "relation": data["train"]["relation"]}
        trainer = make_trainer(train=train, held={"relation": data["eval"]["relation"]}, sampler=sampler)
        recorder = losses(trainer)
        trainer.train()
        assert set(torch.cat([batch["task_ids"] for batch in recorder.inputs]).tolist()) <= {1, 2}
        assert trainer.selection_shares()["tone"] == 0.0
        assert trainer.evaluate()["eval_relation_accuracy"] >= 0.0


def test_label_statistics(make_trainer, make_model, data):
    model = make_model()
    make_trainer(model=model)
    info = model.config.task_info[2]
    labels = torch.tensor(data["train"]["closeness"]["labels"], dtype=torch.float64)
    assert info["label_mean"] == pytest.approx(labels.mean().item())
    assert info["label_std"] == pytest.approx(labels.std(correction=0).item())
    assert model.label_mean.tolist() == [0.0, 0.0, pytest.approx(info["label_mean"])]
    part = {"closeness": data["train"]["closeness"].select(range(3))}
    make_trainer(model=model, train=part)
    assert model.config.task_info[2]["label_mean"] == pytest.approx(
        labels.mean().item()
    )  # a trained head's scale stays
    raw_scale = make_model()
    make_trainer(model=raw_scale, label_scale="raw")
    assert raw_scale.config.task_info[2]["label_mean"] is None
    make_trainer(model=raw_scale)
    assert raw_scale.config.task_info[2]["label_mean"] is None


def test_workers_do_not_change_the_run(make_trainer, losses):
    runs = []
    for workers in (0, 2):
        trainer = make_trainer(dataloader_num_workers=workers, sampler="temperature")
        recorder = losses(trainer)
        trainer.train()
        runs.append(recorder.values)
    assert runs[0] == runs[1]


def test_plain_progress_lines(make_trainer, capsys):
    trainer = make_trainer(disable_tqdm=False, logging_steps=1, eval_strategy="steps", eval_steps=3)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/3  loss ")
    assert "tone " in lines[0]
    assert any("average " in line for line in lines)
    assert "trained in" in lines[-1]


def test_progress_bar_shows_task_losses(make_trainer, capsys):
    from camtl.training import TaskProgressCallback

    trainer = make_trainer(logging_steps=1, eval_strategy="steps", eval_steps=2)
    trainer.remove_callback(TaskProgressCallback)
    trainer.add_callback(TaskProgressCallback(bars=True))
    trainer.train()
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert "relation 1." in shown.err or "relation 0." in shown.err
    assert "average" in shown.out + shown.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "unceartainty"}, "uncertainty"),
        ({"sampler_options": '{"temperature": 3}'}, "temperature"),
        ({"sampler": "temperature", "sampler_options": {"heat": 3}}, "heat"),
        ({"sampler": "temperature", "sampler_options": {"temperature": "hot"}}, "temperature is 'hot'"),
        ({"candidates_per_task": 4}, "uncertainty"),
        (
            {"score": "reference", "score_dropout": True, "min_share": 0.1},
            "score, score_dropout, min_share: only for the sampler uncertainty, not for proportional",
        ),
        ({"sampler": "sqrt", "regression_places": "borrow:tone"}, "regression_places: only for"),
        ({"sampler": "loss", "score_batch_size": 4}, "score_batch_size: only for"),
        ({"sampler": "uncertainty", "regression_places": "borrow:stsb"}, "tone, relation"),
        ({"sampler": "uncertainty", "regression_places": "borrow:closeness"}, "tone, relation"),
        ({"sampler": "uncertainty", "min_share": 0.5}, "0.3333"),
        ({"sampler": "loss", "gradient_accumulation_steps": 40}, "gradient_accumulation_steps"),
    ],
)
def test_bad_arguments_are_refused_before_training(make_trainer, options, words):
    trainer = make_trainer(**options)
    with pytest.raises(UsageError, match=words):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "best"}, "paper, reference"),
        ({"label_scale": "z"}, "standard, raw"),
        ({"regression_places": "borrow:"}, "borrow:TASK"),
        ({"candidates_per_task": 0}, "at least 1"),
        ({"early_stopping_patience": 2}, "eval_strategy"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
            "load_best_model_at_end",
        ),
        ({"learning_rate": -1.0}, "negative"),
        ({"sampler_options": '{"temperature": 5'}, "sampler_options .* not JSON"),
        ({"sampler_options": "5"}, "sampler_options is 5; give a JSON object"),
        ({"seed": -1}, "seed is -1"),
        ({"data_seed": -2}, "data_seed is -2"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"num_train_epochs": -1}, "num_train_epochs is -1"),
        ({"report_to": "carrier_pigeon"}, "report_to: 'carrier_pigeon' is unknown; accepted: .*tensorboard"),
        ({"report_to": ["neptune"]}, "report_to: the package of 'neptune' is not installed"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        CaMtlTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_bad_data_is_refused(make_trainer, make_model, data, raw):
    with pytest.raises(UsageError, match=r"'cola'.*its tasks: tone, relation, closeness"):
        make_trainer(train={"cola": data["train"]["tone"]})
    with pytest.raises(UsageError, match="no rows"):
        make_trainer(train={"tone": data["train"]["tone"].select([])})
    with pytest.raises(UsageError, match="processing_class"):
        make_trainer(train=raw({"tone": 4}, 0))
    with pytest.raises(UsageError, match="no label"):
        make_trainer(train={"tone": data["train"]["tone"].remove_columns("labels")})
    with pytest.raises(UsageError, match="must map task names"):
        make_trainer(train=data["train"]["tone"])
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        make_trainer(model=model).train()
