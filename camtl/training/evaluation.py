"""Evaluation of all tasks on all their splits at once: one result, one ``on_evaluate``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.trainer_utils import SaveStrategy

from camtl.data import MultiTaskDataset
from camtl.errors import UsageError
from camtl.tasks.metrics import average, result_name
from camtl.training.loader import (
    BatchCollator,
    check_tasks,
    collator,
    label_scaling,
    labels_of,
    make_loader,
    prepare_split,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from camtl.tasks import Task
    from camtl.training.arguments import CaMtlTrainingArguments
    from camtl.training.trainer import CaMtlTrainer


@dataclass(frozen=True)
class EvaluationPart:
    """One split of one task, tokenised. ``name`` is the middle of its result keys (``mnli_mismatched``)."""

    name: str
    task: Task
    split: str
    dataset: Dataset


@dataclass(frozen=True)
class PartPrediction:
    """What the model says of one part, row by row as in the data set.

    ``logits`` [n, outputs of the task] as the model gives them; ``labels`` [n] in their own scale, None if
    any row lacks one.
    """

    logits: np.ndarray
    labels: np.ndarray | None


def evaluation_parts(
    given: Mapping[str, Any],
    tasks: Mapping[str, Task],
    tokenizer: Any,
    max_seq_length: int,
    *,
    what: str = "eval_dataset",
    allow_unlabelled: bool = False,
) -> list[EvaluationPart]:
    """Tokenised parts of ``{task: Dataset}`` or ``{task: {split: Dataset}}``, tasks in the model's order.

    A bare Dataset is the task's first evaluation split.
    """
    check_tasks(given, tasks, what)
    parts = []
    for name, task in tasks.items():
        if name not in given:
            continue
        value = given[name]
        splits = value if isinstance(value, Mapping) else {task.eval_splits[0]: value}
        if not splits:
            raise UsageError(f"{what}: task {name!r} has no split")
        for split, dataset in splits.items():
            tokenised = prepare_split(
                task,
                dataset,
                tokenizer,
                max_seq_length,
                what=f"{what} {split}",
                allow_unlabelled=allow_unlabelled,
            )
            if not allow_unlabelled and labels_of(tokenised) is None:
                raise UsageError(
                    f"{what}: rows of task {name!r} ({split}) have no label; remove them or label them"
                )
            parts.append(EvaluationPart(result_name(name, split), task, split, tokenised))
    return parts


def check_best_metric(args: CaMtlTrainingArguments, parts: Sequence[EvaluationPart]) -> None:
    """Raise :class:`UsageError` if the run needs a ``metric_for_best_model`` that no evaluation produces."""
    needed = args.load_best_model_at_end or args.early_stopping_patience is not None
    if not needed and args.save_strategy != SaveStrategy.BEST:
        return
    names = [f"{part.name}_{key}" for part in parts for key in (*part.task.metrics, "loss")]
    known = [f"eval_{name}" for name in ("average", "task_sigma", "loss", *names)]
    metric = str(args.metric_for_best_model)
    if f"eval_{metric.removeprefix('eval_')}" not in known:
        raise UsageError(
            f"metric_for_best_model is {metric!r}, which no evaluation of this run has; "
            f"accepted: {', '.join(known)}"
        )


def evaluate_parts(trainer: CaMtlTrainer, parts: Sequence[EvaluationPart], prefix: str) -> dict[str, float]:
    """Predict and score ``parts``; the keys are those of a result file.

    ``<prefix>_<part>_<metric>`` and ``<prefix>_<part>_loss`` for each part, ``<prefix>_average`` and
    ``<prefix>_task_sigma`` over tasks, and ``<prefix>_loss``: the mean over tasks of each task's mean loss (a
    task with two splits counts their mean), the same weighting as in training.
    """
    return score_parts(parts, predict_parts(trainer, parts), trainer.model.config.task_info, prefix)


def score_parts(
    parts: Sequence[EvaluationPart],
    predictions: Sequence[PartPrediction],
    task_info: Sequence[Mapping[str, Any]],
    prefix: str,
) -> dict[str, float]:
    """Metrics of predictions; see :func:`evaluate_parts`. Parts without labels give none."""
    results: dict[str, float] = {}
    scores: dict[str, dict[str, dict[str, float]]] = {}
    losses: dict[str, list[float]] = {}
    for part, prediction in zip(parts, predictions, strict=True):
        if prediction.labels is None:
            continue
        info = next(info for info in task_info if info["name"] == part.task.name)
        scaled = in_label_scale(prediction.logits, info)
        metrics = part.task.task_type.compute_metrics(scaled, prediction.labels, part.task)
        loss = mean_loss(prediction, info)
        scores.setdefault(part.task.name, {})[part.split] = metrics
        losses.setdefault(part.task.name, []).append(loss)
        results |= {f"{prefix}_{part.name}_{metric}": value for metric, value in metrics.items()}
        results[f"{prefix}_{part.name}_loss"] = loss
    if scores:
        results[f"{prefix}_average"], results[f"{prefix}_task_sigma"] = average(scores)
        results[f"{prefix}_loss"] = float(np.mean([np.mean(values) for values in losses.values()]))
    return results


def in_label_scale(logits: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    """Logits [n, C] in the labels' own scale: predictions of a standardised regression scaled back."""
    if info["loss"] != "mse":
        return logits
    mean, deviation = label_scaling(info)
    return (logits * deviation + mean).astype(logits.dtype)


