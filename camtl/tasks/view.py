"""A task as a model's config holds it: enough to decode what the model says, without the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from camtl.tasks.types import TaskType, get_task_type, is_task_type


@dataclass(frozen=True)
class TaskView:
    """The part of :class:`camtl.tasks.Task` that task types read, from an entry of ``config.task_info``.

    Nothing is checked: the entry was made from a checked task, or describes one by hand, with as little as a
    name and a number of labels.
    """

    name: str
    type: str
    labels: tuple[str, ...] | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    metrics: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, info: Mapping[str, Any]) -> TaskView:
        """The task of an entry; classes without names are called by their numbers."""
        labels, kind = info.get("labels"), info["type"]
        if not is_task_type(kind) and info.get("reads", "pooled") == "pooled":
            kind = "classification"  # of a package that is not installed here: what its loss says of it
        if kind == "classification":
            kind = {"mse": "regression", "bce": "multi_label"}.get(info["loss"], kind)
        if labels is None and kind in ("classification", "multi_label", "tagging"):
            labels = range(info["num_labels"])
        return cls(
            name=info["name"],
            type=kind,
            labels=None if labels is None else tuple(str(label) for label in labels),
            text_columns=tuple(info.get("text_columns") or ("text",)),
            label_column=info.get("label_column") or "label",
            metrics=tuple(info.get("metrics") or ()),
            label_range=info.get("label_range"),
            options=info.get("options") or {},
        )

    @property
    def task_type(self) -> TaskType:
        """The object that knows how tasks of this type are read, learned and judged."""
        return get_task_type(self.type)

    @property
    def is_pair(self) -> bool:
        """Whether a row holds two texts."""
        return len(self.text_columns) == 2

    def option(self, name: str) -> Any:
        """The value of an option of the task's type: as given, else the type's default."""
        return self.options.get(name, self.task_type.options[name])
