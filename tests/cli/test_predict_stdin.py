"""``camtl predict`` on standard input: answers as lines come, and errors that name the line."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import pytest

from camtl.cli._stdin import arriving, comes_slowly

from .conftest import TYPED_ROWS, Outcome, Run, call, write_jsonl

# An answer of the tiny model takes milliseconds, its loading about a second.
PATIENCE = 60


class Pipe:
    """Two ends of a pipe; what is written arrives at once."""

    def __init__(self) -> None:
        read, self._write = os.pipe()
        self.reading: TextIO = os.fdopen(read, encoding="utf-8")
        self.open = True

    def put(self, data: str | bytes) -> None:
        os.write(self._write, data.encode() if isinstance(data, str) else data)

    def close(self) -> None:
        if self.open:
            self.open = False
            os.close(self._write)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()
    pipe.reading.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every call of ``model.predict``."""
    from camtl import CaMtlForMultiTask

    sizes: list[int] = []
    predict = CaMtlForMultiTask.predict

    def counted(self, texts, *args, **kwargs):
        sizes.append(len(texts))
        return predict(self, texts, *args, **kwargs)

    monkeypatch.setattr(CaMtlForMultiTask, "predict", counted)
    return sizes


def flags(trained: Run, task: str, *more: object) -> tuple[object, ...]:
    return ("predict", trained.folder, "--device", "cpu", "--task", task, *more)


