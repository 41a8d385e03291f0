"""Options of ``camtl train``: flags, YAML files, defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from camtl.cli._train_parser import build_parser, parse
from camtl.cli.train import read_request
from camtl.cli.train_arguments import COMMON_TRAINING, ModelArguments, SwitchArguments, training_defaults
from camtl.errors import UsageError


@pytest.fixture(scope="module")
def parser():
    return build_parser(full=True)


def test_only_what_was_given_comes_back(parser) -> None:
    given = parse(
        parser, ["--model-name_or-path", "minilm", "--tasks", "a,b", "c", "--bf16", "--learning_rate=1e-4"]
    )
    assert given == {
        "model_name_or_path": "minilm",
        "tasks": ["a,b", "c"],
        "bf16": True,
        "learning_rate": 1e-4,
    }


def test_switches_can_be_turned_off_in_two_ways(parser) -> None:
    assert parse(parser, ["--bf16", "false", "--no_use_cpu"]) == {"bf16": False, "use_cpu": False}


def test_text_columns_are_never_split_at_commas(parser) -> None:
    assert parse(parser, ["--text_column", "a, b", "c"])["text_column"] == ["a, b", "c"]


def test_every_trainer_field_is_a_flag_but_the_rank(parser) -> None:
    from camtl.training.arguments import CaMtlTrainingArguments

    flags = {option: action for action in parser._actions for option in action.option_strings}
    names = {field.name for field in dataclasses.fields(CaMtlTrainingArguments) if field.init}
    assert {name for name in names if f"--{name}" not in flags} <= {"local_rank"}
    # The Trainer's field of this name is a list of its debugging aids; ours shows tracebacks.
    assert flags["--debug"].nargs == 0


def test_what_scripts_of_other_trainers_say_is_taken_with_one_note(parser, capsys) -> None:
    given = parse(parser, ["--do_train", "--do-eval", "--do_predict", "false", "--tasks", "cola"])
    made = read_request({**given, "model_name_or_path": "minilm"})
    assert made.training.do_train is False
    assert capsys.readouterr().err.splitlines() == [
        "camtl: --do_train --do_eval --do_predict: not needed; every run trains, and ends with one evaluation"
    ]


def test_common_options_exist() -> None:
    from camtl.training.arguments import CaMtlTrainingArguments

    known = {field.name for field in dataclasses.fields(CaMtlTrainingArguments)}
    assert {name for options in COMMON_TRAINING.values() for name, _, _ in options} <= known


def test_switches_are_those_of_the_config() -> None:
    from camtl.models.configuration import CHOICES, PRESETS, SWITCHES

    fields = {field.name: field for field in dataclasses.fields(SwitchArguments)}
    assert set(fields) | {"freeze"} == set(SWITCHES)
    assert {name: tuple(fields[name].metadata["choices"]) for name in CHOICES} == CHOICES
    preset = next(field for field in dataclasses.fields(ModelArguments) if field.name == "preset")
    assert set(preset.metadata["choices"]) == set(PRESETS)


def test_the_help_names_every_group(run) -> None:
    from camtl.cli.train_arguments import GROUP_NAMES
    from camtl.tasks import GROUPS

    assert tuple(GROUPS) == GROUP_NAMES
    assert f"groups: {', '.join(GROUPS)} (see" in " ".join(run("train", "--help").out.split())


def test_the_short_help_is_a_part_of_the_long_one(run) -> None:
    short, long = run("train", "--help").out, run("train", "--help-all").out
    assert "--sampler NAME" in short
    assert "--adam_beta1" not in short
    assert "--adam_beta1" in long
    assert "--regression_places" in long
    assert len(short.splitlines()) < 150


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_win_over_the_file(parser, tmp_path: Path) -> None:
    path = config(
        tmp_path,
        "model_name_or_path: minilm\ntasks: [cola, rte]\nlearning-rate: 5e-5\nbf16: true\neval_strategy: no\n"
        "text_column: [a, b]\nmax_steps:\nsampler_options: {temperature: 5}\nmin_share: 0.1\n",
    )
    given = parse(parser, ["--config", path, "--learning_rate", "1e-4"])
    assert given == {
        "model_name_or_path": "minilm",
        "tasks": ["cola", "rte"],
        "learning_rate": 1e-4,
        "bf16": True,
        "eval_strategy": "no",
        "text_column": ["a", "b"],
        "sampler_options": '{"temperature": 5}',
        "min_share": 0.1,
    }


def test_a_file_may_describe_tasks_inline(parser, tmp_path: Path) -> None:
    path = config(
        tmp_path,
        "model_name_or_path: minilm\ntasks:\n  - cola\n"
        "  - {name: mood, type: classification, text_columns: text, labels: [no, yes]}\n",
    )
    request = read_request(parse(parser, ["--config", path, "--output_dir", str(tmp_path / "o")]))
    assert [task.name for task in request.tasks] == ["cola", "mood"]
    assert request.tasks[1].labels == ("no", "yes")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sampller: sqrt", ["unknown key 'sampller'", "did you mean sampler?"]),
        ("max_steps: many", ["key 'max_steps'", "not a whole number"]),
        ("preset: big", ["key 'preset'", "'big' is not one of ca-mtl"]),
        ("debug: true", ["unknown key 'debug'"]),
        ("no_bf16: true", ["key 'no_bf16'", "`bf16: false`"]),
        ("no-use-cpu:", ["key 'no-use-cpu'", "`use_cpu: false`"]),
        ("packed: sometimes", ["key 'packed'", "'sometimes' is not one of auto, true, false"]),
        ("- a\n- b", ["holds a list"]),
        ("a: [1", ["line", "not YAML"]),
    ],
)
def test_errors_name_file_and_key(parser, tmp_path: Path, text: str, words: list[str]) -> None:
    path = config(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        parse(parser, ["--config", path])
    for word in [path, *words]:
        assert word in str(caught.value)


def test_a_missing_file(parser) -> None:
    with pytest.raises(UsageError, match="no such file"):
        parse(parser, ["--config", "/nowhere.yaml"])


def test_a_folder_is_no_config(parser, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--config {tmp_path}: is a folder"):
        parse(parser, ["--config", str(tmp_path)])


def test_evaluations_and_checkpoints_go_together() -> None:
    assert training_defaults({})["save_strategy"] == "epoch"
    steps = training_defaults({"eval_steps": 0.5})
    assert (steps["eval_strategy"], steps["save_strategy"], steps["save_steps"]) == ("steps", "steps", 0.5)
    saves = training_defaults({"save_steps": 7, "eval_strategy": "no"})
    assert (saves["eval_strategy"], saves["save_strategy"], saves["save_steps"]) == ("no", "steps", 7)
    assert training_defaults({"eval_strategy": "no"})["save_strategy"] == "epoch"
    assert training_defaults({"eval_strategy": "no", "save_strategy": "no"})["save_strategy"] == "no"


def request(**given):
    return read_request({"model_name_or_path": "minilm", "tasks": ["cola"], "output_dir": "unused", **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path"),
        ({"tasks": None}, "--tasks"),
        ({"tasks": [","]}, "say what to train on"),
        ({"tasks": [" ", ",,"]}, "say what to train on"),
        ({"tasks": ["colla"]}, "did you mean cola"),
        ({"train_file": "a.csv"}, "--train_file"),
        ({"tasks": None, "train_file": "a.csv"}, "--validation_file"),
        ({"tasks": None, "train_file": "a.csv", "validation_file": "b.csv", "data_dir": "d"}, "--data_dir"),
        ({"text_column": ["a"]}, "--text_column"),
        ({"max_train_samples": 0}, "--max_train_samples"),
        ({"max_seq_length": 1}, "--max_seq_length"),
        ({"backend": "fpga"}, "--backend"),
        ({"output_dir": __file__}, "is a file"),
        ({"tasks": ["cola"], "warmup_ratio": -1.0}, "warmup"),
    ],
)
def test_what_contradicts_itself_is_a_usage_error(given, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        request(**{"model_name_or_path": "minilm", "tasks": ["cola"], **given})


def test_only_given_model_options_reach_the_model() -> None:
    assert request().model_options == {}
    options = request(freeze="half", alignment="none", preset="ca-mtl-base").model_options
    assert options == {"preset": "ca-mtl-base", "alignment": "none", "freeze": "half"}
    assert request(freeze="none").model_options == {"freeze": None}


@pytest.mark.parametrize(("given", "passed"), [("auto", "auto"), ("true", True), ("false", False)])
def test_packing_reaches_the_model(parser, tmp_path: Path, given: str, passed: object) -> None:
    assert request(**parse(parser, ["--packed", given])).model_options == {"packed": passed}
    path = config(tmp_path, f"packed: {given}")
    assert request(**parse(parser, ["--config", path])).model_options == {"packed": passed}


def test_an_absent_backend_is_one_line(capsys) -> None:
    import warnings

    import torch

    from camtl.ops import backend_report, bias_gelu, set_backend

    absent = [e["backend"] for e in backend_report() if e["op"] == "bias_gelu" and not e["available"]]
    if not absent:
        pytest.skip("every backend is available here")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            request(backend=absent[0])
            bias_gelu(torch.zeros(2, 4), torch.zeros(4))
        finally:
            set_backend(None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"camtl: backend {absent[0]}: ")
    assert "bias_gelu" in line
    assert not [str(warning.message) for warning in caught if "preferred backend" in str(warning.message)]


def test_the_default_folder_is_named_after_the_tasks() -> None:
    made = read_request({"model_name_or_path": "minilm", "tasks": ["cola,rte"]})
    assert made.output_dir == Path("runs/cola-rte")
    assert made.training.warmup_steps == 0.06
    assert made.training.per_device_train_batch_size == 32
    assert made.training.disable_tqdm is False
