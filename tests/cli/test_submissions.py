"""``camtl predict --glue_zip`` and ``--superglue_zip``, on rows shaped as the benchmarks' test rows are."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from camtl.tasks import GROUPS, dump_tasks_yaml, resolve_tasks

from .conftest import call, write_jsonl

TEXTS = ("the cat sleeps", "a small bird sings", "the old dog runs", "a red river")
PAIRS = {
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "boolq": ("question", "passage"),
    "cb": ("premise", "hypothesis"),
}
GLUE_LABELS: dict[str, set[str]] = {
    **{key: {"0", "1"} for key in ("CoLA", "SST-2", "MRPC", "QQP", "WNLI")},
    **{key: {"entailment", "neutral", "contradiction"} for key in ("MNLI-m", "MNLI-mm", "AX")},
    **{key: {"entailment", "not_entailment"} for key in ("QNLI", "RTE")},
}


def rows_of(task: str, count: int = 4) -> list[dict[str, Any]]:
    """Unlabelled rows, the last first: what counts is ``idx``, not the order."""
    if task in PAIRS:
        one, two = PAIRS[task]
        rows = [{one: TEXTS[i], two: TEXTS[-i]} for i in range(count)]
    elif task in ("cola", "sst2"):
        rows = [{"sentence": TEXTS[i]} for i in range(count)]
    elif task == "copa":
        rows = [
            {"premise": TEXTS[i], "choice1": TEXTS[-i], "choice2": "the cat", "question": "cause"}
            for i in range(count)
        ]
    elif task == "wic":
        rows = [
            {"word": "cat", "sentence1": "the cat sees", "sentence2": "a cat runs", "start1": 4, "end1": 7}
            | {"start2": 2, "end2": 5}
            for _ in range(count)
        ]
    elif task == "wsc":
        spans = {"span1_index": 0, "span1_text": "the cat", "span2_index": 3, "span2_text": "dog"}
        rows = [{"text": "the cat sees dog", **spans} for _ in range(count)]
    elif task == "multirc":
        return [
            {"paragraph": TEXTS[p], "question": TEXTS[q], "answer": TEXTS[a]}
            | {"idx": {"paragraph": p, "question": 2 * p + q, "answer": 4 * p + 2 * q + a}}
            for p in (1, 0)
            for q in (0, 1)
            for a in (1, 0)
        ]
    else:
        assert task == "record"
        return [
            {"passage": "the cat sees a dog", "query": "@placeholder runs", "entities": ["cat", "dog"]}
            | {"idx": {"passage": 7, "query": query}}
            for query in (1, 0)
        ]
    return [{**row, "label": -1, "idx": i} for i, row in reversed(list(enumerate(rows)))]


@pytest.fixture(scope="module")
def model(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of all tasks of both benchmarks."""
    import torch

    from camtl.models import CaMtlForMultiTask

    folder = tmp_path_factory.mktemp("models") / "all"
    tasks = resolve_tasks(["glue", "wnli", *(set(GROUPS["superglue"]) - {"rte"})])
    torch.manual_seed(0)
    made = CaMtlForMultiTask.from_pretrained(str(encoder), tasks=tasks, max_seq_length=48)
    with torch.no_grad():  # answers that differ from row to row
        for heads in (made.heads, made.token_heads):
            heads.weight.normal_(0.0, 2.0)
    made.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    dump_tasks_yaml(tasks, folder / "tasks.yaml")
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    for task in {*PAIRS, *GROUPS["superglue"], "cola", "sst2"}:
        write_jsonl(folder / task / "test.jsonl", rows_of(task))
    write_jsonl(folder / "mnli" / "test_mismatched.jsonl", rows_of("mnli", 3))
    # the diagnostic sets: those of GLUE's MNLI and of SuperGLUE's RTE, one of which has other columns
    write_jsonl(folder / "ax" / "test.jsonl", rows_of("mnli"))
    write_jsonl(folder / "axb" / "test.jsonl", rows_of("rte", 3))
    write_jsonl(folder / "axg" / "test.jsonl", rows_of("mnli", 2))
    return folder


