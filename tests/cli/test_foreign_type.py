"""A task type of another package, found by its entry point: trained beside others, judged, asked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from camtl.tasks import types

from .conftest import Outcome, call, write_jsonl

# An ordinal type: class k is coded as k thresholds passed. None of the built-in types reads labels like that.
STARS = """
import math

import numpy as np

from camtl.tasks.types import HeadSpec, Outputs, TaskType
from camtl.tasks.types.base import encode_texts


class Stars(TaskType):
    name = "stars"
    loss = "bce"
    metrics = ("distance", "agreement")
    default_metrics = ("agreement",)

    def check(self, task):
        if len(task.labels or ()) < 3:
            raise ValueError("labels: stars need three or more, from worst to best")

    def features(self, task):
        return {**dict.fromkeys(task.text_columns, "string"), task.label_column: "int32"}

    def prepare_label(self, task, value):
        return None if value in (None, -1) else int(value)

    def encode(self, task, rows, tokenizer, max_length):
        out = encode_texts([rows[column] for column in task.text_columns], tokenizer, max_length)
        if task.label_column in rows:
            passed = range(1, len(task.labels))
            out["labels"] = [
                [math.nan if stars is None else float(stars >= k) for k in passed]
                for stars in rows[task.label_column]
            ]
        return out

    def head(self, task):
        return HeadSpec(outputs=len(task.labels) - 1)

    def decode(self, outputs: Outputs, task):
        return [{"stars": int(k), "word": task.labels[int(k)]} for k in self.stars(outputs, task)]

    def compute_metrics(self, outputs: Outputs, task):
        given = np.asarray(outputs.sequences["labels"]).reshape(-1, len(task.labels) - 1).sum(axis=1)
        distance = np.abs(self.stars(outputs, task) - given).mean()
        known = {"distance": -distance, "agreement": 1 - distance / (len(task.labels) - 1)}
        return {name: float(known[name]) for name in task.metrics}

    def stars(self, outputs: Outputs, task):
        return (np.asarray(outputs.logits)[:, : len(task.labels) - 1] > 0).sum(axis=1)
"""
TASKS = """
tasks:
  - name: reviews
    type: stars
    text_columns: [sentence]
    labels: [bad, fair, good]
    metrics: [agreement, distance]
    files: {train: train.jsonl, validation: validation.jsonl}
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``stars`` on the path, with the metadata that an installer writes."""
    site = tmp_path / "site"
    facts = site / "stars-1.0.dist-info"
    facts.mkdir(parents=True)
    (site / "stars_of_reviews.py").write_text(STARS)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: stars\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[camtl.task_types]\nstars = stars_of_reviews:Stars\n")
    monkeypatch.syspath_prepend(str(site))
    types._from_packages.cache_clear()
    yield
    types._from_packages.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Reviews whose stars can be read off their texts, and the file that names the task."""
    generator = random.Random(3)
    for split, count in (("train", 120), ("validation", 30)):
        rows = []
        for i in range(count):
            stars = i % 3
            words = ("quiet", "cat", "loud")[stars], generator.choice(("film", "song", "meal"))
            rows.append({"sentence": " ".join(words), "label": stars})
        write_jsonl(tmp_path / "reviews" / f"{split}.jsonl", rows)
    (tmp_path / "reviews" / "tasks.yaml").write_text(TASKS)
    return tmp_path / "reviews"


def train(train_flags: list[str], folder: Path, *options: object) -> Outcome:
    return call(
        *("train", *train_flags, "--tasks_file", folder / "tasks.yaml", "--tasks", "reviews,cola"),
        *("--sampler", "uncertainty", "--output_dir", folder / "run", *options),
    )


@pytest.mark.usefixtures("installed")
def test_it_is_trained_judged_and_asked(train_flags: list[str], folder: Path) -> None:
    outcome = train(train_flags, folder, "--max_steps", 80, "--learning_rate", "3e-3")
    assert outcome.code == 0, outcome.err
    scores = json.loads((folder / "run" / "eval_results.json").read_text())
    assert scores["eval_reviews_agreement"] > 0.9
    assert scores["eval_reviews_distance"] == pytest.approx(2 * (scores["eval_reviews_agreement"] - 1))
    outcome = call("predict", folder / "run", "--task", "reviews", "--text", "loud meal")
    assert json.loads(outcome.out)["word"] == "good"
    outcome = call("predict", folder / "run", "--task", "reviews", "--text", "quiet song")
    assert json.loads(outcome.out)["stars"] == 0


@pytest.mark.usefixtures("installed")
def test_its_own_check_names_the_field(train_flags: list[str], folder: Path) -> None:
    path = folder / "tasks.yaml"
    path.write_text(path.read_text().replace("[bad, fair, good]", "[bad, good]"))
    outcome = train(train_flags, folder)
    assert outcome.code == 2
    assert "labels: stars need three or more, from worst to best" in outcome.error_line


def test_without_the_package(train_flags: list[str], folder: Path) -> None:
    outcome = train(train_flags, folder)
    assert outcome.code == 2
    assert "unknown task type 'stars'" in outcome.error_line
    assert not (folder / "run").exists()
