"""The course of one training run: data, model, plan, training, evaluation."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from camtl.cli._encoder import load_model
from camtl.cli._errors import InterruptedRunError
from camtl.cli._run_folder import check_writable, is_main_process, note
from camtl.cli._train_finish import Outcome, encoder_sizes, finish
from camtl.cli.train import TrainRequest
from camtl.errors import CamtlError, UsageError
from camtl.reports import Results, baselines_for, collect_results, print_table

if TYPE_CHECKING:
    from camtl.models import CaMtlForMultiTask
    from camtl.tasks import Task
    from camtl.training.trainer import CaMtlTrainer


def start_model(request: TrainRequest, data: Mapping[str, Any]) -> tuple[CaMtlForMultiTask, str]:
    """Make the model of a new run; also returns what it starts from, for people."""
    return load_model(
        str(request.model.model_name_or_path),
        request.tasks,
        {task.name: _texts(task, data[task.name]["train"]) for task in request.tasks},
        request.output_dir,
        **request.model_options,
    )


def train(
    request: TrainRequest,
    start: Callable[[TrainRequest, Mapping[str, Any]], tuple[CaMtlForMultiTask, str]] = start_model,
    check: Callable[[CaMtlForMultiTask], None] | None = None,
) -> Results:
    """Run a checked request from beginning to end and return its final results.

    ``start`` makes the model from the request and the data; ``check`` sees it when it is trained, before
    anything but checkpoints is written.
    """
    from transformers import set_seed

    from camtl.training.resume import resolve_checkpoint

    args, output_dir = request.training, request.output_dir
    set_seed(args.seed)
    checkpoint = resolve_checkpoint(args.resume_from_checkpoint, output_dir)
    check_writable(output_dir, "--output_dir")
    data = load_data(request)
    model, label = start(request, data)
    trainer = make_trainer(request, model, data)
    baselines = baselines_for(request.tasks, data)
    plan = planned_steps(trainer)
    _announce(request, checkpoint)
    if is_main_process():
        _print_plan(request, trainer, data, label, plan)
    started = time.time()
    try:
        trained = trainer.train(resume_from_checkpoint=checkpoint)
        if check is not None:
            check(model)
        metrics = final_metrics(trainer, resumed=checkpoint is not None)
    except KeyboardInterrupt:
        raise _interrupted(trainer, started) from None
    results = collect_results(metrics, request.tasks, baselines)
    finish(Outcome(request, trainer, data, label, baselines, trained.metrics, metrics, results))
    _check_finite({**trained.metrics, **metrics}, args)
    return results


def _check_finite(metrics: Mapping[str, Any], args: Any) -> None:
    """Raise if the run has diverged: its scores are then those of a constant answer."""
    broken = [
        f"{name} {metrics[name]}"
        for name in ("train_loss", "eval_loss")
        if name in metrics and not math.isfinite(metrics[name])
    ]
    if broken:
        raise CamtlError(
            f"the losses are not finite ({', '.join(broken)}): training has diverged and the scores mean "
            f"nothing; lower --learning_rate (it was {args.learning_rate:g}) or --max_grad_norm (it was "
            f"{args.max_grad_norm:g}; 0 clips nothing)"
        )


def load_data(request: TrainRequest) -> dict[str, dict[str, Any]]:
    """Load every task's train and evaluation rows, cut to the given numbers: ``{task: {split: Dataset}}``."""
    from camtl.data import load_task, subset

    loaded: dict[str, dict[str, Any]] = {}
    for task in request.tasks:
        splits = dict(load_task(task, request.data.data_dir))
        if "train" not in splits:
            raise UsageError(
                f"task {task.name!r} has no training rows (a file called train.jsonl, .csv, .tsv or .parquet)"
            )
        if len(splits) < 2:
            raise UsageError(
                f"task {task.name!r} has no rows to evaluate (a file called {task.eval_splits[0]}.jsonl, "
                ".csv, .tsv or .parquet); every run ends with an evaluation"
            )
        for split in task.eval_splits:
            if split not in splits:
                note(f"task {task.name!r} has no {split} rows: the run is evaluated without them")
        for split, rows in splits.items():
            if split == "train":
                splits[split] = subset(rows, request.data.max_train_samples)
            else:
                groups = task.task_type.groups(task, rows)
                splits[split] = subset(rows, request.data.max_eval_samples, groups=groups)
        loaded[task.name] = splits
    return loaded


def _texts(task: Task, rows: Any) -> Any:
    cells = (cell for column in task.text_columns for cell in rows[column])
    return (cell if isinstance(cell, str) else " ".join(cell) for cell in cells)


