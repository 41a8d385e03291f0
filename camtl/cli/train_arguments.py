"""What ``camtl train`` can be told, beside the training arguments: the model, and the tasks and their data.

This file imports nothing heavy: ``camtl train --help`` is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PACKED = ("auto", "true", "false")
#: The names in camtl.tasks.GROUPS.
GROUP_NAMES = ("glue", "superglue", "mrqa", "paper24", "paper26", "demo")
PRESETS = ("ca-mtl", "ca-mtl-base", "ca-mtl-large")


def _option(help_text: str, *, default: Any = None, metavar: str = "", choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "metavar": metavar, "choices": choices})


@dataclass
class ModelArguments:
    """The encoder and the model's switches. A switch left at None takes the preset's value."""

    model_name_or_path: str | None = _option(
        "encoder to start from: minilm, a folder, or a Hugging Face name such as bert-base-uncased or "
        "roberta-base (BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT)",
        metavar="NAME",
    )
    preset: str | None = _option(
        "ca-mtl fits any encoder and starts out exactly as plain BERT; the other two are the released code's "
        "models (default: ca-mtl)",
        choices=PRESETS,
    )
    max_seq_length: int | None = _option(
        "longest text in tokens; longer ones are cut (default: 128)", metavar="N"
    )
    freeze: str | None = _option(
        "keep BERT's weights of these layers and the embeddings fixed: a-b (0-5), half, or none",
        metavar="LAYERS",
    )
    backend: str | None = _option(
        "implementation of the ops; see camtl info (default: the fastest that runs)", metavar="NAME"
    )
    packed: str | None = _option(
        "true: batches without padding; false: padded ones; auto: without, on CPUs and where a GPU has "
        "kernels for it (default: auto)",
        choices=PACKED,
    )


@dataclass
class SwitchArguments:
    """Single switches of the model, over the preset's."""

    attention_bias: str | None = _option(
        "conditional bias inside attention", choices=("block_diagonal", "full", "none")
    )
    attention_bias_layers: str | None = _option("layers that have it", choices=("all", "upper"))
    attention_bias_init: str | None = _option("its start", choices=("zeros", "normal"))
    attention_film: str | None = _option(
        "modulated by column (w values) or by entry (w*w values)", choices=("column", "entry")
    )
    block_width: int | None = _option("rows of one attention block (default: from sizes)", metavar="W")
    alignment: str | None = _option("conditioning of the embeddings", choices=("film", "matrix", "none"))
    norm_condition: str | None = _option(
        "what the task changes in layer norms", choices=("weight", "weight_and_bias", "none")
    )
    bottleneck: str | None = _option("conditional bottleneck", choices=("top", "all", "none"))
    bottleneck_activation: str | None = _option("inside the bottleneck", choices=("none", "gelu"))
    bottleneck_output: str | None = _option("how it joins the encoder", choices=("path", "residual"))
    top_layer_init: str | None = _option("start of the last layer", choices=("random", "pretrained"))
    generator_init: str | None = _option("start of the generators", choices=("normal", "zeros"))
    freeze_conditional: str | None = _option(
        "conditional parameters inside frozen layers", choices=("reference", "train")
    )


@dataclass
class DataArguments:
    """The tasks and where their rows come from."""

    tasks: list[str] | None = _option(  # noqa: RUF009 - it is a dataclasses.field
        f"built-in tasks by name, separated by commas, or groups: {', '.join(GROUP_NAMES)} (see camtl tasks "
        "list)",
        metavar="a,b,c",
    )
    tasks_file: str | None = _option("YAML file that describes tasks of your own", metavar="FILE")
    data_dir: str | None = _option(
        "folder with <task>/{train,validation}.{jsonl,jsonl.gz,csv,tsv,parquet} "
        "(default: the Hugging Face hub)",
        metavar="DIR",
    )
    train_file: str | None = _option("train one task of your own from this file instead", metavar="FILE")
    validation_file: str | None = _option("its validation rows", metavar="FILE")
    text_column: list[str] | None = _option(  # noqa: RUF009 - it is a dataclasses.field
        "its text column, or two for text pairs", metavar="NAME [NAME]"
    )
    label_column: str | None = _option("its label column (default: label)", metavar="NAME")
    task_name: str | None = _option("its name (default: the train file's name)", metavar="NAME")
    task_type: str | None = _option(
        "its type, if it needs no options, such as multi_label, tagging or span (default: regression if "
        "labels have decimals, else classification)",
        metavar="TYPE",
    )
    max_train_samples: int | None = _option(
        "use a random N of the training rows of each task (if it has more)", metavar="N"
    )
    max_eval_samples: int | None = _option(
        "use a random N of the validation rows of each task (if it has more)", metavar="N"
    )


