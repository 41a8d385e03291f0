"""Evaluation of all tasks on all their splits at once: one result, one ``on_evaluate``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.trainer_utils import SaveStrategy

from camtl.data import MultiTaskDataset, is_tokenised, prepare_dataset
from camtl.errors import UsageError
from camtl.tasks.metrics import average, result_name
from camtl.tasks.types.base import IGNORED, Outputs
from camtl.training.loader import (
    BatchCollator,
    check_tasks,
    collator,
    is_labelled,
    label_scaling,
    make_loader,
    prepare_split,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from camtl.tasks import Task
    from camtl.training.arguments import CaMtlTrainingArguments
    from camtl.training.trainer import CaMtlTrainer


_TARGETS = ("labels", "token_labels")
#: Of a tokenised data set, what decoding and metrics read.
_READ = ("labels", "row", "token_marks", "token_labels", "token_begin", "token_end")


@dataclass(frozen=True)
class EvaluationPart:
    """One split of one task, tokenised. ``name`` is the middle of its result keys (``mnli_mismatched``);
    ``rows`` are the rows themselves, None if only tokenised ones were given.
    """

    name: str
    task: Task
    split: str
    dataset: Dataset
    rows: Dataset | None = None

    @property
    def is_labelled(self) -> bool:
        """Whether every row has a label. (Where tokens are classified or chosen, only the rows can tell: a
        sequence without a target may be a window that does not hold the answer.)
        """
        column = self.task.label_column
        if self.rows is not None and column in self.rows.column_names:
            tables = self.rows.with_format("arrow").iter(1000)
            if any(table.column(column).null_count for table in tables):
                return False
        return is_labelled(self.dataset)


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
            if not allow_unlabelled and not is_labelled(tokenised):
                raise UsageError(
                    f"{what}: rows of task {name!r} ({split}) have no label; remove them or label them"
                )
            rows = None if is_tokenised(dataset) else prepare_dataset(task, dataset, allow_unlabelled)
            parts.append(EvaluationPart(result_name(name, split), task, split, tokenised, rows))
    if not allow_unlabelled:
        check_judged(parts, what)
    return parts


def check_judged(parts: Sequence[EvaluationPart], what: str) -> None:
    """Raise :class:`UsageError` if a part has labels, but not the rows by which its type is judged."""
    for part in parts:
        if part.task.task_type.judged_by_rows and part.rows is None and part.is_labelled:
            raise UsageError(
                f"{what}: rows of task {part.task.name!r} ({part.split}) are tokenised, and a "
                f"{part.task.type} task is judged by its rows; pass them as they were before "
                f"(columns {', '.join((*part.task.task_type.columns(part.task), part.task.label_column))})"
            )


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
    predictions: Sequence[Outputs],
    task_info: Sequence[Mapping[str, Any]],
    prefix: str,
) -> dict[str, float]:
    """Metrics of predictions; see :func:`evaluate_parts`. Parts without labels give none."""
    results: dict[str, float] = {}
    scores: dict[str, dict[str, dict[str, float]]] = {}
    losses: dict[str, list[float]] = {}
    for part, outputs in zip(parts, predictions, strict=True):
        if not part.is_labelled:
            continue
        info = next(info for info in task_info if info["name"] == part.task.name)
        metrics = part.task.task_type.compute_metrics(outputs, part.task)
        loss = mean_loss(outputs, info)
        scores.setdefault(part.task.name, {})[part.split] = metrics
        losses.setdefault(part.task.name, []).append(loss)
        results |= {f"{prefix}_{part.name}_{metric}": value for metric, value in metrics.items()}
        results[f"{prefix}_{part.name}_loss"] = loss
    if scores:
        results[f"{prefix}_average"], results[f"{prefix}_task_sigma"] = average(scores)
        results[f"{prefix}_loss"] = float(np.mean([np.mean(values) for values in losses.values()]))
    return results


def in_label_scale(outputs: Outputs) -> Any:
    """What the model says, in the labels' own scale: logits [n, C], those of a standardised regression scaled
    back; of tasks that read tokens a list of arrays [tokens, C].
    """
    if outputs.logits is None:
        return list(outputs.token_logits or ())
    return (outputs.logits * outputs.deviation + outputs.mean).astype(outputs.logits.dtype)


def targets(outputs: Outputs) -> Any:
    """The labels of sequences: an array [n] (multi-label: [n, C]), or a list of arrays [tokens]."""
    if outputs.logits is None:
        return [np.asarray(labels) for labels in outputs.sequences["token_labels"]]
    return np.asarray(outputs.sequences["labels"], dtype=np.float64)


def mean_loss(outputs: Outputs, info: Mapping[str, Any]) -> float:
    """Mean loss over all sequences (not over batches; tagging: over all words), in the scale the task is
    trained in. NaN where no sequence has a target.
    """
    reads = info.get("reads", "pooled")
    if reads in ("tokens", "positions"):
        return _token_loss(outputs, reads, int(info["num_labels"]))
    labels = torch.from_numpy(np.asarray(outputs.sequences["labels"], dtype=np.float64))
    logits = torch.from_numpy(outputs.logits).double()
    if info["loss"] == "mse":
        return float(F.mse_loss(logits[:, 0], (labels - outputs.mean) / outputs.deviation))
    if info["loss"] == "bce":
        return float(F.binary_cross_entropy_with_logits(logits, labels))
    return float(F.cross_entropy(logits, labels.long()))


def _token_loss(outputs: Outputs, reads: str, size: int) -> float:
    """Cross entropy of tokens (a class a token) or of positions (a token an output)."""
    terms: list[torch.Tensor] = []
    columns = outputs.sequences
    for values, marks, labels in zip(
        outputs.token_logits or (), columns["token_marks"], columns["token_labels"], strict=True
    ):
        logits, target = torch.from_numpy(values[:, :size]).double(), torch.as_tensor(labels)
        if reads == "tokens":
            kept = target != IGNORED
            terms.append(F.cross_entropy(logits[kept], target[kept], reduction="none"))
            continue
        own = torch.as_tensor(marks) != 0
        found = torch.log_softmax(logits[own], 0)
        for output in range(size):
            right = (target[own] >> output) & 1 == 1
            if right.any():
                terms.append(-torch.logsumexp(found[right, output], 0)[None])
    return float(torch.cat(terms).mean()) if terms else float("nan")


def predict_parts(trainer: CaMtlTrainer, parts: Sequence[EvaluationPart]) -> list[Outputs]:
    """What the model says of all parts, under one progress bar, gathered over all ranks.

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
) -> Outputs:
    info = trainer.model.config.task_info[list(trainer.tasks).index(part.task.name)]
    size = part.task.num_labels
    by_token = info.get("reads") in ("tokens", "positions")
    pooled: list[torch.Tensor] = []
    tokens: list[np.ndarray] = []
    lengths = np.asarray(part.dataset.with_format("numpy")["length"])
    for batch, rows in zip(loader, batches, strict=True):
        inputs = trainer._prepare_inputs({key: value for key, value in batch.items() if key not in _TARGETS})
        with trainer.accelerator.autocast():
            result = model(**inputs)
        if by_token:
            values = result["token_logits"][:, :, :size].float().cpu().numpy()
            tokens += [own[: lengths[row]] for own, row in zip(values, rows, strict=True)]
        else:
            pooled.append(result["logits"][:, :size].float())
        trainer.control = trainer.callback_handler.on_prediction_step(
            trainer.args, trainer.state, trainer.control
        )
    numbers = [row for batch in batches for row in batch]
    mean, deviation = label_scaling(info)
    columns = [name for name in _READ if name in part.dataset.column_names]
    rows_given = None if part.rows is None else {name: part.rows[name][:] for name in part.rows.column_names}
    outputs = Outputs(
        {name: part.dataset[name][:] for name in columns}, rows=rows_given, mean=mean, deviation=deviation
    )
    if by_token:
        return replace(outputs, token_logits=_gathered_tokens(trainer, tokens, numbers, len(part.dataset)))
    own = torch.cat(pooled) if pooled else torch.zeros(0, size, device=trainer.args.device)
    return replace(
        outputs, logits=_gathered(trainer, own, torch.tensor(numbers, dtype=torch.int64), len(part.dataset))
    )


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


def _gathered_tokens(
    trainer: CaMtlTrainer, values: list[np.ndarray], rows: list[int], total: int
) -> list[np.ndarray]:
    """Arrays [tokens, outputs] of all ranks in the order of the data set."""
    pairs = list(zip(rows, values, strict=True))
    if trainer.args.world_size > 1:
        from accelerate.utils import gather_object

        pairs = gather_object(pairs)
    found = dict(pairs)
    return [found[row] for row in range(total)]
