"""The command itself: help, version, exit codes, one-line errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

import camtl
from camtl.cli import COMMANDS
from camtl.cli._errors import InterruptedRunError, describe
from camtl.cli._parser import CommandParser, boolean, normalise_flags, positive, suggestion, text
from camtl.errors import CamtlError, UsageError


def shell(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "camtl", *argv],
        check=False, capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip


def processor_time() -> float:
    used = os.times()
    return used.children_user + used.children_system


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_answer_at_once(flag: str) -> None:
    before = processor_time()
    result = shell(flag)
    assert result.returncode == 0
    assert processor_time() - before < 1.0  # an import of torch alone takes longer
    assert camtl.__version__ in result.stdout or "commands:" in result.stdout
    assert result.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from camtl.cli import main;"
        "main(['--help']); main(['train', '--help']); main(['tasks', '--help']);"
        "print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'rich', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: camtl {command}")
    assert "examples:" in outcome.out
    assert outcome.out.count(f"\n  camtl {command}") >= 2
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_top_help_names_every_command(run) -> None:
    outcome = run("--help")
    assert all(f"\n  {name} " in outcome.out for name in COMMANDS)


def test_nothing_given_shows_the_help_and_is_a_usage_error(run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "commands:" in outcome.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean train?"]),
        (["--vresion"], ["unknown option"]),
        (["predict", "x", "--tsak", "cola"], ["unknown option --tsak", "did you mean --task?"]),
        (["tasks", "shwo"], ["unknown action 'shwo'", "did you mean show?"]),
        (["eval"], ["missing: RUN"]),
        (["eval", "x", "--batch_size", "0"], ["--batch_size", "above 0"]),
        (["train", "--preset", "ca-mlt"], ["--preset", "did you mean ca-mtl?"]),
        (["train", "--max_steps", "many"], ["--max_steps", "'many' is not a whole number"]),
        (["train", "cola"], ["unexpected argument 'cola'"]),
        (["convert", "--variant", "base"], ["--from_reference", "--to_reference"]),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(run, argv: list[str], words: list[str]) -> None:
    outcome = run(*argv)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert outcome.err.startswith("camtl: error: ")
    for word in words:
        assert word in outcome.err


def test_debug_shows_the_traceback(run) -> None:
    outcome = run("--debug", "eval", "/nowhere/at/all")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.strip().splitlines()[-1].startswith("camtl: error: /nowhere/at/all")


def test_debug_stands_anywhere_but_in_a_value(run) -> None:
    for argv in (
        ["eval", "--debug", "/nowhere"],
        ["tasks", "--debug", "show", "x"],
        ["eval", "/no", "--debug"],
    ):
        assert "Traceback" in run(*argv).err
    outcome = run("predict", "/nowhere", "--text=--debug")
    assert "/nowhere: no such folder" in outcome.err
    outcome = run("predict", "/nowhere", "--output_file", "--debug")
    assert "expected one argument" in outcome.err


def test_exit_codes_reach_the_shell() -> None:
    result = shell("trian")
    assert result.returncode == 2
    assert result.stdout == ""


def test_tables_are_plain_and_uncut_in_a_pipe() -> None:
    result = shell("tasks", "list", COLUMNS="80")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["task", "type", "answers", "texts", "metrics", "rows", "from"]
    assert any(len(line) > 80 for line in lines)
    assert all("…" not in line and "\x1b" not in line for line in lines)


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from camtl.cli import main; [main(['--help']) for _ in range(2000)]"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("a\n  b"), 2, "a b"),
        (CamtlError("no"), 1, "no"),
        (InterruptedRunError("interrupted at step 3"), 1, "step 3"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (ValueError("bad"), 1, "bad"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.json"), 1, "x.json: no such file"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "out: Permission denied"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/m"),
            1,
            "the disk is full while writing runs/m",
        ),
        (OSError(errno.EIO, "could not be written (No space left on device)", "c"), 1, "the disk is full"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
            1,
            "the disk is full",
        ),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError"),
    ],
)
def test_every_error_becomes_one_line(error: BaseException, code: int, words: str) -> None:
    message, found = describe(error)
    assert found == code
    assert words in message
    assert "\n" not in message


def test_checkpoints_are_spoken_of_where_there_are_some() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "checkpoint" in describe(full, trains=True)[0]
    assert "checkpoint" not in describe(full)[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "camtl", "tasks", "list"],
            check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("camtl: error: the disk is full")
    assert len(result.stderr.splitlines()) == 1
    assert "checkpoint" not in result.stderr


def test_out_of_gpu_memory_says_what_to_lower() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    message, code = describe(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert code == 1
    assert "--per_device_train_batch_size" in message


def test_flags_are_the_same_in_both_spellings() -> None:
    given = ["--data-dir", "my-dir", "--a-b=c-d", "--no-such", "-x", "--", "--a-b"]
    wanted = ["--data_dir", "my-dir", "--a_b=c-d", "--no-such", "-x", "--", "--a-b"]
    assert normalise_flags(given, {"--data_dir", "--a_b"}) == wanted


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (["--text", "--well-done it was"], [["--well-done it was"]]),
        (["--text", "-good", "-bad"], [["-good", "-bad"]]),
        (["--text", "--great-film", "--text", "-"], [["--great-film"], ["-"]]),
        (["--text", "a", "--in-file is fine", "--in-file", "x"], [["a", "--in-file is fine"]]),
        (["--text=--help-me"], [["--help-me"]]),
        (["--text", "--in-file=b is code"], [["--in-file=b is code"]]),
    ],
)
def test_texts_may_look_like_flags(argv: list[str], texts: list[list[str]]) -> None:
    parser = CommandParser("x", "about", (), "")
    parser.add_argument("--text", nargs="+", action="append", type=text)
    parser.add_argument("--in_file")
    assert parser.parse(argv).text == texts


def test_a_misspelt_flag_behind_a_text_is_told() -> None:
    parser = CommandParser("x", "about", (), "")
    parser.add_argument("--text", nargs="+", action="append", type=text)
    parser.add_argument("--task")
    with pytest.raises(UsageError, match="unknown option --tsak; did you mean --task"):
        parser.parse(["--text", "a", "--tsak", "cola"])


def test_suggestions_are_close_or_absent() -> None:
    assert suggestion("samplr", ["sampler", "score"]) == "; did you mean sampler?"
    assert suggestion("zzz", ["sampler"]) == ""


def test_small_readers() -> None:
    assert [boolean(text) for text in ("yes", "OFF", "1")] == [True, False, True]
    assert positive("3") == 3
    parser = CommandParser("x", "text", (), "")
    parser.add_argument("--n", type=positive)
    with pytest.raises(UsageError, match="above 0"):
        parser.parse(["--n", "-1"])
