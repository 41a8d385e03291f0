"""Arguments of a training run: every Hugging Face argument by its own name, and those that camtl adds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from camtl.errors import UsageError

BORROW_PREFIX = "borrow:"
#: Settings that decide which candidates are trained on; and all that mean something only with candidates.
SELECTION_SETTINGS = ("score", "candidates_per_task", "score_dropout", "regression_places", "min_share")
UNCERTAINTY_ONLY = (*SELECTION_SETTINGS, "score_batch_size")
# Reporters whose package transformers looks for only when it makes the callback.
_UNLISTED_REPORTERS = {"azure_ml", "flyte"}


@dataclass(repr=False)  # the parent's repr hides tokens
class CaMtlTrainingArguments(TrainingArguments):
    """Arguments of :class:`~camtl.training.CaMtlTrainer`.

    All fields of :class:`transformers.TrainingArguments` keep their names and meaning. Four defaults differ:
    ``metric_for_best_model`` is ``eval_average`` (greater is better), ``logging_steps`` is 20, and
    ``logging_nan_inf_filter`` and ``remove_unused_columns`` are off (the first would cost one host sync a
    step and hide a broken loss; the second has no use here).

    ``per_device_train_batch_size`` is the number of rows that make one forward and backward pass on a device,
    whatever the sampler: with ``sampler="uncertainty"`` it is the number of selected rows, out of
    ``candidates_per_task`` rows of every task.

    Raises:
        UsageError: a value outside what is accepted, or arguments that contradict each other.
    """

    logging_steps: float = field(
        default=20, metadata={"help": "Log every so many steps; a number below 1 is a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide nan and inf losses from the logs (one host sync a step)."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Unused: camtl's batches hold only what the model takes."}
    )
    sampler: str = field(
        default="proportional",
        metadata={
            "help": "How rows of the tasks are mixed: proportional, sqrt, temperature, annealed, uniform, "
            "round_robin, loss, or uncertainty (train on the candidates the model is least sure of)."
        },
    )
    sampler_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'More options of the sampler, as JSON, for example {"temperature": 5}.'},
    )
    score: Literal["paper", "reference"] = field(
        default="paper",
        metadata={"help": "Uncertainty score: the entropy, or the released code's entropy times task mean."},
    )
    candidates_per_task: int | None = field(
        default=None,
        metadata={"help": "Rows of each task scored in a step (uncertainty). Default: the batch size."},
    )
    score_dropout: bool = field(
        default=False, metadata={"help": "Score candidates with dropout on, as the released code does."}
    )
    score_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows in one scoring pass. Default: all candidates of a step at once."},
    )
    regression_places: str = field(
        default="reserve",
        metadata={
            "help": "Places of tasks without an entropy in an uncertainty batch: reserve (an equal share "
            "each) or borrow:TASK (they take TASK's scores by position, as the released code does)."
        },
    )
    min_share: float = field(
        default=0.0,
        metadata={
            "help": "Smallest share of an uncertainty batch that every task gets, in whole rows, "
            "rounded up (0 to 1 / tasks)."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a batch at most (with padding, where batches are padded); "
            "per_device_train_batch_size then is the most rows it may have."
        },
    )
    label_scale: Literal["standard", "raw"] = field(
        default="standard",
        metadata={"help": "Regression labels: standardised by the training part, or as they are."},
    )
    epoch_mode: Literal["rows", "reference"] = field(
        default="rows",
        metadata={
            "help": "Length of an epoch: all training rows over the batch size, or the released formula."
        },
    )
    percent_of_max_data_size: float = field(
        default=1.0, metadata={"help": "Factor of the released epoch formula (epoch_mode reference)."}
    )
    uniform_mt_sampling: bool = field(
        default=False,
        metadata={"help": "The released epoch formula's uniform variant (epoch_mode reference)."},
    )
    conditional_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the parameters plain BERT does not have. Default: learning_rate."
        },
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the task heads. Default: learning_rate."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better metric_for_best_model."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better an evaluation must be to count (early stopping)."}
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - declared by the parent
        *TrainingArguments._VALID_DICT_FIELDS,
        "sampler_options",
    ]

    def __post_init__(self) -> None:
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_average"
        self._read_sampler_options()
        if self.accelerator_config is None and self.dataloader_pin_memory and torch.cuda.is_available():
            self.accelerator_config = {"non_blocking": True}  # copies to a GPU beside its work
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # bfloat16 autocast works on the CPU too, but the parent wants to be told
        try:
            super().__post_init__()
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from error
        self._check_choices()
        self._check_numbers()
        self._check_reporters()
        if self.early_stopping_patience is not None and self.eval_strategy == IntervalStrategy.NO:
            raise UsageError(
                "early_stopping_patience needs evaluations during training: "
                "give eval_strategy steps (with eval_steps) or epoch"
            )

    def _read_sampler_options(self) -> None:
        options = self.sampler_options
        if isinstance(options, str):
            try:
                options = json.loads(options)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"sampler_options is {options!r}, which is not JSON ({error.msg} at column "
                    f'{error.colno}); give an object such as {{"temperature": 5}}'
                ) from None
        if options is not None and not isinstance(options, dict):
            raise UsageError(
                f'sampler_options is {options!r}; give a JSON object such as {{"temperature": 5}}'
            )
        self.sampler_options = options

    def _check_reporters(self) -> None:
        from transformers.integrations.integration_utils import (
            INTEGRATION_TO_CALLBACK,
            get_available_reporting_integrations,
        )

        installed = get_available_reporting_integrations()
        for name in self.report_to or ():
            if name not in INTEGRATION_TO_CALLBACK:
                raise UsageError(
                    f"report_to: {name!r} is unknown; accepted: none, all, "
                    f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
                )
            if name not in installed and name not in _UNLISTED_REPORTERS:
                raise UsageError(
                    f"report_to: the package of {name!r} is not installed; install it, or leave report_to "
                    f"out (installed: {', '.join(installed) or 'none'})"
                )

    @property
    def groups_by_length(self) -> bool:
        """Whether rows change places among some batches so that their lengths suit."""
        return bool(getattr(self, "train_sampling_strategy", "random") == "group_by_length")

    def _check_choices(self) -> None:
        for name, accepted in (
            ("score", ("paper", "reference")),
            ("label_scale", ("standard", "raw")),
            ("epoch_mode", ("rows", "reference")),
        ):
            value = getattr(self, name)
            if value not in accepted:
                raise UsageError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
        strategy = getattr(self, "train_sampling_strategy", "random")
        if strategy not in ("random", "group_by_length"):
            raise UsageError(
                f"train_sampling_strategy is {str(strategy)!r}; accepted: random (as the sampler has it), "
                "group_by_length"
            )
        places = self.regression_places
        if places != "reserve" and (not places.startswith(BORROW_PREFIX) or places == BORROW_PREFIX):
            raise UsageError(f"regression_places is {places!r}; accepted: reserve, borrow:TASK")

    def _check_numbers(self) -> None:
        for name in (
            "candidates_per_task",
            "score_batch_size",
            "early_stopping_patience",
            "max_tokens_per_batch",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        for name in ("learning_rate", "conditional_learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} is {value}; it must not be negative")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.label_smoothing_factor:
            raise UsageError(
                "label_smoothing_factor is not supported: the model computes every task's loss itself"
            )
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} is {value}; it must be at least 0")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise UsageError(
                f"num_train_epochs is {self.num_train_epochs}; it must be above 0 (or give max_steps)"
            )
        if not 0.0 <= self.min_share <= 1.0:
            raise UsageError(f"min_share is {self.min_share}; it must lie between 0 and 1")
        if self.percent_of_max_data_size <= 0:
            raise UsageError(
                f"percent_of_max_data_size is {self.percent_of_max_data_size}; it must be above 0"
            )


def field_default(name: str) -> Any:
    """The default of an argument."""
    return next(entry.default for entry in fields(CaMtlTrainingArguments) if entry.name == name)
