"""``camtl train``: read what was asked for, run it, and leave a complete folder behind."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._run_folder import note, note_backend
from camtl.cli._train_parser import IGNORED, build_parser, parse
from camtl.cli.train_arguments import DataArguments, ModelArguments, SwitchArguments, training_defaults
from camtl.errors import UsageError

if TYPE_CHECKING:
    from camtl.tasks import Task
    from camtl.training.arguments import CaMtlTrainingArguments

HELP = {"-h", "--help"}
HELP_ALL = {"--help-all", "--help_all"}


@dataclasses.dataclass
class TrainRequest:
    """One checked ``camtl train`` command, or one that adds tasks to a trained model.

    ``kept_tasks`` and ``kept_record`` are the tasks that the model has already, and the record of their run.
    """

    model: ModelArguments
    data: DataArguments
    training: CaMtlTrainingArguments
    tasks: list[Task]
    switches: dict[str, Any]
    command: str
    kept_tasks: list[Task] = dataclasses.field(default_factory=list)
    kept_record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def model_tasks(self) -> list[Task]:
        """All tasks of the model, in the order of their ids."""
        return [*self.kept_tasks, *self.tasks]

    @property
    def model_options(self) -> dict[str, Any]:
        """What ``from_pretrained`` gets: only what was given, so that a trained folder keeps its own."""
        given: dict[str, Any] = {"preset": self.model.preset, "max_seq_length": self.model.max_seq_length}
        if self.model.packed is not None:
            given["packed"] = {"true": True, "false": False}.get(self.model.packed, self.model.packed)
        return {name: value for name, value in given.items() if value is not None} | self.switches

    @property
    def output_dir(self) -> Path:
        """Where the run goes."""
        return Path(str(self.training.output_dir))


def run(argv: Sequence[str]) -> int:
    """Run ``camtl train``."""
    if HELP_ALL & set(argv):
        build_parser(full=True).print_help()
        return 0
    if HELP & set(argv) or not argv:
        build_parser(full=False).print_help()
        return 0 if argv else 2
    from camtl.cli._run_folder import prepare_libraries

    given = parse(build_parser(full=True), argv)
    prepare_libraries(given.get("log_level"))
    request = read_request(given, shlex.join(["camtl", "train", *argv]))
    from camtl.cli._train_run import train

    train(request)
    return 0


def read_request(given: dict[str, Any], command: str = "") -> TrainRequest:
    """Turn parsed options into a checked request.

    Raises:
        UsageError: no encoder, no tasks, options that contradict each other, values nothing accepts.
    """
    given = dict(given)
    if ignored := [f"--{name}" for name in IGNORED if given.pop(name, None) is not None]:
        note(f"{' '.join(ignored)}: not needed; every run trains, and ends with one evaluation")
    model = ModelArguments(**_take(given, ModelArguments))
    switches = _take(given, SwitchArguments)
    data = DataArguments(**_take(given, DataArguments))
    if model.freeze is not None and model.freeze.lower() == "none":
        model.freeze = None
        switches["freeze"] = None
    elif model.freeze is not None:
        switches["freeze"] = model.freeze
    _check(model, data)
    tasks = _tasks(data)
    if "warmup_ratio" in given:
        given.setdefault("warmup_steps", given.pop("warmup_ratio"))
    if model.backend is not None:
        _set_backend(model.backend)
    given.setdefault("output_dir", str(Path("runs") / "-".join(task.name for task in tasks)[:60]))
    if Path(given["output_dir"]).is_file():
        raise UsageError(f"--output_dir {given['output_dir']}: is a file; give a folder")
    from camtl.training.arguments import CaMtlTrainingArguments

    training = CaMtlTrainingArguments(**training_defaults(given))
    return TrainRequest(model, data, training, tasks, switches, command)


def _take(given: dict[str, Any], cls: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: given.pop(name) for name in names if name in given}


def _check(model: ModelArguments, data: DataArguments) -> None:
    if model.model_name_or_path is None:
        raise UsageError(
            "say which encoder to start from: --model_name_or_path minilm (small, packaged), "
            "bert-base-uncased (or another BERT, RoBERTa, XLM-RoBERTa, ELECTRA or DistilBERT of the Hugging "
            "Face hub), or a folder"
        )
    if data.train_file is None:
        for name in ("validation_file", "text_column", "label_column", "task_name", "task_type"):
            if getattr(data, name) is not None:
                raise UsageError(f"--{name} belongs to a task of your own: give its --train_file too")
        if data.tasks is not None and not any(_names(item) for item in data.tasks):
            data.tasks = None
        if not data.tasks and data.tasks_file is None:
            raise UsageError(
                "say what to train on: --tasks cola,mrpc (see camtl tasks list), --tasks_file FILE, "
                "or --train_file FILE"
            )
    elif data.tasks:
        raise UsageError(
            "--train_file trains one task of its own, so it cannot be combined with --tasks; "
            "describe the file in a --tasks_file to train it together with others"
        )
    elif data.data_dir is not None:
        raise UsageError("--train_file and --data_dir both say where the rows are; give one of them")
    elif data.validation_file is None:
        raise UsageError("--train_file needs a --validation_file: every run ends with an evaluation")
    if data.text_column is not None and len(data.text_column) > 2:
        raise UsageError(
            f"--text_column takes one or two names, given {len(data.text_column)}: "
            f"{' '.join(data.text_column)}"
        )
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if model.max_seq_length is not None and model.max_seq_length < 4:
        raise UsageError(f"--max_seq_length {model.max_seq_length}: must be at least 4")


def _names(item: Any) -> Any:
    """Return the names in one value of --tasks (or the description that a config file has in its place)."""
    return [name for name in item.split(",") if name.strip()] if isinstance(item, str) else item


def _tasks(data: DataArguments) -> list[Task]:
    from camtl.tasks import Task, resolve_tasks

    if data.train_file is not None:
        from camtl.data.infer import infer_task

        return [
            infer_task(
                data.train_file,
                data.validation_file,
                text_columns=data.text_column,
                label_column=data.label_column,
                name=data.task_name,
                type=data.task_type,
            )
        ]
    wanted: list[Any] = [Task(**item) if isinstance(item, dict) else item for item in data.tasks or []]
    return resolve_tasks(wanted or None, data.tasks_file)


def _set_backend(name: str) -> None:
    from camtl.ops import set_backend

    try:
        set_backend(name)
    except ValueError as error:
        raise UsageError(f"--backend {name}: {error}") from None
    note_backend(name)
