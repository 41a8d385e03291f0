"""The argument parser of every command: one-line errors with a suggestion, grouped help, examples."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Container, Iterable, Sequence
from typing import Any, NoReturn

from camtl.errors import UsageError

_CHOICE = re.compile(
    r"argument (?P<name>\S+): invalid choice: '(?P<given>.*?)' \(choose from (?P<choices>.*)\)$"
)
_HELP_WIDTH = 100
_MARK = "\0"  # no argument of a command line can hold it


def suggestion(given: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the closest of ``known``, or an empty string when none is close."""
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


def normalise_flags(
    argv: Sequence[str], options: Container[str], text_options: Container[str] = ()
) -> list[str]:
    """Spell the names of ``options`` with underscores (``--data-dir=x`` becomes ``--data_dir=x``).

    Nothing else is changed, but for the values of ``text_options``: one that begins with ``-`` gets a mark in
    front, which keeps argparse from taking it for an option; :func:`text` removes it.
    """
    result: list[str] = []
    values: int | None = None  # how many values the text option that we are in has had
    for position, token in enumerate(argv):
        if token == "--":
            return [*result, *argv[position:]]
        name, equals, value = token.partition("=")
        plain = "--" + name[2:].replace("-", "_") if re.match(r"--[A-Za-z]", name) else name
        if values is not None and _is_text(token, plain in options, first=values == 0):
            values += 1
            result.append(_MARK + token if token.startswith("-") else token)
        elif plain in options and token.startswith("-"):
            values = 0 if plain in text_options and not equals else None
            result.append(plain + equals + value)
        else:
            result.append(token)
    return result


def _is_text(token: str, is_option: bool, first: bool) -> bool:
    if not token.startswith("-") or any(character.isspace() for character in token):
        return True
    # `--word` behind a first text is rather a misspelt option than a second text.
    return not is_option and (first or not token.startswith("--"))


def text(value: str) -> str:
    """Read the value of a text option as it was given."""
    return value.removeprefix(_MARK)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=_HELP_WIDTH)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        # argparse would print `--bf16 []` for a switch that may be followed by true or false, and
        # `--tasks a,b,c [a,b,c ...]` for a list.
        if action.metavar == "":
            return ""
        if action.nargs == "+" and isinstance(action.metavar, str):
            return action.metavar
        return super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is None or default is argparse.SUPPRESS or default is False or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class CommandParser(argparse.ArgumentParser):
    """An :class:`argparse.ArgumentParser` whose errors are :class:`~camtl.errors.UsageError`.

    Args:
        command: what stands after ``camtl``, for example ``"tasks list"``.
        description: one paragraph.
        examples: pairs of (comment, command line), shown at the end of ``--help``.
    """

    def __init__(
        self, command: str, description: str, examples: Sequence[tuple[str, str]], usage: str
    ) -> None:
        self.command = command
        lines = ["examples:"]
        for comment, line in examples:
            lines += [f"  # {comment}", f"  {line}", ""]
        super().__init__(
            prog=f"camtl {command}",
            usage=f"camtl {command} {usage}",
            description=wrap(description),
            epilog="\n".join(lines).rstrip(),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self._positionals.title = "arguments"
        self.general = self.add_argument_group("general")
        self._action_groups.remove(self.general)
        self.general.add_argument("-h", "--help", action="help", help="show this help and exit")
        self.general.add_argument(
            "--debug", action="store_true", help="show Python tracebacks instead of one-line errors"
        )

    def format_help(self) -> str:
        """Return the help text, with the ``general`` group last."""
        self._action_groups.append(self.general)
        try:
            return super().format_help()
        finally:
            self._action_groups.remove(self.general)

    def error(self, message: str) -> NoReturn:
        """Raise the argparse message as a :class:`UsageError`, with a suggestion for a misspelt choice."""
        match = _CHOICE.match(message)
        if match:
            choices = [c.strip().strip("'") for c in match["choices"].split(",")]
            message = (
                f"{match['name']}: {match['given']!r} is not one of {', '.join(choices)}"
                f"{suggestion(match['given'], choices)}"
            )
        elif message.startswith("argument "):
            message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required", "missing")
        raise UsageError(f"{message} (see camtl {self.command} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse ``argv`` (either spelling of flag names); raise :class:`UsageError` for anything unknown."""
        options = {option: action for action in self._actions for option in action.option_strings}
        texts = {option for option, action in options.items() if action.type is text}
        namespace, extra = self.parse_known_args(normalise_flags(argv, options, texts))
        if extra:
            self.reject(extra)
        return namespace

    def reject(self, extra: Sequence[str]) -> NoReturn:
        """Raise for arguments that no option took."""
        flags = [token.partition("=")[0] for token in extra if token.startswith("-") and len(token) > 1]
        if flags:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown option {flags[0]}{suggestion(flags[0], known)}")
        self.error(f"unexpected argument {extra[0]!r}")


def wrap(text: str, width: int = _HELP_WIDTH) -> str:
    """Wrap a paragraph to the width of the help pages."""
    import textwrap

    return textwrap.fill(" ".join(text.split()), width)


def boolean(value: str) -> bool:
    """Read ``true/false``, ``yes/no``, ``on/off``, ``1/0`` (any case)."""
    lowered = value.lower()
    if lowered in {"1", "true", "yes", "on", "y", "t"}:
        return True
    if lowered in {"0", "false", "no", "off", "n", "f"}:
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")


def positive(value: str) -> int:
    """Read a whole number above zero."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return number


def add_flag(group: Any, name: str, help_text: str) -> None:
    """Add a switch that takes no value, or an explicit true/false."""
    group.add_argument(
        f"--{name}", type=boolean, nargs="?", const=True, default=False, help=help_text, metavar=""
    )