def read(path: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            assert stat.filemode(entry.external_attr >> 16)[1:] == "rw-r--r--"
        return {name: archive.read(name).decode().splitlines() for name in archive.namelist()}


def submit(model: Path, rows: Path, *more: object):
    return call("predict", model, "--data_dir", rows, "--device", "cpu", *more)


def answers_to(model: Path, rows: Path, task: str) -> dict[int, dict[str, Any]]:
    """What ``camtl predict`` says to each of the rows, by their number."""
    file = rows / task / "test.jsonl"
    outcome = call("predict", model, "--task", task, "--input_file", file, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    found = {}
    for line in outcome.out.splitlines():
        answer = json.loads(line)
        index = answer["idx"]
        found[index["query"] if isinstance(index, dict) else index] = answer
    return found


def test_glue(model: Path, rows: Path, tmp_path: Path) -> None:
    target = tmp_path / "glue.zip"
    outcome = submit(model, rows, "--glue_zip", target, "--split", "test")
    assert outcome.code == 0, outcome.err
    files = read(target)
    assert set(files) == {f"{name}.tsv" for name in (*GLUE_LABELS, "STS-B")}
    assert outcome.out == f"wrote {target}: {', '.join(files)}\n"
    for name, lines in files.items():
        assert lines[0] == "index\tprediction"
        cells = [line.split("\t") for line in lines[1:]]
        assert [index for index, _ in cells] == ["0", "1", "2", "3"][: 3 if name == "MNLI-mm.tsv" else 4]
        if name == "STS-B.tsv":
            assert all(0 <= float(value) <= 5 and len(value) == 5 for _, value in cells)
        else:
            assert {value for _, value in cells} <= GLUE_LABELS[name.removesuffix(".tsv")]
    said = answers_to(model, rows, "cola")
    numbers = {"unacceptable": "0", "acceptable": "1"}
    assert [line.split("\t")[1] for line in files["CoLA.tsv"][1:]] == [
        numbers[said[i]["label"]] for i in range(4)
    ]
    said = answers_to(model, rows, "mnli")
    assert [line.split("\t")[1] for line in files["MNLI-m.tsv"][1:]] == [said[i]["label"] for i in range(4)]
    assert files["AX.tsv"] == files["MNLI-m.tsv"]  # the same rows
    said = answers_to(model, rows, "stsb")
    for i, line in enumerate(files["STS-B.tsv"][1:]):
        assert float(line.split("\t")[1]) == pytest.approx(min(max(said[i]["score"], 0), 5), abs=1e-3)

    first = target.read_bytes()
    assert submit(model, rows, "--glue_zip", target).code == 0
    assert target.read_bytes() == first


def test_superglue(model: Path, rows: Path, tmp_path: Path) -> None:
    target = tmp_path / "superglue.zip"
    outcome = submit(model, rows, "--superglue_zip", target)
    assert outcome.code == 0, outcome.err
    files = {name: [json.loads(line) for line in lines] for name, lines in read(target).items()}
    expected: dict[str, tuple[str, Any]] = {
        "BoolQ.jsonl": ("boolq", {"no": "false", "yes": "true"}),
        "CB.jsonl": ("cb", {name: name for name in ("entailment", "contradiction", "neutral")}),
        "COPA.jsonl": ("copa", None),
        "ReCoRD.jsonl": ("record", None),
        "RTE.jsonl": ("rte", {name: name for name in ("entailment", "not_entailment")}),
        "WiC.jsonl": ("wic", {"different": "false", "same": "true"}),
        "WSC.jsonl": ("wsc", {"different": "False", "same": "True"}),
    }
    assert set(files) == {*expected, "MultiRC.jsonl", "AX-b.jsonl", "AX-g.jsonl"}
    assert files["AX-b.jsonl"] == files["RTE.jsonl"][:3]
    assert files["AX-g.jsonl"] == files["RTE.jsonl"][:2]
    for name, (task, words) in expected.items():
        said = answers_to(model, rows, task)
        assert len(said) == (2 if task == "record" else 4)
        key = {"copa": "choice", "record": "answer"}.get(task, "label")
        want = [said[i][key] if words is None else words[said[i][key]] for i in range(len(said))]
        assert files[name] == [{"idx": i, "label": label} for i, label in enumerate(want)], name
    passages = files["MultiRC.jsonl"]
    assert [line["idx"] for line in passages] == [0, 1]
    for p, line in enumerate(passages):
        questions = line["passage"]["questions"]
        assert [question["idx"] for question in questions] == [2 * p, 2 * p + 1]
        for question in questions:
            assert [a["idx"] for a in question["answers"]] == [2 * question["idx"], 2 * question["idx"] + 1]
            assert {a["label"] for a in question["answers"]} <= {0, 1}


def test_what_is_not_there_is_left_out(trained, rows: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_jsonl(data / "cola" / "test.jsonl", [{"sentence": text} for text in TEXTS])  # no idx: by place
    outcome = submit(trained.folder, data, "--glue_zip", tmp_path / "part.zip")
    assert outcome.code == 0, outcome.err
    files = read(tmp_path / "part.zip")
    assert [line.split("\t")[0] for line in files["CoLA.tsv"]] == ["index", "0", "1", "2", "3"]
    assert set(files) == {"CoLA.tsv"}
    assert "left out: SST-2.tsv (the model has no task sst2)" in outcome.err
    assert f"MNLI-mm.tsv (no test_mismatched rows in {data / 'mnli'})" in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--glue_zip", "ZIP", "--task", "cola"], "--task does not go with --glue_zip"),
        (["--glue_zip", "ZIP", "--text", "a cat"], "--text does not go with --glue_zip"),
        (["--superglue_zip", "ZIP"], "nothing to write: BoolQ.jsonl (the model has no task boolq)"),
        (["--glue_zip", "ZIP", "--split", "dev"], "nothing to write: CoLA.tsv (no dev rows in"),
        (["--glue_zip", "ZIP.tsv"], "ZIP.tsv: the name must end in .zip"),
        (["--task", "cola", "--split", "test"], "--split belongs to --glue_zip or --superglue_zip"),
        (["--glue_zip", "ZIP", "--split", "twice"], "idx 3 stands in several rows"),
        (["--glue_zip", "ZIP", "--split", "odd"], "odd.jsonl, line 1: idx is 'x'; accepted: a whole number"),
        (["--glue_zip", "FOLDER.zip"], "FOLDER.zip: is a folder; give the name of a file"),
        (["--glue_zip", "FILE/a.zip"], "--glue_zip FILE: cannot be written"),
        (["--glue_zip", "ZIP", "--superglue_zip", "FILE/a.zip"], "--superglue_zip FILE: cannot be written"),
        (["--glue_zip", "ZIP", "--superglue_zip", "ZIP"], "ZIP: --glue_zip names the same file; give two"),
    ],
)
def test_refused(
    trained, tmp_path: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_trained(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("camtl.cli._submissions.load_trained", load_trained)
    data, target = tmp_path / "data", tmp_path / "new.zip"
    names = {"ZIP": target, "FOLDER": tmp_path / "folder", "FILE": tmp_path / "file"}
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "file").touch()

    def named(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    write_jsonl(data / "cola" / "twice.jsonl", [{"sentence": text, "idx": 3} for text in TEXTS])
    write_jsonl(data / "cola" / "odd.jsonl", [{"sentence": "the cat", "idx": "x"}])
    outcome = submit(trained.folder, data, *map(named, flags))
    assert outcome.code == 2, outcome.err
    assert named(message) in outcome.error_line
    assert not list(tmp_path.glob("new*"))


def test_two_archives_are_written_together_or_not_at_all(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camtl.models import CaMtlForMultiTask

    predict = CaMtlForMultiTask.predict

    def fails_at_the_end(self: Any, *given: Any, task: str, **more: Any) -> Any:
        if task == "wsc":
            raise MemoryError
        return predict(self, *given, task=task, **more)

    monkeypatch.setattr(CaMtlForMultiTask, "predict", fails_at_the_end)
    flags = ("--glue_zip", tmp_path / "a.zip", "--superglue_zip", tmp_path / "b.zip")
    assert submit(model, rows, *flags).code != 0
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert submit(model, rows, *flags).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]


def test_rte_under_either_name_of_its_columns(model: Path, rows: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_jsonl(data / "rte" / "test.jsonl", rows_of("mnli"))
    flags = ("--glue_zip", tmp_path / "a.zip", "--superglue_zip", tmp_path / "b.zip")
    assert submit(model, data, *flags).code == 0
    found = read(tmp_path / "a.zip")["RTE.tsv"], read(tmp_path / "b.zip")["RTE.jsonl"]
    assert submit(model, rows, *flags).code == 0
    assert found == (read(tmp_path / "a.zip")["RTE.tsv"], read(tmp_path / "b.zip")["RTE.jsonl"])
    write_jsonl(data / "rte" / "test.jsonl", [{"sentence1": "a cat", "premise": "a cat"}])
    assert "reads the column 'sentence2'" in submit(model, data, *flags[:2]).error_line


def test_a_row_that_cannot_be_encoded_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    wrong = rows_of("copa")
    wrong[2]["choice1"] = "the cat " * 40
    file = tmp_path / "data" / "copa" / "test.jsonl"
    write_jsonl(file, wrong)
    file.write_text("\n" + file.read_text())  # a blank line counts
    flags = ("--superglue_zip", tmp_path / "a.zip", "--device", "cpu")
    outcome = call("predict", model, *flags, "--data_dir", tmp_path / "data")
    assert outcome.code == 2
    assert outcome.error_line.startswith(f"camtl: error: {file}, line 4: task 'copa': choice 1 ")

    def load_dataset(hub: str, config: str, **_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(wrong)} if config == "copa" else {}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    outcome = call("predict", model, *flags)
    assert outcome.code == 2
    place = "aps/super_glue (copa) test, row 3"
    assert outcome.error_line.startswith(f"camtl: error: {place}: task 'copa': choice 1 ")
    assert not (tmp_path / "a.zip").exists()


def test_rows_of_the_hub(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder each file's rows come from its benchmark's own set; RTE from that of either."""
    import datasets

    asked = []

    def load_dataset(hub: str, config: str, **_: Any) -> dict[str, Any]:
        asked.append((hub, config))
        if config == "ax":
            raise ConnectionError("no such config in the cache")
        task = {"axb": "rte", "axg": "mnli", "stsb": "stsb", "wsc.fixed": "wsc"}.get(config, config)
        if (hub, config) == ("aps/super_glue", "rte"):
            task = "mnli"  # premise and hypothesis there
        found = datasets.Dataset.from_list(rows_of(task))
        if config == "mnli":
            return {"test_matched": found, "test_mismatched": found.select(range(2))}
        return {"test": found}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    flags = ("--glue_zip", tmp_path / "a.zip", "--superglue_zip", tmp_path / "b.zip", "--device", "cpu")
    outcome = call("predict", model, *flags)
    assert outcome.code == 0, outcome.err
    assert "left out: AX.tsv (no test rows in nyu-mll/glue (ax))" in outcome.err
    for hub, config in (
        ("nyu-mll/glue", "rte"),
        ("aps/super_glue", "rte"),
        ("aps/super_glue", "axg"),
        ("aps/super_glue", "wsc.fixed"),
    ):
        assert (hub, config) in asked
    hub = read(tmp_path / "a.zip") | read(tmp_path / "b.zip")
    assert submit(model, rows, *flags[:4]).code == 0
    folder = read(tmp_path / "a.zip") | read(tmp_path / "b.zip")
    assert set(folder) - set(hub) == {"AX.tsv"}
    for name in ("CoLA.tsv", "MNLI-m.tsv", "MultiRC.jsonl", "ReCoRD.jsonl", "WSC.jsonl", "RTE.jsonl"):
        assert hub[name] == folder[name]
    assert len(hub["MNLI-mm.tsv"]) == 3
