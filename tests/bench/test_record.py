"""Records: what is in them, where they go, and what is said of files that are none."""

from __future__ import annotations

import json

import pytest

from camtl.bench import Record, best_ms, load, new_path
from camtl.bench.environment import absent, checkout, environment, machine, results_folder
from camtl.errors import UsageError


@pytest.fixture
def record(tmp_path):
    return Record.create("ops", "quick", "cpu", tmp_path / "deep" / "record.json")


ROW = {
    "id": "ops/times/a/float32", "section": "ops", "op": "times", "case": "a", "dtype": "float32",
    "status": "ok", "passes": {"both": {"contenders": {}, "ratio": {}}},
}  # fmt: skip


def test_a_record_is_read_as_it_was_written(record):
    record.add(ROW | {"seconds": 1 / 3, "text": "a []\n"})
    content = load(record.path)
    assert content["rows"][0].pop("seconds") == 0.3333333
    assert record.rows[0].pop("seconds") == 1 / 3  # the file alone is shorter
    assert content == record.content
    assert record.content["schema"] == 2
    assert record.content["kind"] == "camtl-bench"
    assert not record.content["finished"]
    record.add({**ROW, "id": "another"})
    assert [row["id"] for row in load(record.path)["rows"]] == [ROW["id"], "another"]
    assert sum('"id": ' in line for line in record.path.read_text().splitlines()) == 2  # a line each
    assert [p.name for p in record.path.parent.iterdir()] == ["record.json"]  # nothing half-written is left


def test_the_environment_has_what_a_number_needs():
    found = environment("cpu")
    keys = (
        "date commit changed machine cpu cores threads isa gpu driver cuda torch triton transformers python"
    )
    assert found.keys() >= {*keys.split(), "absent"}
    assert found["gpu"] is None
    assert isinstance(found["changed"], bool)
    assert found["machine"].endswith("core")
    assert found["machine"] == found["machine"].lower().replace(" ", "-")
    assert all(why == "not installed" for why in absent().values())
    json.dumps(found)


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Record.create("ops", "smoke", "cpu").add(dict(ROW))
    assert not list(tmp_path.iterdir())


def test_where_records_go(tmp_path, monkeypatch):
    monkeypatch.setenv("CAMTL_RESULTS", str(tmp_path / "mine"))
    assert results_folder("cpu") == tmp_path / "mine"
    path = new_path("ops", "quick", "cpu")
    assert path.parent == tmp_path / "mine"
    assert path.name.startswith("ops-cpu-quick-2")
    assert new_path("ops", "quick", "cpu", tmp_path).parent == tmp_path
    assert new_path("ops", "quick", "cpu", tmp_path / "a.json") == tmp_path / "a.json"
    monkeypatch.delenv("CAMTL_RESULTS")
    monkeypatch.chdir(tmp_path)
    assert results_folder("cpu").parts[-3:] == ("benchmarks", "results", machine("cpu"))
    top = checkout()
    assert results_folder("cpu").is_relative_to(top) if top else not results_folder("cpu").is_absolute()


def test_a_record_is_never_overwritten(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UsageError, match=r"a\.json exists, and a record is never overwritten"):
        new_path("ops", "quick", "cpu", tmp_path / "a.json")
    first = new_path("ops", "quick", "cpu", tmp_path)
    first.write_text("{}")
    second = new_path("ops", "quick", "cpu", tmp_path)  # in the same second, perhaps
    assert not second.exists()


def one_line(path) -> str:
    with pytest.raises(UsageError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_a_file_cut_off(record, tmp_path):
    record.add(dict(ROW))
    text = record.path.read_text()
    path = tmp_path / "half.json"
    for share in (0.1, 0.5, 0.99):
        path.write_text(text[: int(share * len(text))])
        assert one_line(path).startswith("cut off, or not JSON (line ")
    path.write_text("")
    assert one_line(path).startswith("cut off, or not JSON (line 1, column 1")


def test_files_that_are_no_records(tmp_path):
    path = tmp_path / "other.json"
    assert one_line(path) == "no such file or directory"
    assert one_line(tmp_path) == "is a directory"
    path.write_bytes(b"\xff\xfe\x00")
    assert one_line(path) == "not a text file"
    for text in ("[1, 2]", "{}", '{"kind": "ops", "rows": []}', "3"):
        path.write_text(text)
        assert one_line(path) == "not a record of camtl bench"


@pytest.mark.parametrize("schema", [1, 3, None, "2"])
def test_another_version(record, schema):
    record.content["schema"] = schema
    record.save()
    assert one_line(record.path).startswith(
        f"its layout has version {schema!r}, this camtl reads version 2; "
    )


def test_parts_that_are_missing(record):
    content = {key: value for key, value in record.content.items() if key != "ceilings"}
    record.path.parent.mkdir()
    record.path.write_text(json.dumps(content | {"rows": {}}))
    assert one_line(record.path) == "half a record, without ceilings, rows"


def test_rows_that_are_broken(record):
    record.add({key: value for key, value in ROW.items() if key not in ("op", "passes")})
    assert one_line(record.path) == "row 1: half a record, without op, passes"
    record.rows[:] = [dict(ROW), {**ROW, "passes": {"both": {"contenders": {}}}}]
    record.save()
    assert one_line(record.path) == "row 2, both: half a record, without ratio"
    record.rows[:] = ["text"]
    record.save()
    assert "row 1: half a record" in one_line(record.path)


def test_numbers_that_are_none_become_null(record):
    record.content["ceilings"]["copy_bytes_per_s"] = float("inf")
    record.save()
    assert load(record.path)["ceilings"] == {"copy_bytes_per_s": None}


def test_the_time_that_counts():
    calls, graph = {"p50": 2.0}, {"p50": 1.0}
    assert best_ms({"status": "ok", "ms": calls, "graph_ms": graph}) == 1.0
    assert best_ms({"status": "ok", "ms": calls, "graph_ms": None}) == 2.0
    assert best_ms({"status": "ok", "ms": None}) is None
    assert best_ms({"status": "wrong", "ms": calls}) is None
