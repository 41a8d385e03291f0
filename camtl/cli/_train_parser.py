"""The parser of ``camtl train``: dataclass fields to options, and YAML files with the same options."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from camtl.cli._parser import CommandParser, boolean, suggestion
from camtl.cli.train_arguments import COMMON_TRAINING, DataArguments, ModelArguments, SwitchArguments
from camtl.errors import UsageError

_DESCRIPTION = """
Train one model on one or more tasks. Every task gets a head; the encoder is shared, and is told with each
text which task it belongs to. The run ends with one evaluation, a table beside the majority baseline, and a
folder that `camtl predict` and `camtl eval` read. Ctrl-C keeps the last checkpoint.
"""

_EXAMPLES = (
    (
        "four small built-in tasks",
        "camtl train --model_name_or_path minilm --tasks demo --output_dir runs/demo",
    ),
    (
        "GLUE tasks from a folder, the candidates chosen by uncertainty",
        "camtl train --model_name_or_path bert-base-uncased --tasks cola,mrpc,rte,stsb --data_dir data \\\n"
        "      --sampler uncertainty --bf16 --output_dir runs/glue4",
    ),
    (
        "one task of your own, a text pair, from two CSV files",
        "camtl train --model_name_or_path minilm --train_file train.csv --validation_file dev.csv \\\n"
        "      --text_column question answer --label_column good --output_dir runs/mine",
    ),
    (
        "every flag can stand in a file; flags on the command line win",
        "camtl train --config examples/demo.yaml --learning_rate 1e-4",
    ),
)

# Where the field's own text does not fit.
_TEXTS = {
    "metric_for_best_model": "result key that decides which checkpoint is best (default: eval_average)",
    "remove_unused_columns": "without effect here: batches hold only what the model takes",
}
# Taken by camtl's own options or without meaning here.
_HIDDEN = {"debug", "do_train", "do_eval", "do_predict", "local_rank"}
# Stand in many scripts; every run trains, and ends with an evaluation.
IGNORED = ("do_train", "do_eval", "do_predict")


def build_parser(full: bool) -> CommandParser:
    """Build the parser with the common options; ``full`` adds all others (and imports transformers)."""
    parser = CommandParser(
        "train", _DESCRIPTION, _EXAMPLES, "--model_name_or_path NAME --tasks a,b,c [options]"
    )
    add_general(parser)
    for title, cls in (("model", ModelArguments), ("tasks and data", DataArguments)):
        add_dataclass(parser.add_argument_group(title), cls)
    add_training(parser, full)
    switches = parser.add_argument_group("single switches of the model (default: as in the preset)")
    add_dataclass(switches, SwitchArguments)
    return parser


def add_general(parser: CommandParser) -> None:
    """Add what every command that trains has: a file of options, all options' help, what old scripts give."""
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with any of these options"
    )
    parser._optionals.title = "configuration"
    for name in IGNORED:
        parser.add_argument(
            f"--{name}",
            type=boolean,
            nargs="?",
            const=True,
            metavar="",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    parser.general.add_argument(
        "--help_all", action="store_true", help="show every training argument of Hugging Face's Trainer too"
    )


def add_dataclass(group: Any, cls: Any, without: Collection[str] = ()) -> None:
    """Add the fields of a dataclass of :mod:`camtl.cli.train_arguments`, but for those in ``without``."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        text = field.metadata["help"]
        if field.default is not None:
            text += f" (default: {field.default})"
        add_field(
            group,
            field.name,
            hints[field.name],
            text,
            metavar=field.metadata["metavar"],
            choices=field.metadata["choices"],
        )


def add_training(parser: CommandParser, full: bool, texts: Mapping[str, str] | None = None) -> None:
    """Add the training arguments: the common ones, or all; ``texts`` replaces the help of some."""
    hints: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    if full:
        from camtl.training.arguments import CaMtlTrainingArguments

        hints = get_type_hints(CaMtlTrainingArguments)
        fields = {field.name: field for field in dataclasses.fields(CaMtlTrainingArguments) if field.init}
    common: set[str] = set()
    for title, options in COMMON_TRAINING.items():
        group = parser.add_argument_group(title)
        for name, metavar, text in options:
            common.add(name)
            add_field(
                group,
                name,
                hints.get(name, str if metavar else bool),
                (texts or {}).get(name, text),
                metavar=metavar,
            )
    if not full:
        return
    if "warmup_ratio" not in fields:
        group.add_argument(
            "--warmup_ratio",
            type=float,
            default=argparse.SUPPRESS,
            metavar="R",
            help="the same as --warmup_steps R",
        )
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    more = parser.add_argument_group("further training arguments of camtl")
    rest = parser.add_argument_group("further training arguments of Hugging Face's Trainer")
    for name, field in fields.items():
        if name in common or name in _HIDDEN:
            continue
        text = _TEXTS.get(name) or " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
        default = field.default if field.default is not dataclasses.MISSING else None
        if default not in (None, "") and "default" not in text.lower():
            text += f" (default: {getattr(default, 'value', default)})"
        add_field(rest if name in theirs else more, name, hints[name], text, metavar="VALUE")


def add_field(
    group: Any, name: str, hint: Any, text: str, *, metavar: str = "", choices: Sequence[str] = ()
) -> None:
    """Add one dataclass field as an option; without a default, so that what was given can be told apart."""
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    convert, many, accepted = _reading(hint)
    accepted = tuple(choices) or accepted
    if convert is boolean:
        group.add_argument(f"--{name}", type=boolean, nargs="?", const=True, metavar="", **options)
        group.add_argument(
            f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS, default=argparse.SUPPRESS
        )
        return
    if many:
        options["nargs"] = "+"
    if accepted:
        options["choices"] = list(accepted)
        options["metavar"] = "|".join(accepted) if sum(map(len, accepted)) < 60 else "NAME"
    else:
        options["metavar"] = metavar or None
    group.add_argument(f"--{name}", type=convert, **options)


def _reading(hint: Any) -> tuple[Callable[[str], Any], bool, tuple[str, ...]]:
    """Say how a field's text is read: (converter, several values, accepted values)."""
    if get_origin(hint) in {Union, types.UnionType}:
        members = [member for member in get_args(hint) if member is not type(None)]
        for kind in (bool, int, float):
            if kind in members and str not in members:
                return _reading(kind)
        for member in members:
            if isinstance(member, type) and issubclass(member, Enum):
                return _reading(member)
        if any(get_origin(member) is list for member in members):
            return str, True, ()
        return str, False, ()
    if get_origin(hint) is Literal:
        return str, False, tuple(map(str, get_args(hint)))
    if get_origin(hint) is list or hint is list:
        return str, True, ()
    if isinstance(hint, type) and issubclass(hint, Enum):
        return str, False, tuple(str(member.value) for member in hint)
    if hint is bool:
        return boolean, False, ()
    if hint in {int, float}:
        return _number(hint), False, ()
    return str, False, ()


def _number(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text.replace("_", ""))
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None

    return convert


def parse(parser: CommandParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return what was given, in a config file or as flags (flags win), by option name."""
    flags = {
        name: value for name, value in vars(parser.parse(argv)).items() if name not in {"help_all", "debug"}
    }
    config = flags.pop("config", None)
    return {**(read_config(parser, config) if config else {}), **flags}


def read_config(parser: CommandParser, path: str) -> dict[str, Any]:
    """Read a YAML file of options; its values pass the same checks as flags, errors name file and key.

    ``tasks`` may be a list of names, of task descriptions (mappings), or of both.
    """
    from camtl.tasks.files import load_yaml

    if Path(path).is_dir():
        raise UsageError(f"--config {path}: is a folder; give a YAML file")
    if not Path(path).exists():
        raise UsageError(f"--config {path}: no such file")
    content = load_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}; give one `option: value` on each line")
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        for option in action.option_strings:
            actions[option.lstrip("-")] = action
    fields = {action.dest for action in parser._actions}
    positions = [action.dest for action in parser._actions if not action.option_strings]
    known = set(actions) - {"h", "help", "help_all", "debug", "config"}
    values: dict[str, Any] = {}
    for raw_key, value in content.items():
        key = str(raw_key).replace("-", "_")
        if key not in known:
            raise UsageError(
                f"{path}: unknown key {raw_key!r}{suggestion(key, known)} "
                f"(keys are the flags of camtl {parser.command} --help-all)"
            )
        if key.startswith("no_") and key not in fields:
            raise UsageError(f"{path}: key {raw_key!r}: write `{key.removeprefix('no_')}: false` instead")
        if value is None:
            continue
        name = actions[key].dest
        if name == "tasks" and isinstance(value, list) and any(isinstance(item, dict) for item in value):
            values[name] = value
            continue
        try:
            tokens = ["-" for _ in positions] + _tokens(key, value, actions[key])
            values.update(vars(parser.parse_known_args(tokens)[0]))
        except UsageError as error:
            reason = (
                str(error).removesuffix(f" (see camtl {parser.command} --help)").removeprefix(f"--{key}: ")
            )
            raise UsageError(f"{path}: key {raw_key!r}: {reason}") from None
    for name in ("help_all", "debug", *positions):
        values.pop(name, None)
    return values


def _tokens(key: str, value: Any, action: argparse.Action) -> list[str]:
    if isinstance(value, list) and action.nargs == "+":
        return [f"--{key}", *map(str, value)]
    if isinstance(value, (dict, list, bool)):
        return [f"--{key}={json.dumps(value)}"]
    return [f"--{key}={value}"]