def test_a_line_is_answered_before_the_next_is_written(
    trained: Run, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camtl.cli import main

    answers, out = os.pipe()
    monkeypatch.setattr("sys.stdin", pipe.reading)
    monkeypatch.setattr("sys.stdout", os.fdopen(out, "w", encoding="utf-8"))  # with a buffer, as a pipe has
    found: list[str] = []
    told = threading.Semaphore(0)

    def read() -> None:
        with open(answers, encoding="utf-8") as lines:
            for line in lines:
                found.append(json.loads(line)["sentence"])
                told.release()

    with ThreadPoolExecutor(2) as pool:
        reader = pool.submit(read)
        code = pool.submit(main, [str(word) for word in flags(trained, "cola")])
        try:
            for text in ("the cat", "a dog", "red"):
                pipe.put(f"{text}\n")
                assert told.acquire(timeout=PATIENCE), f"no answer to {text!r} while the pipe is open"
                assert found[-1] == text
        finally:
            pipe.close()
            result = code.result(PATIENCE)
            sys.stdout.close()
            reader.result(PATIENCE)
    assert result == 0
    assert found == ["the cat", "a dog", "red"]


def test_a_pipe_that_is_full_is_answered_in_batches(
    trained: Run, pipe: Pipe, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"the cat {'sees ' * i}dog" for i in range(5)]
    pipe.put("\n".join(texts))  # the last line without an end
    pipe.close()
    monkeypatch.setattr("sys.stdin", pipe.reading)
    outcome = call(*flags(trained, "cola", "--batch_size", 2))
    assert outcome.code == 0, outcome.err
    assert [json.loads(line)["sentence"] for line in outcome.out.splitlines()] == texts
    assert calls == [2, 2, 1]


def test_a_file_is_answered_in_large_pieces(
    trained: Run, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("the cat\na dog\n" * 35)
    with open(path, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        redirected = call(*flags(trained, "cola", "--batch_size", 2))
    named = call(*flags(trained, "cola", "--batch_size", 2, "--input_file", path))
    assert redirected.code == named.code == 0
    assert redirected.out == named.out
    assert calls == [64, 6, 64, 6]


def test_lines_of_a_pipe(pipe: Pipe) -> None:
    lines = arriving(pipe.reading)
    assert next(lines) is None  # nothing has come
    snowman = "☃".encode()
    pipe.put(b"one\r\n\ntwo " + snowman[:1])
    assert [next(lines), next(lines), next(lines)] == ["one", "", None]
    pipe.put(snowman[1:] + b"\nlast")
    assert [next(lines), next(lines)] == ["two ☃", None]
    pipe.close()
    assert list(lines) == ["last"]


def test_what_may_have_to_be_waited_for(pipe: Pipe, tmp_path: Path) -> None:
    assert comes_slowly(pipe.reading)
    (tmp_path / "a.txt").write_text("a\n")
    with open(tmp_path / "a.txt", encoding="utf-8") as file:
        assert not comes_slowly(file)
    assert not comes_slowly(file)  # closed


# -- errors of rows --
LONG = "the cat sees the dog " * 12
WRONG = [
    ("who", {"words": []}, "task 'who': the column 'words' holds no word"),
    ("where", {"question": LONG, "context": "the cat"}, "task 'where': question 'the cat"),
    ("where", {"question": "a cat", "context": {}}, "task 'where': the text column 'context' is a dict"),
    ("pick", {"premise": "the cat", "a": None, "b": "runs"}, "task 'pick': the text column 'a' is missing"),
    (
        "sense",
        {"one": "a", "s1": -1, "e1": 1, "two": "a", "i2": 0, "w2": "a"},
        "task 'sense': the column 's1'",
    ),
    ("pick", {"premise": "the cat", "a": LONG, "b": "runs"}, "task 'pick': choice 1 "),
]


@pytest.mark.parametrize(("task", "wrong", "words"), WRONG, ids=[words for _, _, words in WRONG])
@pytest.mark.parametrize("source", ["pipe", "redirected", "input_file"])
def test_a_row_that_cannot_be_answered_is_named_by_its_line(
    typed: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pipe: Pipe,
    source: str,
    task: str,
    wrong: dict,
    words: str,
) -> None:
    path = tmp_path / "in.jsonl"
    right = {
        name: value for name, value in TYPED_ROWS[task].items() if name not in ("tags", "answers", "label")
    }
    write_jsonl(path, [right, right, right, wrong, right])
    path.write_text("\n" + path.read_text())  # a blank line counts
    command = ["predict", typed.folder, "--device", "cpu", "--task", task, "--batch_size", 2]
    if source == "input_file":
        outcome = call(*command, "--input_file", path)
    elif source == "pipe":
        pipe.put(path.read_bytes())
        pipe.close()
        monkeypatch.setattr("sys.stdin", pipe.reading)
        outcome = call(*command)
    else:
        with open(path, encoding="utf-8") as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            outcome = call(*command)
    assert outcome.code == 2
    name = path if source == "input_file" else "stdin"
    assert outcome.error_line.startswith(f"camtl: error: {name}, line 5: ")
    assert words in outcome.error_line
    # A pipe's first batch has been answered by then.
    assert len(outcome.out.splitlines()) == (2 if source == "pipe" else 0)


def test_a_text_that_is_none_is_named_by_its_line(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('the cat\n{"sentence": {}}\n'))
    outcome = call(*flags(trained, "cola"))
    assert outcome.code == 2
    assert outcome.error_line.startswith("camtl: error: stdin, line 2: {'sentence': {}} is not accepted")


@pytest.mark.parametrize(("blank", "said"), [(1, "skipped 1 blank line\n"), (2, "skipped 2 blank lines\n")])
def test_blank_lines_are_counted(
    trained: Run, monkeypatch: pytest.MonkeyPatch, blank: int, said: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n" + "\n" * blank))
    assert f"camtl: stdin: {said}" in call(*flags(trained, "cola")).err


# -- bytes --
@pytest.fixture(params=["pipe", "redirected", "input_file"])
def label_bytes(
    request: pytest.FixtureRequest,
    trained: Run,
    tmp_path: Path,
    pipe: Pipe,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[bytes], Outcome]:
    """What ``camtl predict`` says of bytes, each way they can come."""
    path = tmp_path / "in.txt"
    command = flags(trained, "cola", "--batch_size", 2)

    def label(data: bytes) -> Outcome:
        path.write_bytes(data)
        if request.param == "input_file":
            return call(*command, "--input_file", path)
        if request.param == "pipe":
            pipe.put(data)
            pipe.close()
            monkeypatch.setattr("sys.stdin", pipe.reading)
            return call(*command)
        with open(path, encoding="utf-8") as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            return call(*command)

    return label


@pytest.mark.parametrize("line", [2, 3])
def test_what_is_not_utf8_is_named_by_its_line(label_bytes: Callable[[bytes], Outcome], line: int) -> None:
    lines = [b"the cat"] * 4
    lines[line - 1] = "the caf\u00e9".encode("latin-1")
    outcome = label_bytes(b"\n".join(lines) + b"\n")
    assert outcome.code == 2
    assert re.fullmatch(
        rf"camtl: error: (stdin|.*in\.txt), line {line}: not UTF-8 text \(byte 0xe9\); convert it to UTF-8",
        outcome.error_line,
    )


def test_a_byte_order_mark_is_no_text(label_bytes: Callable[[bytes], Outcome]) -> None:
    outcome = label_bytes(b'\xef\xbb\xbf{"sentence": "the cat"}\nthe caf\xc3\xa9\n')
    assert outcome.code == 0, outcome.err
    assert [json.loads(line)["sentence"] for line in outcome.out.splitlines()] == ["the cat", "the caf\u00e9"]


def test_a_byte_order_mark_before_a_text_and_blanks_before_json(
    label_bytes: Callable[[bytes], Outcome],
) -> None:
    outcome = label_bytes(b'\xef\xbb\xbfthe cat\n \t{"sentence": "a dog"} \n\xc2\xa0{"sentence": "red"}\n')
    assert outcome.code == 0, outcome.err
    assert [json.loads(line)["sentence"] for line in outcome.out.splitlines()] == ["the cat", "a dog", "red"]


def test_a_table_of_rows_with_columns_of_their_own(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from camtl.cli import main

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr(
        "sys.stdin", io.StringIO('{"sentence": "the cat", "first": "here"}\n{"sentence": "red", "last": 7}\n')
    )
    assert main([str(word) for word in flags(trained, "cola")]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    header = next(line for line in lines if "sentence" in line)
    assert header.split() == ["sentence", "first", "label", "score", "last"]
    place = {name: header.index(name) for name in ("first", "last")}
    cat, red = (next(line for line in lines if text in line) for text in ("the cat", "red"))
    assert cat[place["first"] :].startswith("here")
    assert cat[place["last"] :].strip() == ""
    assert red[place["first"] :].startswith("    ")
    assert red[place["last"] :].strip() == "7"
