"""The ``README.md`` of a trained model: front matter for the hub, measured scores, how to load and use."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl._io import atomic_write
from camtl._version import __version__
from camtl.reports.tables import Results, metric_title, results_cells

if TYPE_CHECKING:
    from camtl.models.families import Family
    from camtl.tasks import Task


@dataclass(frozen=True)
class ModelCard:
    """Everything that the card says. Nothing in it is made up: a number is measured or it is left out.

    Args:
        name: of the model (its folder).
        base_model: what ``--model_name_or_path`` was, as a hub id where there is one.
        encoder: one line on the encoder ("6 layers, hidden 384, random" ...).
        tasks: the tasks of the run.
        config: ``CaMtlConfig.to_dict()``; its switches are listed.
        results: of the final evaluation.
        counts: ``model.parameter_counts()``.
        hyper_parameters: name to value, listed as given.
        train_rows: training rows per task.
        training: measured facts of the run (steps, seconds, ...), listed as given.
        command: the command line of the run.
        folder: where the model lies, as the code of the card should write it.
        has_curves: whether ``learning_curves.png`` lies beside the card.
        hub_tasks: names of the tasks whose rows came from their hub data sets, not from local files.
        row_limits: where rows were left out: ``{"training" | "validation": most rows of each task}``.
    """

    name: str
    base_model: str
    encoder: str
    tasks: Sequence[Task]
    config: Mapping[str, Any]
    results: Results
    counts: Mapping[str, Any]
    hyper_parameters: Mapping[str, Any]
    train_rows: Mapping[str, int] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    folder: str = "."
    has_curves: bool = False
    hub_tasks: Sequence[str] = ()
    row_limits: Mapping[str, int] = field(default_factory=dict)


SWITCHES = (
    "preset",
    "attention_bias",
    "attention_bias_layers",
    "attention_bias_init",
    "attention_film",
    "block_width",
    "alignment",
    "norm_condition",
    "bottleneck",
    "bottleneck_activation",
    "bottleneck_output",
    "top_layer_init",
    "generator_init",
    "freeze",
    "freeze_conditional",
    "label_scale",
    "max_seq_length",
)


def write_model_card(card: ModelCard, path: str | Path) -> Path:
    """Write the card to ``path`` (``README.md`` of the model folder)."""
    return atomic_write(path, render_model_card(card))


def render_model_card(card: ModelCard) -> str:
    """Return the card's Markdown, front matter first."""
    import yaml

    matter = yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True, width=1000)
    sections = [
        f"---\n{matter}---",
        f"# {card.name}",
        _summary(card),
        "## Scores",
        _scores(card),
        "## Use",
        _use(card),
        "## Tasks",
        _tasks(card),
        "## Parameters",
        _parameters(card),
        "## Training",
        _training(card),
        "## Software",
        _software(),
    ]
    return "\n\n".join(sections) + "\n"


def front_matter(card: ModelCard) -> dict[str, Any]:
    """Return the YAML head that the hub reads: library, base model, tags, data sets, metrics, results."""
    family = card.config.get("family", "bert")
    kinds = [task.task_type.hub_task for task in card.tasks]
    matter: dict[str, Any] = {
        "library_name": "camtl",
        "pipeline_tag": max(kinds, key=kinds.count),
        "tags": ["camtl", "ca-mtl", "multi-task-learning", family, *dict.fromkeys(kinds)],
    }
    if _is_hub_id(card.base_model):
        matter["base_model"] = card.base_model
    datasets = sorted({source for task in card.tasks if (source := _hub_source(card, task))})
    if datasets:
        matter["datasets"] = datasets
    matter["metrics"] = sorted({_hub_metric(metric) for task in card.tasks for metric in task.metrics})
    by_name = {task.name: task for task in card.tasks}
    results = []
    for row in card.results.rows:
        task = by_name[row.task]
        results.append(
            {
                "task": {"type": task.task_type.hub_task, "name": f"{row.task} ({task.type})"},
                "dataset": {
                    "name": row.task,
                    "type": _hub_source(card, task) or row.task,
                    "split": row.split,
                },
                "metrics": [
                    {"type": _hub_metric(name), "name": metric_title(name), "value": round(value, 4)}
                    for name, value in row.metrics.items()
                ],
            }
        )
    if results:
        matter["model-index"] = [{"name": card.name, "results": results}]
    return matter


