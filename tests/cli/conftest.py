"""A tiny random encoder, small data files, and one run trained on them that the other tests read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCABULARY = """
a the cat dog bird house river green red old new runs sleeps sings sees finds loves small tall never always
under over with without quiet loud film song meal
"""
WORDS = VOCABULARY.split()
TASKS = "cola,stsb,mnli"


@dataclass
class Outcome:
    """What one command printed and returned."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The last line of stderr; there must be no traceback."""
        assert "Traceback" not in self.err, self.err
        return self.err.strip().splitlines()[-1]


def call(*argv: object) -> Outcome:
    """Run one command in this process."""
    from camtl.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in argv])
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def run() -> Callable[..., Outcome]:
    return call


def sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(3, 9)))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path) -> None:
    generator = random.Random(7)
    for split, count in (("train", 40), ("validation", 12)):
        rows = [
            {"sentence": sentence(generator), "label": generator.choice([0, 1, 1]), "idx": i}
            for i in range(count)
        ]
        write_jsonl(folder / "cola" / f"{split}.jsonl", rows)
        rows = [
            {
                "sentence1": sentence(generator),
                "sentence2": sentence(generator),
                "label": generator.uniform(0, 5),
            }
            for _ in range(count)
        ]
        write_jsonl(folder / "stsb" / f"{split}.jsonl", rows)
    for split, count in (("train", 40), ("validation", 12), ("validation_mismatched", 9)):
        rows = [
            {
                "premise": sentence(generator),
                "hypothesis": sentence(generator),
                "label": generator.randrange(3),
            }
            for _ in range(count)
        ]
        write_jsonl(folder / "mnli" / f"{split}.jsonl", rows)


def make_encoder(folder: Path) -> None:
    import torch
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=200, min_frequency=1, show_progress=False)
    vocabulary = learner.get_vocab()
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(str(folder))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    make_encoder(folder)
    return folder


@pytest.fixture(scope="session")
def train_flags(encoder: Path, data_dir: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(encoder), "--data_dir", str(data_dir), "--max_seq_length", "24"),
        *(
            "--per_device_train_batch_size",
            "8",
            "--use_cpu",
            "--eval_strategy",
            "no",
            "--learning_rate",
            "1e-3",
        ),
    ]


@dataclass
class Run:
    """A trained run and what its command printed."""

    folder: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, train_flags: list[str]) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "three"
    outcome = call(
        *("train", *train_flags, "--tasks", TASKS, "--preset", "ca-mtl-base", "--max_steps", 6),
        *("--eval_steps", 3, "--eval-strategy", "steps", "--output_dir", folder),
    )
    assert outcome.code == 0, outcome.err
    return Run(folder, outcome)


def copy_of(trained: Run, folder: Path) -> Path:
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    return folder


TYPED = """
- {name: who, type: tagging, text_columns: [words], label_column: tags, labels: [O, B-x, I-x]}
- {name: where, type: span, text_columns: [question, context], label_column: answers}
- {name: pick, type: choice, text_columns: [premise], options: {choices: [a, b]}}
- {name: gap, type: cloze, text_columns: [query, passage], label_column: answers}
- {name: topics, type: multi_label, text_columns: [text], labels: [x, y, z]}
- name: sense
  type: marked_spans
  text_columns: [one, two]
  labels: [different, same]
  options: {spans: [{text: one, start: s1, end: e1}, {text: two, index: i2, span: w2}]}
"""
TYPED_ROWS = {
    "who": {"words": ["the", "cat"], "tags": ["O", "B-x"]},
    "where": {"question": "a cat", "context": "the cat runs", "answers": ["cat"]},
    "pick": {"premise": "the cat", "a": "runs", "b": "sings", "label": 0},
    "gap": {
        "query": "@placeholder runs",
        "passage": "the cat sees dog",
        "entities": ["cat", "dog"],
        "answers": ["cat"],
    },
    "topics": {"text": "cat", "label": ["x"]},
    "sense": {"one": "the cat", "s1": 4, "e1": 7, "two": "a cat", "i2": 1, "w2": "cat", "label": "same"},
}


@pytest.fixture(scope="session")
def typed(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of tasks of many types, after one step."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "tasks.yaml").write_text(TYPED)
    for task, row in TYPED_ROWS.items():
        for split in ("train", "validation"):
            write_jsonl(folder / task / f"{split}.jsonl", [row] * 4)
    outcome = call(
        *("train", "--model_name_or_path", encoder, "--tasks_file", folder / "tasks.yaml", "--max_steps", 1),
        *("--data_dir", folder, "--max_seq_length", 60, "--use_cpu", "--output_dir", folder / "run"),
    )
    assert outcome.code == 0, outcome.err
    return Run(folder / "run", outcome)
