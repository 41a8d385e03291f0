"""``learning_curves.png``."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import pytest

from camtl.reports import write_curves
from camtl.reports.curves import loss_series, series, smooth
from camtl.tasks import get_task

HISTORY = [
    *({"step": step, "loss": 1 / step, "loss_rte": 0.7, "loss_stsb": 2 / step} for step in range(1, 21)),
    {
        "step": 10,
        "eval_average": 0.3,
        "eval_rte_accuracy": 0.6,
        "eval_stsb_pearson": -0.1,
        "eval_stsb_spearmanr": 0.0,
    },
    {
        "step": 20,
        "eval_average": 0.4,
        "eval_rte_accuracy": 0.7,
        "eval_stsb_pearson": 0.1,
        "eval_stsb_spearmanr": 0.2,
    },
    {"step": 20, "eval_average": 0.9},
    {"step": 20, "train_runtime": 3.0, "train_loss": 0.5},
]
TASKS = [get_task("rte"), get_task("stsb")]


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_series_are_ordered_finite_and_keep_the_first_of_a_step() -> None:
    assert series(HISTORY, "eval_average") == ([10.0, 20.0], [0.3, 0.4])
    assert series(
        [{"step": 2, "x": math.nan}, {"step": 1, "x": 1}, {"x": 3}, {"step": 3, "x": "no"}], "x"
    ) == ([1.0], [1.0])
    assert loss_series(HISTORY, "rte")[1] == [0.7] * 20
    assert loss_series(HISTORY, None)[1][:2] == [1.0, 0.5]


def test_smoothing_starts_at_the_first_value_and_keeps_constants() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 0.0])[0] == 1.0
    assert 0 < smooth([1.0, 0.0])[1] < 1


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    baselines = {
        ("rte", "validation"): {"metrics": {"accuracy": 0.5}, "rows": 4, "answer": 1.0},
        ("stsb", "validation"): {"metrics": {"pearson": 0.0, "spearmanr": 0.0}, "rows": 4, "answer": 2.0},
    }
    path = tmp_path / "c.png"
    assert write_curves(HISTORY, TASKS, path, baselines=baselines, title="t") is None
    width, height = png_size(path)
    assert width > height > 400


def test_many_tasks_wrap_into_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tasks = [get_task(name) for name in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")]
    assert write_curves(HISTORY, tasks, tmp_path / "c.png") is None
    few, many = tmp_path / "few.png", tmp_path / "c.png"
    assert write_curves(HISTORY, TASKS, few) is None
    assert png_size(many)[1] > png_size(few)[1]


def test_a_run_of_one_step(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (
        write_curves([{"step": 1, "loss": 1.0, "eval_rte_accuracy": 0.5}], TASKS[:1], tmp_path / "c.png")
        is None
    )
    assert (tmp_path / "c.png").exists()


def test_a_run_of_no_step(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("matplotlib")
    assert write_curves([{"step": 0, "eval_rte_accuracy": 0.5}], TASKS[:1], tmp_path / "c.png") is None
    assert not [str(warning.message) for warning in recwarn if "identical" in str(warning.message)]


def test_nothing_logged(tmp_path: Path) -> None:
    message = write_curves([], TASKS, tmp_path / "c.png")
    assert message is not None
    assert "no step" in message
    assert not (tmp_path / "c.png").exists()


def test_without_matplotlib_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    message = write_curves(HISTORY, TASKS, tmp_path / "c.png")
    assert message is not None
    assert "camtl[plots]" in message
    assert "\n" not in message
