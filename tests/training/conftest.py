"""A tiny random model, a tokenizer of forty words, and three learnable tasks made from them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from camtl.data import tokenize
from camtl.models import CaMtlConfig, CaMtlForMultiTask
from camtl.tasks import Task
from camtl.training import CaMtlTrainer, CaMtlTrainingArguments

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(40)]
TASKS = [
    Task(
        name="tone",
        type="classification",
        text_columns=["text"],
        labels=["bad", "good"],
        metrics=["accuracy", "f1"],
    ),
    Task(
        name="relation",
        type="classification",
        text_columns=["first", "second"],
        labels=["same", "part", "other"],
        eval_splits=["validation", "validation_mismatched"],
    ),
    Task(name="closeness", type="regression", text_columns=["first", "second"]),
]


@pytest.fixture(scope="session")
def tasks() -> list[Task]:
    return TASKS


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _sentence(rng: random.Random, low: int = 2, high: int = 9) -> list[str]:
    return rng.sample(WORDS[4:], rng.randint(low, high))


def _tone(rng: random.Random, rows: int) -> dict[str, list[Any]]:
    texts, labels = [], []
    for _ in range(rows):
        label = rng.randint(0, 1)
        texts.append(" ".join([WORDS[label], *_sentence(rng)]))
        labels.append(label)
    return {"text": texts, "label": labels}


def _relation(rng: random.Random, rows: int) -> dict[str, list[Any]]:
    first, second, labels = [], [], []
    for _ in range(rows):
        label = rng.randint(0, 2)
        first.append(" ".join([WORDS[label], *_sentence(rng)]))
        second.append(" ".join(_sentence(rng)))
        labels.append(label)
    return {"first": first, "second": second, "label": labels}


def _closeness(rng: random.Random, rows: int) -> dict[str, list[Any]]:
    first, second, labels = [], [], []
    for _ in range(rows):
        label = rng.randint(0, 3)
        first.append(" ".join([WORDS[label], *_sentence(rng)]))
        second.append(" ".join(_sentence(rng)))
        labels.append(10.0 + 2.0 * label)
    return {"first": first, "second": second, "label": labels}


def raw_rows(sizes: dict[str, int], seed: int) -> dict[str, Dataset]:
    makers = {"tone": _tone, "relation": _relation, "closeness": _closeness}
    return {
        name: Dataset.from_dict(makers[name](random.Random(f"{name}-{seed}"), rows))
        for name, rows in sizes.items()
    }


@pytest.fixture(scope="session")
def raw() -> Callable[[dict[str, int], int], dict[str, Dataset]]:
    return raw_rows


@pytest.fixture(scope="session")
def data(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Tokenised rows: ``{"train": {task: Dataset}, "eval": {task: Dataset or {split: Dataset}}}``."""
    cache = tmp_path_factory.mktemp("cache")

    def tokenised(rows: dict[str, Dataset]) -> dict[str, Any]:
        return {
            t.name: tokenize(t, rows[t.name], tokenizer, 24, cache_dir=cache) for t in TASKS if t.name in rows
        }

    train = tokenised(raw_rows({"tone": 40, "relation": 24, "closeness": 17}, 0))
    held: dict[str, Any] = tokenised(raw_rows({"tone": 23, "relation": 18, "closeness": 15}, 1))
    other = tokenised(raw_rows({"relation": 11}, 2))
    held["relation"] = {"validation": held["relation"], "validation_mismatched": other["relation"]}
    return {"train": train, "eval": held}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., CaMtlForMultiTask]:
    def make(seed: int = 0, tasks: list[Task] | None = None, **options: Any) -> CaMtlForMultiTask:
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "vocab_size": len(SPECIAL) + len(WORDS),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "max_seq_length": 24,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "initializer_range": 0.2,
            "tasks": tasks or TASKS,
        }
        return CaMtlForMultiTask(CaMtlConfig(**{**settings, **options}))

    return make


@pytest.fixture
def make_trainer(
    make_model: Callable[..., CaMtlForMultiTask], data: dict[str, dict[str, Any]], tmp_path: Path
) -> Callable[..., CaMtlTrainer]:
    """A trainer on the tokenised rows; keyword arguments are training arguments but for those named here."""

    def make(
        folder: str = "run",
        *,
        model: Any = None,
        train: Any = None,
        held: Any = None,
        trainer: dict[str, Any] | None = None,
        **options: Any,
    ) -> CaMtlTrainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 6,
            "per_device_eval_batch_size": 8,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
        }
        return CaMtlTrainer(
            make_model() if model is None else model,
            CaMtlTrainingArguments(**{**settings, **options}),
            train_dataset=data["train"] if train is None else train,
            eval_dataset=data["eval"] if held is None else held,
            **(trainer or {}),
        )

    return make


@pytest.fixture
def losses() -> type:
    """A mixin-free recorder: wraps a trainer's ``training_step`` and keeps every loss and batch."""

    class Recorder:
        def __init__(self, trainer: CaMtlTrainer) -> None:
            self.values: list[float] = []
            self.inputs: list[dict[str, torch.Tensor]] = []
            step, compute = trainer.training_step, trainer.compute_loss

            def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
                loss = step(*args, **kwargs)
                self.values.append(loss.item())
                return loss

            def compute_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
                self.inputs.append({key: copy.deepcopy(value) for key, value in inputs.items()})
                return compute(model, inputs, **kwargs)

            trainer.training_step = training_step  # type: ignore[method-assign]
            trainer.compute_loss = compute_loss  # type: ignore[method-assign]

    return Recorder