def mean_loss(prediction: PartPrediction, info: Mapping[str, Any]) -> float:
    """Mean loss over all rows (not over batches), in the scale the task is trained in."""
    if prediction.labels is None:
        raise ValueError("a loss needs labels")
    logits, labels = torch.from_numpy(prediction.logits).double(), torch.from_numpy(prediction.labels)
    if info["loss"] == "mse":
        mean, deviation = label_scaling(info)
        return float(F.mse_loss(logits[:, 0], (labels - mean) / deviation))
    if info["loss"] == "bce":
        return float(F.binary_cross_entropy_with_logits(logits, labels))
    return float(F.cross_entropy(logits, labels.long()))


def predict_parts(trainer: CaMtlTrainer, parts: Sequence[EvaluationPart]) -> list[PartPrediction]:
    """Logits of all parts, under one progress bar, gathered over all ranks.

    Rows of a part are batched by length and put back in order, so padding is small and the result does not
    depend on which other tasks are evaluated along.
    """
    model = trainer.evaluation_model()
    loaders = [_loader(trainer, part) for part in parts]
    trainer.callback_handler.eval_dataloader = _Length(sum(len(loader) for loader, _ in loaders))
    return [
        _predict(trainer, model, part, loader, rows)
        for part, (loader, rows) in zip(parts, loaders, strict=True)
    ]


def number_of_batches(trainer: CaMtlTrainer, parts: Sequence[EvaluationPart]) -> int:
    """Steps of an evaluation: batches over all ranks together at a time."""
    rows = trainer.args.per_device_eval_batch_size * trainer.args.world_size
    return sum(math.ceil(len(part.dataset) / rows) for part in parts)


class _Length:
    """Stands for all loaders of an evaluation where a callback asks how long it is."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _loader(trainer: CaMtlTrainer, part: EvaluationPart) -> tuple[Any, list[list[int]]]:
    """This rank's loader of a part, and the row numbers of its batches."""
    args = trainer.args
    size = args.per_device_eval_batch_size
    lengths = np.asarray(part.dataset.with_format("numpy")["length"])
    order = np.argsort(-lengths, kind="stable").tolist()
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    batches = batches[args.process_index :: args.world_size]
    tokens = collator(trainer.model, args, trainer.pad_token_id)
    collate = BatchCollator(tokens, [list(trainer.tasks).index(part.task.name)])
    return make_loader(
        MultiTaskDataset({part.task.name: part.dataset}), batches, collate, args, seed=0
    ), batches


@torch.no_grad()
def _predict(
    trainer: CaMtlTrainer, model: torch.nn.Module, part: EvaluationPart, loader: Any, batches: list[list[int]]
) -> PartPrediction:
    outputs = part.task.num_labels
    parts: list[torch.Tensor] = []
    for batch in loader:
        inputs = trainer._prepare_inputs({key: value for key, value in batch.items() if key != "labels"})
        with trainer.accelerator.autocast():
            logits = model(**inputs)["logits"]
        parts.append(logits[:, :outputs].float())
        trainer.control = trainer.callback_handler.on_prediction_step(
            trainer.args, trainer.state, trainer.control
        )
    rows = torch.tensor([row for batch in batches for row in batch], dtype=torch.int64)
    own = torch.cat(parts) if parts else torch.zeros(0, outputs, device=trainer.args.device)
    return PartPrediction(_gathered(trainer, own, rows, len(part.dataset)), labels_of(part.dataset))


def _gathered(trainer: CaMtlTrainer, logits: torch.Tensor, rows: torch.Tensor, total: int) -> np.ndarray:
    """Rows of all ranks in the order of the data set, [total, outputs]; each row once."""
    if trainer.args.world_size > 1:
        device = trainer.args.device
        logits = trainer.accelerator.pad_across_processes(logits, dim=0)
        rows = trainer.accelerator.pad_across_processes(rows.to(device), dim=0, pad_index=-1)
        logits, rows = trainer.accelerator.gather(logits), trainer.accelerator.gather(rows)
        logits, rows = logits[rows >= 0], rows[rows >= 0].cpu()
    result = np.empty((total, logits.shape[1]), dtype=np.float32)
    result[rows.numpy()] = logits.cpu().numpy()
    return result
