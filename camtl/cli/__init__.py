"""The ``camtl`` command: one module per sub-command, loaded when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from camtl._version import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": ("camtl.cli.train", "train one model on one or more tasks"),
    "add-task": ("camtl.cli.add_task", "teach a trained model another task"),
    "eval": ("camtl.cli.eval", "recompute the scores of a trained model"),
    "predict": ("camtl.cli.predict", "label new texts with a trained model"),
    "tasks": ("camtl.cli.tasks", "list the built-in tasks, show one, check a task's data files"),
    "convert": (
        "camtl.cli.convert",
        "small checkpoints, one task alone, checkpoints of the code released with the paper",
    ),
    "fuse-check": (
        "camtl.cli.fuse_check",
        "what camtl.fuse does in a Hugging Face model, and how fast it is",
    ),
    "tune": ("camtl.cli.tune", "search the fastest block sizes of the Triton kernels on this GPU"),
    "bench": ("camtl.cli.bench", "time the ops and the model against their rivals on this machine"),
    "info": ("camtl.cli.info", "versions, devices and which backend can run which op"),
}

_TOP = """\
usage: camtl COMMAND [options]

camtl trains one BERT-family encoder on many language tasks at once: the encoder is told which task a
text belongs to and adapts its attention, layer norms and features to it (conditionally adaptive
multi-task learning).

commands:
{commands}

options:
  -h, --help     show this help and exit
  --version      show the version and exit
  --debug        show Python tracebacks instead of one-line errors

examples:
  # train on four small built-in tasks; nothing has to be downloaded but the encoder
  camtl train --model_name_or_path minilm --tasks demo --output_dir runs/demo

  # use what was trained
  camtl predict runs/demo --task demo_sentiment --text "a dull and lifeless film"

  # what can be trained on
  camtl tasks list

`camtl COMMAND --help` explains a command. `-` and `_` are the same in flag names.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default ``sys.argv[1:]``) and return its exit code.

    0: done. 1: it failed (also Ctrl-C). 2: the command, a config or a data file cannot be used as given.
    Errors are one line on stderr, ``camtl: error: ...``; ``--debug`` adds the traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    # Behind the command it is an option of every parser, which can tell it from a value.
    command = arguments[1:] if arguments[:1] == ["--debug"] else arguments
    try:
        code = _dispatch(command)
        sys.stdout.flush()  # or a full disk would show only when the interpreter ends
        return code
    except SystemExit as stop:  # argparse's --help
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        _drop_output()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        from camtl.cli._errors import describe

        if debug:
            traceback.print_exc()
        message, code = describe(error, trains=command[:1] in (["train"], ["add-task"]))
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        print(f"camtl: error: {message}", file=sys.stderr)
        return code


def _drop_output() -> None:
    """Let what stdout cannot take vanish; otherwise the interpreter complains about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        width = max(map(len, COMMANDS))
        rows = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
        print(_TOP.format(commands=rows), end="")
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        print(f"camtl {__version__}")
        return 0
    if name not in COMMANDS:
        from camtl.cli._parser import suggestion
        from camtl.errors import UsageError

        kind = "option" if name.startswith("-") else "command"
        raise UsageError(
            f"unknown {kind} {name!r}{suggestion(name, COMMANDS)} "
            f"(commands: {', '.join(COMMANDS)}; see camtl --help)"
        )
    module = importlib.import_module(COMMANDS[name][0])
    return int(module.run(arguments[1:]))
