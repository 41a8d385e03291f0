"""``camtl tasks``: what can be trained on, what a task looks like, and whether its files are in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from camtl.cli._parser import CommandParser, positive, suggestion
from camtl.errors import UsageError

_DESCRIPTION = """
Tasks are data: a name, a type, the text columns, the label names, the metrics and where the rows come from.
`list` names the built-in ones, `show` prints one as YAML (a start for a task of your own), `check` reads its
data files and reports everything that training would stumble over.
"""
_ACTIONS = ("list", "show", "check")


def run(argv: Sequence[str]) -> int:
    """Run ``camtl tasks ...``."""
    argv = argv[1:] if argv[:1] == ["--debug"] else argv
    if not argv or argv[0] in {"-h", "--help"}:
        _overview().print_help()
        return 0 if argv else 2
    action, rest = argv[0], argv[1:]
    if action not in _ACTIONS:
        raise UsageError(
            f"camtl tasks: unknown action {action!r}{suggestion(action, _ACTIONS)} "
            f"(actions: {', '.join(_ACTIONS)})"
        )
    return {"list": _list, "show": _show, "check": _check}[action](rest)


def _overview() -> CommandParser:
    parser = CommandParser(
        "tasks",
        _DESCRIPTION,
        (
            ("all built-in tasks", "camtl tasks list"),
            ("one of them as YAML", "camtl tasks show stsb > my_task.yaml"),
            ("are the files in data/cola good to train on?", "camtl tasks check cola --data_dir data"),
            ("the same for a task of your own", "camtl tasks check mood --tasks_file my_tasks.yaml"),
        ),
        "list|show|check ...",
    )
    group = parser.add_argument_group("actions (each has its own --help)")
    group.add_argument("list", help="names, types, metrics and sources")
    group.add_argument("show NAME", help="one task as YAML")
    group.add_argument(
        "check NAME", help="read its files: bad rows with line numbers, label counts, overlaps"
    )
    return parser


def _add_file(parser: CommandParser) -> None:
    parser.add_argument("--tasks_file", metavar="FILE", help="YAML file with tasks of your own")


def _list(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "tasks list",
        "List the tasks that --tasks knows by name, and the groups.",
        (
            ("built-in tasks", "camtl tasks list"),
            ("with those of a file", "camtl tasks list --tasks_file my.yaml"),
        ),
        "[--tasks_file FILE]",
    )
    _add_file(parser)
    args = parser.parse(argv)
    from camtl.cli._tasks_check import source_of
    from camtl.reports.tables import metric_title, print_table
    from camtl.tasks import GROUPS, get_task, list_tasks, load_tasks_yaml

    own = {task.name: task for task in load_tasks_yaml(args.tasks_file)} if args.tasks_file else {}
    tasks = {name: get_task(name) for name in list_tasks()} | own
    rows = [
        [
            task.name,
            task.type,
            task.task_type.answers(task),
            str(len(task.text_columns)),
            ", ".join(metric_title(metric) for metric in task.metrics),
            source_of(task, args.tasks_file if name in own else None),
        ]
        for name, task in tasks.items()
    ]
    print_table(["task", "type", "answers", "texts", "metrics", "rows from"], rows)
    print()
    for name, members in GROUPS.items():
        print(f"group {name}: {','.join(members)}")
    print("camtl tasks show NAME prints one as YAML; --data_dir replaces the hub by local files.")
    return 0


def _show(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "tasks show",
        "Print a task as YAML, and what a row of it looks like. Save it, change it, and train with "
        "--tasks_file.",
        (
            ("STS-B", "camtl tasks show stsb"),
            ("with a row and the label counts of its files", "camtl tasks show rte --data_dir data"),
            ("a start for your own", "camtl tasks show rte > my_task.yaml"),
        ),
        "NAME [--data_dir DIR] [--tasks_file FILE]",
    )
    parser.add_argument("name", metavar="NAME", help="of the task, or of a group")
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds NAME/train.jsonl and so on")
    _add_file(parser)
    args = parser.parse(argv)
    import tempfile

    from camtl.cli._tasks_check import show_columns
    from camtl.tasks import dump_tasks_yaml, resolve_tasks

    tasks = resolve_tasks(args.name, args.tasks_file)
    with tempfile.TemporaryDirectory() as folder:
        path = dump_tasks_yaml(tasks, Path(folder) / "tasks.yaml")
        print(path.read_text(encoding="utf-8"), end="")
    for task in tasks:
        show_columns(task, args.data_dir)
    return 0


def _check(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "tasks check",
        "Read a task's files as training would and report: rows, label counts, the first bad rows with "
        "their line numbers, repeated rows, validation rows that are also in the training file and, of "
        "several tasks, texts that one is trained on and another is judged by. Exit code 2 when a row cannot "
        "be used.",
        (
            (
                "a folder with data/cola/train.jsonl, data/cola/validation.jsonl",
                "camtl tasks check cola --data_dir data",
            ),
            ("what three tasks share", "camtl tasks check sst2,sst5,subj --data_dir data"),
            ("a task of your own", "camtl tasks check mood --tasks_file my_tasks.yaml --data_dir data"),
        ),
        "NAME[,NAME...] [--data_dir DIR] [--tasks_file FILE]",
    )
    parser.add_argument("name", metavar="NAME", help="of the task, several with commas, or of a group")
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds NAME/train.jsonl and so on")
    _add_file(parser)
    parser.add_argument(
        "--max_errors", metavar="N", type=positive, default=5, help="bad rows to print of each file"
    )
    args = parser.parse(argv)
    from camtl.cli._tasks_check import check_tasks
    from camtl.tasks import resolve_tasks

    tasks = resolve_tasks(args.name, args.tasks_file)
    return 2 if check_tasks(tasks, args.data_dir, args.max_errors) else 0