def _is_hub_id(name: str) -> bool:
    return (
        name.count("/") <= 1
        and not name.startswith((".", "/", "~"))
        and not Path(name).exists()
        and bool(name)
    )


def _hub_source(card: ModelCard, task: Task) -> str | None:
    return task.source.hub if task.source is not None and task.name in card.hub_tasks else None


def _hub_metric(name: str) -> str:
    return {"macro_f1": "f1", "micro_f1": "f1", "pearson": "pearsonr"}.get(name, name)


def _family(config: Mapping[str, Any]) -> Family:
    from camtl.models.families import FAMILIES

    return FAMILIES[config.get("family", "bert")]


def _summary(card: ModelCard) -> str:
    names = ", ".join(f"`{task.name}`" for task in card.tasks)
    count = f"{len(card.tasks)} tasks" if len(card.tasks) > 1 else "one task"
    return (
        f"One {_family(card.config).label} encoder trained on {count} ({names}) with camtl {__version__}. "
        f"{_conditioning(card.config)} Starting point: {card.encoder}."
    )


def _conditioning(config: Mapping[str, Any]) -> str:
    """Say what the task changes in the encoder; nothing, in plain multi-task training."""
    switches = (
        ("alignment", "its embeddings"),
        ("attention_bias", "its attention"),
        ("norm_condition", "its layer norms"),
        ("bottleneck", "a bottleneck"),
    )
    parts = [text for name, text in switches if config.get(name, "none") != "none"]
    if not parts:
        return (
            "The tasks share all of the encoder and differ in their heads only (plain multi-task "
            f"{_family(config).label})."
        )
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return (
        f"The encoder is told which task a text belongs to and adapts {listed} to it: conditionally adaptive "
        "multi-task learning (CA-MTL, [Pilault et al., ICLR 2021](https://arxiv.org/abs/2009.09139))."
    )


def _scores(card: ModelCard) -> str:
    if not card.results.rows:
        return "No evaluation data was given."
    header, body = results_cells(card.results)
    table = _markdown(header, body, right={2, 3, 4})
    most = card.row_limits.get("validation")
    rows = f"at most {most:,} randomly chosen validation rows of each set" if most else "the validation rows"
    return (
        f"{table}\n\nMeasured by this run on {rows}, as fractions. A task's score is the mean "
        "of its metrics. The majority baseline always gives the training part's most frequent answer (of "
        "a regression the mean) and is scored by the same metrics; task sigma is the population standard "
        "deviation of the tasks' scores. Validation rows may have been used to choose the checkpoint, so "
        "expect a little less on unseen data."
    )


def _use(card: ModelCard) -> str:
    # Of tasks that are asked alike, one shows how.
    asked = {(task.type, len(task.task_type.columns(task))): task for task in reversed(card.tasks)}
    shown = [task for task in card.tasks if task in asked.values()]
    calls = [
        f'model.predict([{_as_python(task.task_type.example(task))}], task="{task.name}")' for task in shown
    ]
    by_answer: dict[str, list[str]] = {}
    for task in card.tasks:
        by_answer.setdefault(task.task_type.holds, []).append(f"`{task.name}`")
    answers = "\n".join(f"- {', '.join(names)}: {holds}" for holds, names in by_answer.items())
    return (
        "```python\n"
        "from camtl import CaMtlForMultiTask\n\n"
        f'model = CaMtlForMultiTask.from_pretrained("{card.folder}")\n' + "\n".join(calls) + "\n```\n\n"
        f"`predict` returns one dictionary a row, which holds\n\n{answers}\n\nFrom a shell:\n\n"
        f"```sh\n{predict_command(card.folder, card.tasks[0])}\n"
        f"camtl eval {card.folder}\n```"
    )


