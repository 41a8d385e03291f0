from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from camtl.errors import UsageError
from camtl.tasks import GROUPS, TASK_TYPES, Task, get_task, list_tasks, register_task, registry, resolve_tasks


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    registry._from_packages.cache_clear()
    yield
    registry._from_packages.cache_clear()


def own(name, **more):
    return Task(name=name, type="regression", text_columns=["a"], **more)


def names(*args, **kwargs):
    return [task.name for task in resolve_tasks(*args, **kwargs)]


def test_built_in_tasks():
    assert list_tasks()[:9] == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    assert set(GROUPS["demo"]) < set(list_tasks())
    for name in list_tasks():
        task = get_task(name)
        assert task.description
        assert task.licence
        assert task.citation or name in GROUPS["demo"]
        assert task.source is not None or name in ("trec", "subj", "sst5")
    assert get_task("mnli").labels == ("entailment", "neutral", "contradiction")
    assert get_task("mnli").eval_splits == ("validation", "validation_mismatched")
    assert get_task("rte").labels == ("entailment", "not_entailment")
    assert get_task("wnli").labels == ("not_entailment", "entailment")
    assert get_task("cola").labels == ("unacceptable", "acceptable")
    assert get_task("mrpc").metrics == ("f1", "accuracy")
    assert get_task("stsb").num_labels == 1
    assert {get_task(name).source.hub for name in GROUPS["glue"]} == {"nyu-mll/glue"}


def test_resolving_names_groups_lists_and_objects():
    assert names("cola,mrpc") == ["cola", "mrpc"]
    assert names(" rte , cola ") == ["rte", "cola"]
    assert names(["rte", "cola,sst2"]) == ["rte", "cola", "sst2"]
    assert names("glue") == list(GROUPS["glue"])
    assert "wnli" not in names("glue")
    assert names(["demo", own("mine")]) == [*GROUPS["demo"], "mine"]
    assert names(own("mine")) == ["mine"]


def test_groups_of_the_paper():
    glue = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]
    mrqa = ["squad", "newsqa", "triviaqa", "searchqa", "hotpotqa", "naturalquestions"]
    assert names("superglue") == ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
    assert names("mrqa") == mrqa
    paper24 = [*glue, *["boolq", "cb", "copa", "multirc", "record", "wic", "wsc"], *mrqa, "wnut17"]
    assert names("paper24") == paper24
    assert len(paper24) == 22
    assert names("paper26") == [*paper24, "scitail", "snli"]


def test_a_task_of_two_groups_is_meant_once():
    assert names("glue,superglue") == [*names("glue"), *(n for n in names("superglue") if n != "rte")]
    assert names("paper26,glue,mrqa") == names("paper26")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mrcp", ["'mrcp'", "mrpc", "wnli", "glue"]),
        ("MNLI", ["did you mean mnli"]),
        ("glue,cola", ["more than once", "cola"]),
        ("superglue,rte", ["more than once", "rte"]),
        ("rte,rte", ["more than once", "rte"]),
        ("", ["no tasks given"]),
        (None, ["no tasks given"]),
        ([], ["no tasks given"]),
    ],
)
def test_errors(spec, words):
    with pytest.raises(UsageError) as caught:
        resolve_tasks(spec)
    for word in words:
        assert word in str(caught.value)


def test_result_names_must_not_collide():
    with pytest.raises(UsageError, match="mnli_mismatched"):
        resolve_tasks(["mnli", own("mnli_mismatched")])


def test_tasks_file_adds_to_and_overrides_the_known_names(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(
        "- {name: mine, type: regression, text_columns: [a]}\n- {name: cola, type: regression, "
        "text_columns: [z]}\n"
    )
    assert names(None, tasks_file=path) == ["mine", "cola"]
    chosen = resolve_tasks("rte,cola,mine", tasks_file=path)
    assert [task.type for task in chosen] == ["classification", "regression", "regression"]


def test_register():
    task = register_task(own("mine"))
    assert get_task("mine") is task
    assert list_tasks()[-1] == "mine"
    register_task(own("mine"))
    with pytest.raises(UsageError, match="already"):
        register_task(own("mine", label_column="y"))
    with pytest.raises(UsageError, match="already"):
        register_task(own("cola"))
    with pytest.raises(UsageError, match="group"):
        register_task(own("glue"))


class _Entry:
    def __init__(self, value, result):
        self.value = value
        self._result = result

    def load(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def test_entry_points(monkeypatch, caplog, tmp_path):
    path = tmp_path / "pkg.yaml"
    path.write_text("- {name: from_yaml, type: regression, text_columns: [a]}\n")
    entries = [
        _Entry("one", own("single")),
        _Entry("many", lambda: [own("first"), own("second")]),
        _Entry("file", path),
        _Entry("broken:entry", ImportError("gone")),
        _Entry("clash", own("cola")),
    ]
    asked = []

    def entry_points(*, group):
        asked.append(group)
        return entries

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    assert {"single", "first", "second", "from_yaml"} < set(list_tasks())
    assert get_task("cola").type == "classification"
    assert set(asked) == {"camtl.tasks"}
    assert "broken:entry" in caplog.text


def test_the_documentation_names_every_built_in_task_with_its_type_and_source():
    page = Path(__file__).parents[2] / "docs" / "tasks.md"
    table = page.read_text(encoding="utf-8").split("## Built-in tasks")[1]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"
    ]
    found = {name: row for row in rows[2:] for name in row[0].split()}
    assert set(found) == set(list_tasks()) - set(GROUPS["demo"])
    for name, (_, kind, hub, _) in found.items():
        task = get_task(name)
        assert kind == task.type
        source = task.source.hub if task.source else ""
        assert hub.split(",")[0].strip("`").replace("<task>", name) == source


def test_the_rows_shown_in_the_readme_are_read():
    """One row of every type, read as the task beside it reads its own files."""
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| `(\{.*\})` \|$", page, re.MULTILINE))
    assert rows.keys() == TASK_TYPES.keys()
    own = {
        "classification": {"text_columns": ["text"], "labels": ["weather", "sport"]},
        "multi_label": {"text_columns": ["text"], "labels": ["delivery", "price", "quality"]},
        "choice": {"text_columns": ["premise"], "options": {"choices": ["choice1", "choice2"]}},
        "tagging": {"text_columns": ["tokens"], "label_column": "tags", "labels": ["O", "B-person"]},
    }
    built_in = {
        "regression": "stsb",
        "span": "squad",
        "cloze": "record",
        "marked_spans": "wic",
        "grouped": "multirc",
    }
    for kind, row in rows.items():
        task = get_task(built_in[kind]) if kind in built_in else Task(name="own", type=kind, **own[kind])
        assert task.type == kind
        prepared = task.task_type.prepare(task, {k: [v] for k, v in json.loads(row).items()}, str)
        assert list(prepared[task.label_column]) != [None]