def make_trainer(
    request: TrainRequest, model: CaMtlForMultiTask, data: Mapping[str, Mapping[str, Any]]
) -> CaMtlTrainer:
    """Make the trainer of a run."""
    from camtl.training.trainer import CaMtlTrainer

    return CaMtlTrainer(
        model=model,
        args=request.training,
        train_dataset={name: splits["train"] for name, splits in data.items()},
        eval_dataset={
            name: {split: rows for split, rows in splits.items() if split != "train"}
            for name, splits in data.items()
        },
        processing_class=model.tokenizer,
    )


def _announce(request: TrainRequest, checkpoint: str | None) -> None:
    output_dir = request.output_dir
    if checkpoint is not None:
        note(f"continuing from {checkpoint}")
        return
    if request.training.resume_from_checkpoint == "auto":
        note(f"{output_dir} holds no checkpoint to continue from; starting afresh")
    if not output_dir.is_dir():
        return
    older = sorted(
        int(path.name[11:]) for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()
    )
    if older:
        note(
            f"{output_dir} holds an older run with checkpoints ({', '.join(map(str, older))}); its results "
            "will be overwritten. Remove the old checkpoints before you resume with `auto`, or use another "
            "--output_dir"
        )
    elif (output_dir / "config.json").exists() or (output_dir / "trainer_state.json").exists():
        note(f"{output_dir} holds an older run; its files will be overwritten")


def _print_plan(
    request: TrainRequest,
    trainer: Any,
    data: Mapping[str, Mapping[str, Any]],
    label: str,
    plan: tuple[int, int],
) -> None:
    args, model = request.training, trainer.model
    config, counts = model.config, model.parameter_counts()
    steps, epoch_steps = plan
    print(f"encoder     {label}: {encoder_sizes(config)}")
    print(f"model       preset {config.preset}, up to {config.max_seq_length} tokens{_switches(request)}")
    print(
        f"parameters  {_millions(counts['total'])} in all, {_millions(counts['trainable'])} trainable, "
        f"{_millions(counts['conditional'])} conditional (not in plain BERT)"
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    passes = f" ({steps / epoch_steps:.2g} passes over the rows)" if epoch_steps else ""
    print(
        f"training    {steps:,} steps of {batch} rows{passes}, sampler {args.sampler}, "
        f"learning rate {args.learning_rate:g}"
    )
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    print(f"device      {args.device}, {precision}, seed {args.seed}; output in {request.output_dir}")
    print()
    rows = []
    for task in request.tasks:
        splits = data[task.name]
        evaluated = ", ".join(
            f"{len(part):,}" + ("" if split == "validation" else f" {split.removeprefix('validation_')}")
            for split, part in splits.items()
            if split != "train"
        )
        rows.append(
            [
                task.name,
                reads(task),
                task.task_type.answers(task),
                f"{len(splits['train']):,}",
                evaluated,
            ]
        )
    print_table(["task", "texts", "answers", "training rows", "validation rows"], rows, right={3, 4})
    print(flush=True)


def reads(task: Task) -> str:
    """How many texts a row has, as the tables say it."""
    return {1: "single", 2: "pair"}.get(len(task.text_columns), f"{len(task.text_columns)} texts")


def planned_steps(trainer: Any) -> tuple[int, int]:
    """Return (optimizer steps of the run, optimizer steps of one epoch)."""
    args = trainer.args
    trainer.make_train_sampler()  # the loader, which training makes, would be one too many
    epoch_steps = trainer.updates_per_epoch()
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch_steps)
    return steps, epoch_steps


def _switches(request: TrainRequest) -> str:
    return "".join(f", {name} {value}" for name, value in request.switches.items())


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e5 else f"{number:,}"


def _interrupted(trainer: Any, started: float) -> InterruptedRunError:
    from camtl.training.resume import find_resume_checkpoint

    found = find_resume_checkpoint(trainer.args.output_dir)
    step = trainer.state.global_step
    older = found is not None and os.path.getmtime(found) < started
    if found is None or (older and not trainer.args.resume_from_checkpoint):
        return InterruptedRunError(
            f"interrupted at step {step}; no checkpoint had been written yet "
            "(--save_steps N writes one every N steps)"
        )
    return InterruptedRunError(
        f"interrupted at step {step}; the last checkpoint is {found}; continue with the same command and "
        "--resume_from_checkpoint auto"
    )


def final_metrics(trainer: Any, resumed: bool = False) -> dict[str, float]:
    """Evaluate the final model, or take the evaluation that training made of this very model a moment ago.

    A resumed run's log may hold evaluations of an earlier process, perhaps of other rows: it evaluates anew.
    """
    state, args = trainer.state, trainer.args
    for entry in reversed(state.log_history):
        if "eval_average" in entry:
            if entry["step"] == state.global_step and not (resumed or args.load_best_model_at_end):
                return {name: value for name, value in entry.items() if name != "step"}
            break
    return dict(trainer.evaluate())
