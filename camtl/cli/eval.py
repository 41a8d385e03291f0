"""``camtl eval``: recompute a trained model's scores, on the same rows or on others."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._parser import CommandParser, add_flag, boolean, positive
from camtl.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from camtl.tasks import Task

_DESCRIPTION = """
Recompute the scores of a trained model. Without options: the run's own tasks and validation rows, from where
training took them. Prints the table beside the majority baseline and writes all numbers to a JSON file in the
run's folder.
"""
_EXAMPLES = (
    ("the run's own validation rows", "camtl eval runs/demo"),
    ("two of its tasks, on other files", "camtl eval runs/glue4 --tasks mrpc,rte --data_dir other_data"),
    ("test rows that have labels", "camtl eval runs/mine --split test --data_dir data"),
)


def run(argv: Sequence[str]) -> int:
    """Run ``camtl eval``."""
    parser = CommandParser("eval", _DESCRIPTION, _EXAMPLES, "RUN [options]")
    parser.add_argument("run", metavar="RUN", help="folder of a trained model (--output_dir of camtl train)")
    data = parser.add_argument_group("what to evaluate")
    data.add_argument("--tasks", metavar="a,b,c", nargs="+", help="some of the run's tasks (default: all)")
    data.add_argument(
        "--data_dir",
        metavar="DIR",
        help="folder with <task>/<split>.{jsonl,jsonl.gz,csv,tsv,parquet} (default: what training used)",
    )
    data.add_argument(
        "--split", metavar="NAME", help="which part (default: the validation sets that there are)"
    )
    data.add_argument(
        "--max_eval_samples", metavar="N", type=positive, help="a random N rows of each task and part"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_file", metavar="FILE", help="where the numbers go (default: RUN/eval_<split>_results.json)"
    )
    add_flag(output, "json", "print the numbers as JSON instead of the table")
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch_size", metavar="N", type=positive, help="texts at once (default: as in training)"
    )
    speed.add_argument(
        "--device",
        metavar="cpu|cuda|mps",
        choices=("cpu", "cuda", "mps"),
        help="default: a GPU if there is one",
    )
    speed.add_argument(
        "--bf16",
        metavar="",
        type=boolean,
        nargs="?",
        const=True,
        help="compute in bfloat16 (default: as in training)",
    )
    return _evaluate(parser.parse(argv))


def _evaluate(args: argparse.Namespace) -> int:
    from camtl._io import write_json
    from camtl.cli._run_folder import choose_tasks, note, open_run, prepare_libraries, read_run, run_tasks

    folder = open_run(args.run)
    tasks = choose_tasks(run_tasks(folder), args.tasks, folder)
    record = read_run(folder)
    prepare_libraries()
    data = _load(tasks, args, record)

    from camtl.reports import baselines_for, collect_results, print_results

    metrics = _metrics(folder, data, args, record)
    results = collect_results(metrics, tasks, baselines_for(tasks, data, record.get("constant_answers")))
    if args.json:
        print(json.dumps(metrics, indent=2))
    else:
        print_results(results)
    target = Path(args.output_file or folder / f"eval_{args.split or 'validation'}_results.json")
    try:
        write_json(target, metrics)
    except OSError as error:
        if args.output_file:
            raise UsageError(f"--output_file {target}: {error.strerror or error}") from None
        note(f"the numbers were not saved as {target} ({error.strerror or error}); use --output_file")
    else:
        if not args.json:
            print(f"\nall numbers are in {target}")
    return 0


def _splits(task: Task, data_dir: str | None, args: argparse.Namespace, record: Mapping[str, Any]) -> Any:
    """Return the splits to evaluate: the one asked for, those that training evaluated, or those there are."""
    if args.split:
        return (args.split,)
    recorded = record.get("evaluated_splits", {}).get(task.name)
    if recorded and args.data_dir is None:
        return recorded
    there: Iterable[str] = task.eval_splits
    if data_dir is not None and (Path(data_dir) / task.name).is_dir():
        from camtl.data.loading import folder_files

        there = folder_files(data_dir, task, task.eval_splits)
    elif task.files and args.data_dir is None:
        there = task.files
    # Without any, loading says what it looked for.
    return [split for split in task.eval_splits if split in there] or task.eval_splits


def _load(
    tasks: Sequence[Task], args: argparse.Namespace, record: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    from camtl.data import load_task, subset

    own_data = args.data_dir is None
    data: dict[str, dict[str, Any]] = {}
    for task in tasks:
        # Tasks that were added later may come from elsewhere.
        recorded = record.get("sources", {}).get(task.name, record)
        data_dir = recorded.get("data_dir") if own_data else args.data_dir
        most = args.max_eval_samples or (
            recorded.get("max_eval_samples") if own_data and args.split is None else None
        )
        # A task of one-off files carries their names; a folder given here goes before them.
        source = task if own_data else task.model_copy(update={"files": None})
        try:
            rows = load_task(source, data_dir, splits=_splits(task, data_dir, args, record))
        except UsageError as error:
            if own_data and data_dir and not Path(data_dir).is_dir():
                raise UsageError(
                    f"the run's rows came from {data_dir}, which is not there any more; "
                    "say where they are: --data_dir DIR"
                ) from None
            raise error
        for split, part in rows.items():
            _check_labels(task, split, part)
        data[task.name] = {
            split: subset(part, most, groups=task.task_type.groups(task, part))
            for split, part in rows.items()
        }
    return data


def _check_labels(task: Task, split: str, rows: Any) -> None:
    labels = rows[task.label_column][:] if task.label_column in rows.column_names else [None] * len(rows)
    is_class = task.task_type.features(task)[task.label_column] == "label"
    missing = sum(label is None or (is_class and label == -1) for label in labels)
    if missing:
        raise UsageError(
            f"task {task.name!r}: {missing:,} of {len(labels):,} {split} rows have no label, so they cannot "
            "be scored; label them with camtl predict --input_file"
        )


def _metrics(
    folder: Path, data: dict[str, Any], args: argparse.Namespace, record: dict[str, Any]
) -> dict[str, Any]:
    import torch

    from camtl.cli._run_folder import load_trained
    from camtl.cli.predict import pick_device
    from camtl.training.arguments import CaMtlTrainingArguments
    from camtl.training.callbacks import TaskProgressCallback
    from camtl.training.trainer import CaMtlTrainer

    device = pick_device(args.device, torch)
    model = load_trained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CaMtlTrainer(
            model=model,
            args=CaMtlTrainingArguments(
                output_dir=scratch,
                per_device_eval_batch_size=args.batch_size or record.get("per_device_eval_batch_size", 64),
                report_to="none",
                use_cpu=device.type == "cpu",
                bf16=bool(record.get("bf16", False)) if args.bf16 is None else args.bf16,
            ),
            eval_dataset=data,
            processing_class=model.tokenizer,
        )
        trainer.remove_callback(TaskProgressCallback)  # it would print the scores, which the table does
        metrics = trainer.evaluate()
    return {
        name: value.item() if hasattr(value, "item") else value
        for name, value in metrics.items()
        if name != "epoch"
    }
