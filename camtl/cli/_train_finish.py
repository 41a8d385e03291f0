"""The end of a training run: every file that it leaves, and what it prints last."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from camtl._version import __version__
from camtl.cli._encoder import ALIAS, ALIAS_HUB_ID, FALLBACK_LABEL
from camtl.cli._run_folder import TASKS_FILE, is_main_process, note, write_run
from camtl.cli.train import TrainRequest
from camtl.reports import (
    ModelCard,
    Results,
    predict_command,
    print_results,
    write_curves,
    write_model_card,
)

if TYPE_CHECKING:
    from camtl.tasks import Task

_HYPER_PARAMETERS = (
    "learning_rate",
    "conditional_learning_rate",
    "head_learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "optim",
    "sampler",
    "sampler_options",
    "seed",
    "bf16",
    "fp16",
)
_UNCERTAINTY = ("score", "candidates_per_task", "score_dropout", "regression_places", "min_share")


@dataclass(frozen=True)
class Outcome:
    """A finished run: what was asked for, what it used, and what came out."""

    request: TrainRequest
    trainer: Any
    data: Mapping[str, Mapping[str, Any]]
    label: str
    baselines: Mapping[tuple[str, str], Any]
    train_metrics: Mapping[str, Any]
    eval_metrics: Mapping[str, Any]
    results: Results


def finish(outcome: Outcome) -> None:
    """Write the run's folder, each file whole or not at all, and print the table and what to do next."""
    output_dir, trainer, tasks = outcome.request.output_dir, outcome.trainer, outcome.request.tasks
    trainer.save_model(str(output_dir))
    if not is_main_process():
        return
    from camtl.tasks import dump_tasks_yaml

    dump_tasks_yaml(outcome.request.model_tasks, output_dir / TASKS_FILE)
    (output_dir / "all_results.json").unlink(missing_ok=True)  # of an older run; the next two fill it anew
    trainer.save_metrics("train", _plain(outcome.train_metrics))
    trainer.save_metrics("eval", _plain(outcome.eval_metrics))
    trainer.save_state()
    write_run(output_dir, _run_record(outcome))
    problem = write_curves(
        trainer.state.log_history,
        tasks,
        output_dir / "learning_curves.png",
        baselines=outcome.baselines,
        title=f"{output_dir.name}: learning curves",
    )
    if problem:
        note(problem)
    write_model_card(model_card(outcome, has_curves=not problem), output_dir / "README.md")
    _print_end(outcome, has_curves=not problem)


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}


def _run_record(outcome: Outcome) -> dict[str, Any]:
    request = outcome.request
    data_dir = request.data.data_dir
    record = {
        "camtl": __version__,
        "command": request.command,
        "model_name_or_path": request.model.model_name_or_path,
        "data_dir": os.path.abspath(data_dir) if data_dir else None,
        "max_eval_samples": request.data.max_eval_samples,
        "evaluated_splits": {
            name: [split for split in splits if split != "train"] for name, splits in outcome.data.items()
        },
        "bf16": request.training.bf16,
        "per_device_eval_batch_size": request.training.per_device_eval_batch_size,
        "constant_answers": {name: entry["answer"] for (name, _), entry in outcome.baselines.items()},
    }
    return _with_kept(record, request) if request.kept_tasks else record


def _with_kept(record: dict[str, Any], request: TrainRequest) -> dict[str, Any]:
    """Add what is recorded of the tasks that the model had before; rows then have a source for each task."""
    kept = request.kept_record
    names = [task.name for task in request.kept_tasks]
    for key in ("evaluated_splits", "constant_answers"):
        known = kept.get(key, {})
        record[key] = {name: known[name] for name in names if name in known} | record[key]
    sources = {name: kept.get("sources", {}).get(name, kept) for name in names} if kept else {}
    sources |= {task.name: record for task in request.tasks}
    record["sources"] = {
        name: {key: source.get(key) for key in ("data_dir", "max_eval_samples")}
        for name, source in sources.items()
    }
    return record


def model_card(outcome: Outcome, has_curves: bool) -> ModelCard:
    """Collect the facts of a run for its card."""
    request, trainer, train_metrics = outcome.request, outcome.trainer, outcome.train_metrics
    args, model = request.training, trainer.model
    names = [*_HYPER_PARAMETERS, *(_UNCERTAINTY if args.sampler == "uncertainty" else ())]
    values = {name: getattr(args, name) for name in names}
    values = {
        name: getattr(value, "value", value) for name, value in values.items() if value not in (None, False)
    }
    if values.get("max_steps", -1) > 0:
        values.pop("num_train_epochs", None)
    else:
        values.pop("max_steps", None)
    measured: dict[str, Any] = {
        "optimizer steps": f"{trainer.state.global_step:,}",
        "device": _device_name(args),
    }
    if "train_runtime" in train_metrics:
        measured["training time"] = f"{train_metrics['train_runtime']:.0f} s, evaluations included"
    for name, value in train_metrics.items():
        if name.startswith("train_share_"):
            measured[f"share of training rows from {name.removeprefix('train_share_')}"] = f"{value:.1%}"
    if "train_data_share" in train_metrics:
        measured["share of the candidate rows trained on"] = f"{train_metrics['train_data_share']:.1%}"
    if "train_scoring_time_share" in train_metrics:
        measured["share of the time spent on scoring"] = f"{train_metrics['train_scoring_time_share']:.1%}"
    base = str(request.model.model_name_or_path)
    pretrained = outcome.label != FALLBACK_LABEL
    return ModelCard(
        name=request.output_dir.resolve().name,
        base_model=(ALIAS_HUB_ID if base == ALIAS else base) if pretrained else "",
        encoder=f"{base if pretrained else outcome.label} ({encoder_sizes(model.config)})",
        tasks=request.model_tasks,
        config=model.config.to_dict(),
        results=outcome.results,
        counts=model.parameter_counts(),
        hyper_parameters=values,
        train_rows={name: len(splits["train"]) for name, splits in outcome.data.items()},
        training=measured,
        command=request.command,
        folder=str(request.output_dir),
        has_curves=has_curves,
        hub_tasks=[task.name for task in request.tasks if _is_from_hub(task, request.data.data_dir)],
        row_limits={
            name: most
            for name, most in (
                ("training", request.data.max_train_samples),
                ("validation", request.data.max_eval_samples),
            )
            if most is not None
        },
    )


def _is_from_hub(task: Task, data_dir: str | None) -> bool:
    """Whether the rows were those of the task's hub data set: no files of its own, no folder given."""
    return not task.files and data_dir is None and bool(task.source and task.source.hub)


def encoder_sizes(config: Any) -> str:
    """Describe an encoder in one line; its family goes unsaid where it is BERT."""
    from camtl.models.families import FAMILIES

    family = "" if config.family == "bert" else f"{FAMILIES[config.family].label}, "
    return (
        f"{family}{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size:,}"
    )


def _device_name(args: Any) -> str:
    if args.device.type == "cuda":
        import torch

        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return str(args.device)


def _print_end(outcome: Outcome, has_curves: bool) -> None:
    output_dir = outcome.request.output_dir
    print()
    print_results(outcome.results)
    print()
    files = ["README.md (model card)", "eval_results.json"] + (["learning_curves.png"] if has_curves else [])
    print(f"everything is in {output_dir}: the model, {', '.join(files)}, ...")
    print("next:")
    print(f"  {predict_command(str(output_dir), outcome.request.tasks[0])}")
    print(f"  camtl eval {output_dir}")
