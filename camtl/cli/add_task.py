"""``camtl add-task``: teach a trained model another task, and leave a complete folder behind."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._parser import CommandParser, suggestion
from camtl.cli._train_parser import add_dataclass, add_general, add_training, parse
from camtl.cli.train import HELP, HELP_ALL, TrainRequest, read_request
from camtl.cli.train_arguments import DataArguments, ModelArguments
from camtl.errors import CamtlError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from camtl.models import CaMtlForMultiTask

_DESCRIPTION = """
Teach a trained model one or more new tasks. The encoder and the tasks it has are those of RUN; each new task
gets a row of the task embedding and a head. By default only these are trained: no parameter of the other
tasks changes. Ends with an evaluation of the new tasks, and a folder with all tasks that `camtl predict` and
`camtl eval` read. RUN itself is not changed.
"""
_EXAMPLES = (
    (
        "a GLUE task from a folder; no parameter of the other tasks changes",
        "camtl add-task runs/glue4 --task qnli --data_dir data --output_dir runs/glue5",
    ),
    (
        "a task with few rows starts from the one that it resembles",
        "camtl add-task runs/glue4 --task wnli --init_from rte --data_dir data --output_dir runs/glue5",
    ),
    (
        "one of your own, with the encoder trained too (the other tasks' answers change)",
        "camtl add-task runs/glue4 --train_file train.csv --validation_file dev.csv --freeze none \\\n"
        "      --output_dir runs/mine",
    ),
)
# What RUN has decided already.
_OF_RUN = ("model_name_or_path", "preset", "max_seq_length", "freeze")
_TEXTS = {"output_dir": "where everything goes; needed, and another folder than RUN"}
_FREEZE = ("shared", "none")


def build_parser(full: bool) -> CommandParser:
    """Build the parser with the common options; ``full`` adds all others (and imports transformers)."""
    parser = CommandParser(
        "add-task", _DESCRIPTION, _EXAMPLES, "RUN --task NAME[,NAME] --output_dir DIR [options]"
    )
    parser.add_argument("run", metavar="RUN", help="folder of a trained model (--output_dir of camtl train)")
    add_general(parser)
    group = parser.add_argument_group("what to add")
    group.add_argument(
        "--task",
        "--tasks",
        dest="tasks",
        nargs="+",
        metavar="NAME[,NAME]",
        default=argparse.SUPPRESS,
        help="built-in tasks, or tasks of the --tasks_file (default: all of that file)",
    )
    group.add_argument(
        "--freeze",
        choices=_FREEZE,
        metavar="|".join(_FREEZE),
        default=argparse.SUPPRESS,
        help="shared: train only what is the new tasks' own, no parameter of the others changes; none: train "
        "everything (default: shared)",
    )
    group.add_argument(
        "--init_from",
        metavar="TASK",
        default=argparse.SUPPRESS,
        help="a task of RUN whose embedding (and head, if it fits) the new ones start with",
    )
    add_dataclass(parser.add_argument_group("data"), DataArguments, without=("tasks",))
    add_dataclass(parser.add_argument_group("model"), ModelArguments, without=_OF_RUN)
    add_training(parser, full, _TEXTS)
    return parser


def run(argv: Sequence[str]) -> int:
    """Run ``camtl add-task``."""
    if HELP_ALL & set(argv):
        build_parser(full=True).print_help()
        return 0
    if HELP & set(argv) or not argv:
        build_parser(full=False).print_help()
        return 0 if argv else 2
    from camtl.cli._run_folder import is_main_process, note, prepare_libraries

    given = parse(build_parser(full=True), argv)
    prepare_libraries(given.get("log_level"))
    addition = read_addition(given, shlex.join(["camtl", "add-task", *argv]))
    from camtl.cli._train_run import train

    train(addition.request, addition.start, addition.check)
    names = ", ".join(task.name for task in addition.request.kept_tasks)
    if addition.freeze == "none":
        note(f"everything was trained: the answers to the tasks of {addition.run} ({names}) may have changed")
    elif is_main_process():
        print(f"checked: all parameters of the tasks of {addition.run} ({names}) are bitwise as before")
    return 0


@dataclasses.dataclass
class Addition:
    """One checked ``camtl add-task`` command; its request is for the new tasks alone."""

    run: Path
    request: TrainRequest
    freeze: str
    init_from: str | None
    _before: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def start(self, request: TrainRequest, data: Mapping[str, Any]) -> tuple[CaMtlForMultiTask, str]:
        """Load the model of the run and give it the new tasks."""
        from camtl.cli._run_folder import load_trained

        model = load_trained(self.run, **request.model_options)
        if self.freeze == "shared":
            self._before = {
                name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()
            }
        for task in request.tasks:
            model.add_task(task, init_from=self.init_from)
        if self.freeze == "shared":
            model.freeze_shared()
        return model, str(self.run)

    def check(self, model: CaMtlForMultiTask) -> None:
        """Raise :class:`CamtlError` if a parameter of the run's tasks is not what it was, to the bit.

        What they share must be the same as a whole; where every task has rows, the new ones' are at the end.
        """
        import torch

        after = model.state_dict()
        changed = [
            name
            for name, before in self._before.items()
            if not torch.equal(
                after[name][: len(before)].cpu() if before.dim() else after[name].cpu(), before
            )
        ]
        if changed:
            raise CamtlError(
                f"the tasks of {self.run} would not answer as before: training has changed "
                f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}; use another --optim, or "
                "--freeze none"
            )


def read_addition(given: dict[str, Any], command: str = "") -> Addition:
    """Turn parsed options into a checked command.

    Raises:
        UsageError: no trained model, an output folder that would change it, a task that it has already, an
            ``--init_from`` that it does not have, and whatever ``camtl train`` refuses.
    """
    from camtl.cli._run_folder import open_run, read_run, run_tasks
    from camtl.tasks import resolve_tasks

    given = dict(given)
    folder = open_run(given.pop("run"))
    freeze, init_from = given.pop("freeze", "shared"), given.pop("init_from", None)
    _check_output(folder, given.get("output_dir"))
    kept = run_tasks(folder)
    names = [task.name for task in kept]
    if init_from is not None and init_from not in names:
        raise UsageError(
            f"--init_from {init_from}: {folder} has no such task{suggestion(init_from, names)} "
            f"(its tasks: {', '.join(names)})"
        )
    if not given.get("tasks") and not any(given.get(name) for name in ("tasks_file", "train_file")):
        raise UsageError(
            "say what to add: --task qnli (see camtl tasks list), --tasks_file FILE, or --train_file FILE"
        )
    request = read_request({**given, "model_name_or_path": str(folder)}, command)
    if taken := [task.name for task in request.tasks if task.name in names]:
        raise UsageError(
            f"{folder} has the task {taken[0]!r} already; add others, or describe it under another name in a "
            "--tasks_file"
        )
    resolve_tasks([*kept, *request.tasks])  # their results must have different names too
    request.kept_tasks, request.kept_record = kept, read_run(folder)
    return Addition(folder, request, freeze, init_from)


def _check_output(folder: Path, output_dir: str | None) -> None:
    """Refuse an output folder that is the run's, or one around or within it."""
    if output_dir is None:
        raise UsageError(f"--output_dir is needed: a new folder, as {folder} itself is not changed")
    run, target = folder.resolve(), Path(output_dir).resolve()
    if run == target:
        raise UsageError(f"--output_dir {output_dir}: is RUN itself, which is not changed; give a new folder")
    if run in target.parents or target in run.parents:
        where = "lies in RUN" if run in target.parents else "holds RUN"
        raise UsageError(f"--output_dir {output_dir}: {where}, which is not changed; give a folder elsewhere")