def predict_command(folder: str, task: Task) -> str:
    """A command line that asks the model in ``folder`` an example row of a task."""
    row = task.task_type.example(task)
    command = f"camtl predict {shlex.quote(folder)} --task {task.name}"
    if isinstance(row, dict):
        return f"echo {shlex.quote(json.dumps(row))} | {command}"
    return f"{command} --text {shlex.join(row)}"


def _as_python(row: tuple[str, ...] | dict[str, Any]) -> str:
    if isinstance(row, dict):
        return repr(row)
    texts = ", ".join(json.dumps(text) for text in row)
    return texts if len(row) == 1 else f"({texts})"


def _tasks(card: ModelCard) -> str:
    rows = []
    for task in card.tasks:
        answers = task.task_type.answers(task)
        if task.labels:
            answers += f": {', '.join(task.labels)}"
        elif task.label_range:
            answers += f", {task.label_range[0]:g} to {task.label_range[1]:g}"
        texts = len(task.text_columns)
        rows.append(
            [
                task.name,
                {1: "single text", 2: "text pair"}.get(texts, f"{texts} texts"),
                ", ".join(task.task_type.columns(task)),
                answers,
                f"{card.train_rows[task.name]:,}" if task.name in card.train_rows else "",
            ]
        )
    table = _markdown(["task", "reads", "columns", "answers", "training rows"], rows, right={4})
    notes = [f"- `{task.name}`: {task.description}" for task in card.tasks if task.description]
    licences = [f"- `{task.name}`: {task.licence}" for task in card.tasks if task.licence]
    parts = [table]
    if "training" in card.row_limits:
        parts.append(f"Trained on at most {card.row_limits['training']:,} randomly chosen rows of each task.")
    if notes:
        parts.append("\n".join(notes))
    if licences:
        parts.append("Licences and terms of the data:\n\n" + "\n".join(licences))
    return "\n\n".join(parts)


def _parameters(card: ModelCard) -> str:
    counts = card.counts
    rows = [["total", f"{counts['total']:,}"], ["trainable", f"{counts['trainable']:,}"]]
    family = _family(card.config).label
    for key, label in (
        ("encoder", f"{family} encoder"),
        ("conditional", f"conditional (not in plain {family})"),
    ):
        if key in counts:
            rows.append([label, f"{counts[key]:,}"])
    if "per_task" in counts:
        rows.append([f"trainable per task (over {len(card.tasks)})", f"{counts['per_task']:,}"])
    return _markdown(["parameters", "count"], rows, right={1})


def _training(card: ModelCard) -> str:
    parts = []
    if card.command:
        parts.append(f"```sh\n{card.command}\n```")
    switches = [[f"`{key}`", f"`{card.config[key]}`"] for key in SWITCHES if card.config.get(key) is not None]
    given = [[f"`{key}`", f"`{value}`"] for key, value in card.hyper_parameters.items()]
    parts.append(_markdown(["hyper-parameter", "value"], given + switches))
    if card.training:
        parts.append(
            _markdown(["measured", "value"], [[key, str(value)] for key, value in card.training.items()])
        )
    if card.has_curves:
        parts.append("![training loss and validation scores over the steps](learning_curves.png)")
    return "\n\n".join(parts)


def _software() -> str:
    from importlib.metadata import PackageNotFoundError, version

    rows = [["camtl", __version__], ["Python", platform.python_version()]]
    for package in ("torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors"):
        try:
            rows.append([package, version(package)])
        except PackageNotFoundError:
            continue
    return _markdown(["package", "version"], rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], right: set[int] | None = None) -> str:
    ruler = ["---:" if number in (right or set()) else "---" for number in range(len(header))]
    lines = [header, ruler, *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
