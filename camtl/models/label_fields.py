"""``id2label``, ``label2id``, ``num_labels`` and ``problem_type`` of a config: those of one of its tasks."""

from __future__ import annotations

from typing import Any

_PROBLEMS = {"mse": "regression", "bce": "multi_label_classification"}


class _LabelField:
    """A field that a task decides where one is chosen; else it is what it was set to, as anywhere."""

    def __init__(self, of_task: str) -> None:
        self.of_task = of_task

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return None  # the default of the field
        task = config.labelled_task()
        return config.__dict__.get(self.name) if task is None else getattr(config, self.of_task)(task)

    def __set__(self, config: Any, value: Any) -> None:
        if config.labelled_task() is None:
            config.__dict__[self.name] = value


class LabelFieldsMixin:
    """The fields in which Hugging Face's code looks for the labels of a classifier, for ``CaMtlConfig``.

    They follow the task that :meth:`choose_labels` chose, or the only one, and cannot be set then: labels
    belong to ``task_info``. The choice is not saved.
    """

    tasks: list[str]
    task_info: list[dict[str, Any]]

    id2label = _LabelField("labels_of")
    label2id = _LabelField("label_numbers_of")
    problem_type = _LabelField("problem_type_of")

    def labels_of(self: Any, task: str) -> dict[int, str]:
        """``{number: label}`` of a task's outputs; that of a regression is called ``score``.

        Outputs that have no label each (a type of another package may want it so) are called by number.
        """
        info = self.task_info[self.task_index(task)]
        if info["loss"] == "mse":
            return {0: "score"}
        count, labels = info["num_labels"], info["labels"] or ()
        return {i: str(label) for i, label in enumerate(labels if len(labels) == count else range(count))}

    def label_numbers_of(self, task: str) -> dict[str, int]:
        """``{label: number}`` of a task's outputs."""
        return {label: number for number, label in self.labels_of(task).items()}

    def problem_type_of(self: Any, task: str) -> str | None:
        """Hugging Face's word for what a task says of a text; None where it has none."""
        info = self.task_info[self.task_index(task)]
        if info.get("reads", "pooled") not in ("pooled", "spans"):  # it answers with tokens or places
            return None
        if info["loss"] == "ce":
            return "single_label_classification" if info["num_labels"] > 1 else None
        return _PROBLEMS[info["loss"]]

    def choose_labels(self, task: str | None) -> None:
        """Let the fields be those of this task; None: of the only task, if there is but one."""
        self.__dict__.pop("_labels_task", None)
        if task is not None:
            self.__dict__["_labels_task"] = task

    def labelled_task(self) -> str | None:
        """The task whose labels the fields give; None if there is none."""
        tasks = self.__dict__.get("tasks", ())  # still absent while a config is made
        only = tasks[0] if len(tasks) == 1 else None
        return self.__dict__.get("_labels_task", only)

    def to_dict(self) -> dict[str, Any]:
        """As the base class, without the choice."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        values.pop("_labels_task", None)
        return values
