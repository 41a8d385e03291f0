"""``CaMtlTrainer``: Hugging Face's Trainer for batches of mixed tasks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, PredictionOutput, TrainOutput, speed_metrics

from camtl.data import MultiTaskDataset
from camtl.errors import UsageError
from camtl.models.packing import packs
from camtl.tasks import Task
from camtl.training import evaluation, history, loader, optimizer
from camtl.training.arguments import CaMtlTrainingArguments
from camtl.training.callbacks import EarlyStopping, RunCallback, TaskProgressCallback
from camtl.training.checkpointing import CheckpointingTrainer
from camtl.training.meter import TrainingMeter
from camtl.training.sampling import LossObserver, build_sampler
from camtl.training.uncertainty import UncertaintySelector

logger = logging.getLogger(__name__)


class CaMtlTrainer(CheckpointingTrainer):
    """Trains, evaluates and resumes a :class:`~camtl.models.CaMtlForMultiTask`.

    Args:
        model: the model; its config holds the tasks.
        args: the arguments of the run.
        train_dataset: ``{task: Dataset}``, raw (text columns) or tokenised by :func:`camtl.data.tokenize`.
            The tasks may be a part of the model's.
        eval_dataset: ``{task: Dataset}`` or ``{task: {split: Dataset}}``; a bare Dataset is the task's first
            evaluation split.
        processing_class: the tokenizer; needed for raw data, and saved beside the model.
        sampler: overrides ``args.sampler``: a name, a subclass of
            :class:`~camtl.data.MultiTaskBatchSampler`, or a function ``(sizes, epoch) -> weights``.
        **kwargs: as for :class:`transformers.Trainer` (``callbacks``, ``optimizers``, ...).

    With ``k`` accumulated micro-batches, or ``k`` ranks, the gradient is the mean of the ``k`` calls' losses.
    Raises :class:`~camtl.errors.UsageError` for data that does not fit the model or the arguments.
    """

    # The model's loss is a mean over tasks: the number of accumulated calls is all it is divided by.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: CaMtlTrainingArguments | None = None,
        train_dataset: Mapping[str, Any] | None = None,
        eval_dataset: Mapping[str, Any] | None = None,
        processing_class: Any = None,
        *,
        sampler: str | type | Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            raise UsageError("CaMtlTrainer needs a model: CaMtlForMultiTask.from_pretrained(...)")
        args = CaMtlTrainingArguments() if args is None else args
        if not isinstance(args, CaMtlTrainingArguments):
            raise UsageError(f"args must be CaMtlTrainingArguments, given {type(args).__name__}")
        if eval_dataset is None and args.eval_strategy != IntervalStrategy.NO:
            raise UsageError(
                f"eval_strategy is {IntervalStrategy(args.eval_strategy).value}, but there is no eval_dataset"
            )
        if args.n_gpu > 1:
            logger.warning("using one of %d GPUs; start with torchrun to use all of them", args.n_gpu)
            args._n_gpu = 1
        config: Any = model.config
        self.tasks: dict[str, Task] = {info["name"]: Task.from_config(info) for info in config.task_info}
        self.sampler = args.sampler if sampler is None else sampler
        self._tokenizer = processing_class
        self._max_seq_length = int(config.max_seq_length)
        mixed = None if train_dataset is None else self._training_data(config.task_info, train_dataset, args)
        parts = None if eval_dataset is None else self._parts(eval_dataset, "eval_dataset")
        self._eval_parts = parts or []
        if mixed is not None:
            evaluation.check_best_metric(args, self._eval_parts)
        super().__init__(
            model=model,
            args=args,
            train_dataset=mixed,
            eval_dataset=None if parts is None else {part.name: part.dataset for part in parts},
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        model.refresh_label_scale()  # type: ignore[operator]  # the statistics have just been entered
        if processing_class is not None:
            model.tokenizer = processing_class
        self._set_up_callbacks()
        self.meter = TrainingMeter(list(self.tasks), self.args.device, scores_candidates=False)
        self._selector: UncertaintySelector | None = None
        self._tokens_trained = self._tokens_scored = 0
        self._parameters_outside_embeddings: int | None = None
        self._has_warned = False

    def _training_data(
        self, task_info: list[dict[str, Any]], given: Mapping[str, Any], args: CaMtlTrainingArguments
    ) -> MultiTaskDataset:
        loader.check_tasks(given, self.tasks, "train_dataset")
        ordered = {
            name: loader.prepare_split(
                task, given[name], self._tokenizer, self._max_seq_length, what="train_dataset"
            )
            for name, task in self.tasks.items()
            if name in given
        }
        for name, dataset in ordered.items():
            if not loader.is_labelled(dataset):
                raise UsageError(
                    f"train_dataset: rows of task {name!r} have no label; remove them or label them"
                )
        loader.set_label_statistics(task_info, ordered, args.label_scale)
        self.train_tasks = list(ordered)
        self.train_fingerprints = {name: loader.fingerprint(rows) for name, rows in ordered.items()}
        return MultiTaskDataset(ordered)

    def _parts(
        self, given: Mapping[str, Any], what: str, unlabelled: bool = False
    ) -> list[evaluation.EvaluationPart]:
        return evaluation.evaluation_parts(
            given, self.tasks, self._tokenizer, self._max_seq_length, what=what, allow_unlabelled=unlabelled
        )

    def _set_up_callbacks(self) -> None:
        self._progress: TaskProgressCallback | None = None
        for default in (ProgressCallback, PrinterCallback):
            if self.pop_callback(default) is not None:
                self._progress = TaskProgressCallback(bars=None if default is ProgressCallback else False)
                self.add_callback(self._progress)
        self.add_callback(RunCallback(self))
        if self.args.early_stopping_patience is not None:
            self.add_callback(
                EarlyStopping(self.args.early_stopping_patience, self.args.early_stopping_threshold)
            )

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows: the tokenizer's, else the config's, else 0."""
        own = getattr(self.processing_class, "pad_token_id", None)
        return int(own if own is not None else (self.model.config.pad_token_id or 0))

    # -- loader
    def make_train_sampler(self) -> Any:
        """The stream of the run's batches, which knows the length of an epoch; becomes ``train_sampler``."""
        self.packed = packs(self.model.config, self.args.device)
        self.train_sampler = build_sampler(
            self.sampler, self.train_dataset, self._train_batch_size, self.data_seed, self.args, self.packed
        )
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """The loader of mixed batches; of candidates, if the sampler leaves the choice to the trainer."""
        info = self.model.config.task_info
        names = [entry["name"] for entry in info]
        sampler = self.make_train_sampler()
        self._selector = None
        if sampler.selects:
            self._selector = UncertaintySelector.from_arguments(
                self.args, info, self._train_batch_size, trained=self.train_tasks
            )
        ids = [names.index(name) for name in self.train_tasks]
        self._observer = LossObserver(sampler, self.args, self.accelerator, ids) if sampler.observes else None
        self.meter = TrainingMeter(names, self.args.device, sampler.selects)
        tokens = loader.collator(self.model, self.args, self.pad_token_id)
        collate = loader.BatchCollator(tokens, ids, tells_lengths=self.packed and sampler.selects)
        batches = loader.GlobalBatches(sampler)
        return self.accelerator.prepare(
            loader.make_loader(self.train_dataset, batches, collate, self.args, self.data_seed)
        )

    def begin_epoch(self) -> None:
        """Tell the sampler the epoch that the global step has reached."""
        if self._observer is not None:
            self._observer.flush()
        epoch = self.state.global_step // self.updates_per_epoch()
        self.train_sampler.set_epoch(epoch)
        if self._observer is not None:
            done = self.state.global_step - epoch * self.updates_per_epoch()
            self._observer.begin(done * self.args.gradient_accumulation_steps)

    # -- training
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a ``checkpoint-N`` folder, ``"auto"`` (the newest intact one of
                ``output_dir``, else a fresh start), True (the same, but there must be one); None takes
                ``args.resume_from_checkpoint``.
            trial, ignore_keys_for_eval: as in Hugging Face.

        Returns:
            Its metrics hold ``train_share_<task>`` and, with the uncertainty sampler, ``train_data_share``
            and ``train_scoring_time_share``. A checkpoint of a finished run is loaded and nothing is trained.
        """
        if self.train_dataset is None:
            raise UsageError("training needs a train_dataset: {task: Dataset}")
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = self._open_checkpoint(given)
        self._parameters_outside_embeddings = None
        try:
            if checkpoint is not None and self._is_finished(checkpoint):
                return self._load_finished(checkpoint)
            result = super().train(
                resume_from_checkpoint=checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )
            self._warn_if_diverged("training", result.training_loss)
            return result
        finally:
            self.is_in_train = False
            if self._progress is not None:
                self._progress.close()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One forward and backward pass; with candidates, first score them and keep the chosen rows."""
        inputs = self._prepare_inputs(inputs)
        seen = inputs["task_ids"].shape[0]
        self._tokens_scored = 0
        if self._selector is not None:
            self._tokens_scored = inputs["input_ids"].numel()
            with self.meter.scoring():
                inputs = self._selector.select(model, inputs)
        self._tokens_trained = inputs["input_ids"].numel()
        self.meter.rows(seen, inputs["task_ids"])
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss; its per-task losses are counted on the device."""
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            self.meter.losses(outputs["loss_per_task"], outputs["present"])
            if self._observer is not None:
                self._observer.add(outputs["loss_per_task"])
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter outside the embeddings and token trained on, 2 per token scored."""
        if self._parameters_outside_embeddings is None:
            counter = getattr(self.model, "num_parameters", None)
            self._parameters_outside_embeddings = counter(exclude_embeddings=True) if counter else 0
        return self._parameters_outside_embeddings * (6 * self._tokens_trained + 2 * self._tokens_scored)

    def selection_shares(self) -> dict[str, float]:
        """Share of each task in the rows trained on so far."""
        return self.meter.shares(self._sum_over_ranks)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add per-task losses (``loss_<task>``), the parts' learning rates and, at the end, the shares."""
        if "loss" in logs:
            logs.update(self.meter.interval(self._sum_over_ranks))
            rates = optimizer.learning_rates(self.optimizer)
            if len(set(rates.values())) > 1:
                logs.update({f"learning_rate_{part}": rate for part, rate in rates.items()})
        elif "train_runtime" in logs:
            logs.update(self.meter.totals(self._sum_over_ranks))
        super().log(logs, start_time)

    # -- optimizer
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over trainable parameters, in groups by part (learning rate) and weight decay."""
        made = self.optimizer is None
        target: nn.Module = self.model if model is None else model
        if made and not any(parameter.requires_grad for parameter in target.parameters()):
            raise UsageError("nothing to train: every parameter of the model is frozen")
        built = super().create_optimizer() if model is None else super().create_optimizer(model)
        if made:
            optimizer.split_groups(built, target, self.args)
        return built

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters under weight decay: the model says which are exempt."""
        return optimizer.decay_names(model)

    # -- evaluation
    def evaluation_model(self) -> nn.Module:
        """The model in evaluation mode, ready to be called."""
        wrapped = self.is_fsdp_enabled or self.is_deepspeed_enabled
        model: nn.Module = self.model_wrapped if wrapped else self.model
        if not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval):
            dtype = torch.bfloat16 if self.args.bf16_full_eval else torch.float16
            model = model.to(device=self.args.device, dtype=dtype)
        model.eval()
        leave_training = getattr(self.optimizer, "eval", None)  # of schedule-free optimizers
        if callable(leave_training):
            leave_training()
        return model

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Mapping[str, Any] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate all tasks on all their splits, with one ``on_evaluate``: early stopping sees the average.

        Returns:
            ``eval_<task>_<metric>``, ``eval_<task>_loss``, ``eval_average``, ``eval_task_sigma``,
            ``eval_loss``, ``eval_runtime``, ``eval_samples_per_second``, ``eval_steps_per_second`` and
            ``epoch``.
        """
        parts = self._eval_parts if eval_dataset is None else self._parts(eval_dataset, "eval_dataset")
        if not parts:
            raise UsageError("evaluation needs an eval_dataset: {task: Dataset}")
        begun = time.time()
        with self.meter.paused():
            metrics = evaluation.evaluate_parts(self, parts, metric_key_prefix)
        rows = sum(len(part.dataset) for part in parts)
        steps = evaluation.number_of_batches(self, parts)
        metrics.update(speed_metrics(metric_key_prefix, begun, num_samples=rows, num_steps=steps))
        self._warn_if_diverged("evaluation", metrics.get(f"{metric_key_prefix}_loss", 0.0))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _warn_if_diverged(self, what: str, loss: float) -> None:
        """Say once that a loss is no number: files then hold null, and scores mean nothing."""
        if not math.isfinite(loss) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the %s loss is %s: the training has diverged and the model is of no use; "
                "use a lower learning_rate or more warmup_steps",
                what, loss,
            )  # fmt: skip

    def predict(  # type: ignore[override]
        self,
        test_dataset: Mapping[str, Any],
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Predict ``{task: Dataset}`` or ``{task: {split: Dataset}}``; rows need no labels.

        Returns:
            ``predictions``: ``{name: logits [n, C]}`` with regression in the labels' own scale; of tasks that
            read tokens ``{name: [logits [tokens, C] of each sequence]}``. ``label_ids``: ``{name: labels}``
            where every row has one, ``metrics`` as of :meth:`evaluate`. ``name`` is the task, with the split
            behind it if it is not the first (``mnli_mismatched``).
        """
        parts = self._parts(test_dataset, "test_dataset", unlabelled=True)
        evaluation.check_judged(parts, "test_dataset")
        begun = time.time()
        predictions = evaluation.predict_parts(self, parts)
        info = self.model.config.task_info
        metrics = evaluation.score_parts(parts, predictions, info, metric_key_prefix)
        metrics.update(
            speed_metrics(metric_key_prefix, begun, num_samples=sum(len(part.dataset) for part in parts))
        )
        logits = {
            part.name: evaluation.in_label_scale(result)
            for part, result in zip(parts, predictions, strict=True)
        }
        labels = {
            part.name: evaluation.targets(result)
            for part, result in zip(parts, predictions, strict=True)
            if part.is_labelled
        }
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=logits, label_ids=labels, metrics=metrics)  # type: ignore[arg-type]

    def predict_task(self, task: str, dataset: Any) -> Any:
        """Logits of one task's rows as :meth:`predict` gives them (numpy, float32)."""
        (logits,) = self.predict({task: dataset}).predictions.values()  # type: ignore[union-attr]
        return logits

    def decode_task(self, task: str, dataset: Any) -> list[dict[str, Any]]:
        """The answers to one task's rows, one dict a row, in the task's own names and units."""
        (part,) = self._parts({task: dataset}, "dataset", unlabelled=True)
        (outputs,) = evaluation.predict_parts(self, [part])
        return part.task.task_type.decode(outputs, part.task)

    # -- reports
    def history(self) -> list[dict[str, float]]:
        """Rows of the learning curves, one per logged step; see :func:`camtl.training.history.curve_rows`."""
        return history.curve_rows(self.state.log_history)