# The training arguments that people need, as (name, metavar, help), by group. Every other field of
# CaMtlTrainingArguments is shown by --help-all.
COMMON_TRAINING: dict[str, tuple[tuple[str, str, str], ...]] = {
    "run": (
        ("output_dir", "DIR", "where everything goes (default: runs/<tasks>)"),
        ("num_train_epochs", "N", "passes over all training rows (default: 3)"),
        ("max_steps", "N", "stop after N steps instead"),
        ("seed", "N", "of weights, order and dropout (default: 42)"),
        (
            "resume_from_checkpoint",
            "WHAT",
            "auto (the newest intact checkpoint in output_dir, if any) or a folder",
        ),
        ("use_cpu", "", "do not use a GPU"),
    ),
    "optimisation": (
        ("learning_rate", "LR", "peak learning rate (default: 5e-5)"),
        (
            "conditional_learning_rate",
            "LR",
            "of the parameters plain BERT does not have (default: learning_rate)",
        ),
        ("head_learning_rate", "LR", "of the task heads (default: learning_rate)"),
        ("per_device_train_batch_size", "N", "rows in a step (default: 32)"),
        ("per_device_eval_batch_size", "N", "rows in an evaluation batch (default: 64)"),
        ("max_tokens_per_batch", "N", "tokens of a batch at most; then it may have fewer rows"),
        (
            "train_sampling_strategy",
            "NAME",
            "group_by_length: rows of similar length together, packed batches of even size (default: random)",
        ),
        ("gradient_accumulation_steps", "N", "steps whose gradients make one update (default: 1)"),
        ("warmup_steps", "N", "warm-up steps; below 1 a share of all steps (default: 0.06)"),
        ("weight_decay", "W", "decoupled weight decay (default: 0.01)"),
        ("max_grad_norm", "G", "clip the gradient's norm (default: 1.0)"),
        ("lr_scheduler_type", "NAME", "linear, cosine, constant, ... (default: linear)"),
        ("bf16", "", "compute in bfloat16 (faster on recent CPUs and GPUs)"),
        ("gradient_checkpointing", "", "less memory, more time"),
    ),
    "mixing the tasks": (
        (
            "sampler",
            "NAME",
            "proportional, sqrt, temperature, annealed, uniform, round_robin, loss, or uncertainty: train on "
            "those candidates that the model is least sure of (default: proportional)",
        ),
        ("sampler_options", "JSON", "of the sampler, for example '{\"temperature\": 5}'"),
        ("score", "NAME", "uncertainty: paper or reference (default: paper)"),
        ("candidates_per_task", "N", "uncertainty: rows of each task scored in a step (default: batch size)"),
        ("score_dropout", "", "uncertainty: score with dropout on"),
        ("min_share", "SHARE", "uncertainty: smallest share of a batch that every task gets (default: 0)"),
    ),
    "evaluation, logs and checkpoints": (
        (
            "eval_strategy",
            "WHEN",
            "evaluations during training: epoch, steps or no; one at the end is always made (default: epoch)",
        ),
        ("eval_steps", "N", "evaluate every N steps; below 1 a share of all steps"),
        ("save_strategy", "WHEN", "checkpoints: epoch, steps or no (default: with the evaluations)"),
        ("save_steps", "N", "write a checkpoint every N steps"),
        ("save_total_limit", "N", "checkpoints to keep (default: 2)"),
        ("load_best_model_at_end", "", "end with the checkpoint that had the best average"),
        ("early_stopping_patience", "N", "stop after N evaluations without a better average"),
        ("logging_steps", "N", "log every N steps; below 1 a share of all steps (default: 0.025)"),
        ("report_to", "NAME", "tensorboard, wandb, ... (default: none)"),
    ),
}

# What differs from transformers' own defaults when a flag is not given.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "eval_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 0.025,
    "report_to": "none",
    "seed": 42,
    # Bars where a terminal is, lines elsewhere; transformers would turn both off with its own log level.
    "disable_tqdm": False,
}


def training_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Complete the given training arguments with camtl's defaults.

    ``eval_steps`` or ``save_steps`` alone mean the strategy ``steps``; checkpoints follow the evaluations
    unless they are told otherwise.
    """
    values = {**TRAINING_DEFAULTS, **given}
    if "eval_steps" in given and "eval_strategy" not in given:
        values["eval_strategy"] = "steps"
    if values["eval_strategy"] == "steps":
        values.setdefault("eval_steps", 0.1)
    if "save_strategy" not in given:
        if "save_steps" in given or values["eval_strategy"] == "steps":
            values["save_strategy"] = "steps"
            values.setdefault("save_steps", values.get("eval_steps", 500))
        else:
            values["save_strategy"] = "epoch"
    return values
