"""A task as data: name, type, columns, labels, metrics, where its rows come from."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from camtl.errors import UsageError
from camtl.tasks.names import check_task_name
from camtl.tasks.types import TaskType, get_task_type


def _class_name(value: Any) -> Any:
    """YAML reads ``[0, 1]`` as numbers and ``[true, false]`` as booleans; names are text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float)) else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ClassName = Annotated[str, BeforeValidator(_class_name), Field(min_length=1)]
ColumnName = Annotated[str, Field(min_length=1)]
Names = BeforeValidator(_one_or_many)


class Source(BaseModel):
    """Where a built-in task comes from: a hub data set (``hub``, ``config``, ``revision``) or the demo
    generator.

    ``splits`` maps our split names to the hub's where they differ (MNLI: validation is validation_matched
    there), ``columns`` the task's columns to the hub's, ``labels`` what the hub's label column holds to the
    task's class names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    splits: dict[str, str] = Field(default_factory=dict)
    columns: dict[ColumnName, ColumnName] = Field(default_factory=dict)
    labels: dict[ClassName, ClassName] = Field(default_factory=dict)
    demo: str | None = None


class Task(BaseModel):
    """One task. Immutable; ``task.model_copy(update=...)`` makes a variant.

    ``labels`` are the class names in the order of their ids (None for regression). ``eval_splits`` are the
    validation sets by their local names. ``files`` maps a split to a data file (relative names are relative
    to the YAML file the task was read from). Errors are one-line :class:`UsageError` naming task and field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    type: str
    text_columns: Annotated[tuple[ColumnName, ...], Names]
    label_column: ColumnName = "label"
    labels: tuple[ClassName, ...] | None = None
    metrics: Annotated[tuple[str, ...], Names] = ()
    label_range: tuple[float, float] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    eval_splits: Annotated[tuple[str, ...], Names] = ("validation",)
    files: dict[str, str] | None = None
    source: Source | None = None
    description: str = ""
    citation: str = ""
    licence: str = ""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise UsageError(_one_line(error, data)) from None

    @model_validator(mode="before")
    @classmethod
    def _default_metrics(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("metrics") and isinstance(data.get("type"), str):
            return {**data, "metrics": get_task_type(data["type"]).default_metrics}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        check_task_name(self.name)
        least, most = self.task_type.texts
        if not least <= len(self.text_columns) <= (most or len(self.text_columns)):
            wanted = _number_of_columns(least, most)
            raise ValueError(f"text_columns: {wanted} needed, {len(self.text_columns)} given")
        for option in self.options:
            if option not in self.task_type.options:
                options = ", ".join(self.task_type.options) or "none"
                raise ValueError(f"options: {option!r} is no option of {self.type}; known: {options}")
        known = self.task_type.metrics
        for metric in self.metrics:
            if metric not in known:
                raise ValueError(
                    f"metrics: {metric!r} is no metric of {self.type}; choose from {', '.join(known)}"
                )
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics: each metric once")
        if not self.eval_splits or any(not re.fullmatch(r"[A-Za-z0-9_]+", s) for s in self.eval_splits):
            raise ValueError("eval_splits: names of letters, digits and _ are needed, such as [validation]")
        if self.label_range is not None and not self.label_range[0] < self.label_range[1]:
            raise ValueError("label_range: the first number must be below the second")
        self.task_type.check(self)
        self._check_source()
        columns = [*self.task_type.columns(self), self.label_column]
        if len(set(columns)) != len(columns):
            raise ValueError(
                f"text_columns, label_column: each must be another column; given: {', '.join(columns)}"
            )
        return self

    def _check_source(self) -> None:
        if self.source is None:
            return
        read = [*self.task_type.columns(self), self.label_column]
        for field, names, known in (
            ("columns", list(self.source.columns), read),
            ("labels", list(self.source.labels.values()), list(self.labels or ())),
        ):
            wrong = [name for name in names if name not in known]
            if wrong:
                there = ", ".join(known) or "it has none"
                raise ValueError(f"source.{field}: {wrong[0]!r} is none of this task's: {there}")

    @property
    def task_type(self) -> TaskType:
        """The object that knows how tasks of this type are read, learned and judged."""
        return get_task_type(self.type)

    @property
    def num_labels(self) -> int:
        """Outputs of the task's head: its classes, or 1 for regression."""
        return self.task_type.head(self).outputs

    def option(self, name: str) -> Any:
        """The value of an option of the task's type: as given, else the type's default."""
        return self.options.get(name, self.task_type.options[name])

    @property
    def is_pair(self) -> bool:
        """Whether a row holds two texts."""
        return len(self.text_columns) == 2

    def to_config(self) -> dict[str, Any]:
        """The entry of ``CaMtlConfig.task_info``: all the model and a later prediction need, as plain JSON
        values.

        ``label_mean`` and ``label_std`` are None until training has seen the labels.
        """
        return {
            "name": self.name,
            "type": self.type,
            "num_labels": self.num_labels,
            "labels": list(self.labels) if self.labels else None,
            "loss": self.task_type.loss,
            "label_mean": None,
            "label_std": None,
            "reads": self.task_type.head(self).reads,
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "metrics": list(self.metrics),
            "label_range": list(self.label_range) if self.label_range else None,
            "eval_splits": list(self.eval_splits),
            **({"options": self.options} if self.options else {}),
        }

    @classmethod
    def from_config(cls, info: dict[str, Any]) -> Task:
        """The task of a :meth:`to_config` dict (from a model's ``config.json``); other keys are ignored."""
        return cls(
            **{key: value for key, value in info.items() if key in cls.model_fields and value is not None}
        )

    @classmethod
    def from_yaml(cls, path: str, name: str | None = None) -> Task:
        """The task of a YAML file, by name if the file holds several."""
        from camtl.tasks.files import load_tasks_yaml

        tasks = load_tasks_yaml(path)
        chosen = [task for task in tasks if name is None or task.name == name]
        if len(chosen) != 1:
            raise UsageError(
                f"{path}: holds the tasks {', '.join(task.name for task in tasks)}; "
                + ("say which one" if name is None else f"there is no {name!r}")
            )
        return chosen[0]


def _number_of_columns(least: int, most: int | None) -> str:
    names = {1: "one", 2: "two", 3: "three"}
    low, high = names.get(least, str(least)), names.get(most or 0, str(most))
    if most is None:
        return f"{low} or more columns are"
    if least == most:
        return f"{low} column{' is' if least == 1 else 's are'}"
    return f"{low} {'or' if most == least + 1 else 'to'} {high} columns are"


def _one_line(error: ValidationError, data: dict[str, Any]) -> str:
    """pydantic's report as ``task 'x', field: message; field: message``."""
    problems = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            message = "is missing"
        elif item["type"] == "extra_forbidden":
            known = list(Source.model_fields if "." in field else Task.model_fields)
            close = get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            message = f"is no field of a task; {hint}known: {', '.join(known)}"
        elif item["type"] == "tuple_type":
            message = f"needs a list, given {item['input']!r}"
        elif item["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, given {item['input']!r}"
        problems.append(f"{field}: {message}" if field else message)
    return f"task {data.get('name', '(without name)')!r}: {'; '.join(problems)}"
