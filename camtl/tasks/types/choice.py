"""Multiple choice: one of several texts that go with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError
from camtl.tasks.types._given import as_json
from camtl.tasks.types._pairs import cut_first
from camtl.tasks.types._places import first_token
from camtl.tasks.types.base import (
    Columns,
    HeadSpec,
    Outputs,
    TaskType,
    Where,
    as_text,
    count,
    is_missing,
    of_task,
    softmax,
)

if TYPE_CHECKING:
    from camtl.tasks.schema import Task


class Choice(TaskType):
    """``text_columns`` hold what is asked, ``options: {choices: [...]}`` names the columns of the choices, or
    one column that holds a list of them. The label is the number of the right one, from 0.

    All choices are read in one sequence, each behind a separator; the first token of a choice stands for it
    and gets its score, and the scores of a sequence go through one softmax. ``options: {values: {column:
    {value: text}}}`` replaces values of a text column by what should be read (``cause`` by "What was the
    cause?").
    """

    name = "choice"
    loss = "ce"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    texts = (1, None)
    judged_by_rows = True
    hub_task = "multiple-choice"
    holds = "`choice` (its number), `text`, `score` and `probabilities` in order"
    options: ClassVar[dict[str, Any]] = {"choices": (), "values": {}}

    def check(self, task: Task) -> None:
        """Columns of choices; replacements of columns that are read."""
        if task.labels:
            raise ValueError("labels: a choice task has no class names; its label is the number of a choice")
        choices = task.option("choices")
        listed = isinstance(choices, (list, tuple)) and all(isinstance(name, str) for name in choices)
        if not choices or not listed:
            raise ValueError(
                "options: choices must name the columns of the choices, or the one column that lists them; "
                f"given {choices!r}"
            )
        values = task.option("values")
        if not isinstance(values, Mapping) or not all(isinstance(own, Mapping) for own in values.values()):
            raise ValueError(
                f"options: values must be of the form {{column: {{value: text}}}}, given {values!r}"
            )
        for column, meant in values.items():
            if column not in task.text_columns:
                raise ValueError(f"options: values is about {column!r}, which is no text column")
            wrong = [part for pair in meant.items() for part in pair if not isinstance(part, str)]
            if wrong:
                raise ValueError(
                    f"options: values of {column} must replace text by text, given {wrong[0]!r} (in YAML, "
                    "numbers, yes and no need quotes)"
                )

    def columns(self, task: Task) -> list[str]:
        """Texts and choices."""
        return [*task.text_columns, *task.option("choices")]

    def features(self, task: Task) -> dict[str, Any]:
        """Texts, choices, the number of the right one."""
        names = task.option("choices")
        choices = {names[0]: ["string"]} if len(names) == 1 else dict.fromkeys(names, "string")
        return {**dict.fromkeys(task.text_columns, "string"), **choices, task.label_column: "int32"}

    def prepare_label(self, task: Task, value: Any) -> int | None:
        """The number of a choice; None, "" and -1 mean no label."""
        if is_missing(value) or value == "":
            return None
        try:
            number = int(float(value))
        except (TypeError, ValueError, OverflowError):  # the last: infinity
            number = -2
        if number == -1:
            return None
        if number < 0 or number != float(value):
            raise ValueError(f"label {value!r} is no number of a choice; they count from 0")
        return number

    def prepare(
        self, task: Task, columns: Columns, where: Where, allow_unlabelled: bool = False
    ) -> dict[str, list[Any]]:
        """Texts as they will be read, and the choices."""
        out = super().prepare(task, columns, where, allow_unlabelled)
        for column, meant in task.option("values").items():
            out[column] = [meant.get(value, value) for value in out[column]]
        names = list(task.option("choices"))
        for name in names:
            own = columns[name]
            if len(names) == 1:
                out[name] = [_listed(value, name, of_task(task, where), i) for i, value in enumerate(own)]
            else:
                out[name] = [as_text(value, name, of_task(task, where), i) for i, value in enumerate(own)]
        for i, own in enumerate(_choices(task, out)):
            if not all(text.strip() for text in own):
                raise UsageError(f"{where(i)}: task {task.name!r}: a choice is empty")
        for i, (label, choices) in enumerate(
            zip(out.get(task.label_column, ()), _choices(task, out), strict=False)
        ):
            if label is not None and label >= len(choices):
                raise UsageError(
                    f"{where(i)}: task {task.name!r}: label {label} of {count(len(choices), 'choice')}, "
                    "which count from 0"
                )
        return out

    def encode(self, task: Task, rows: Columns, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Marks are 1 at the first token of each choice; ``token_begin`` is the choice's number."""
        asked = [" ".join(texts) for texts in zip(*(rows[c] for c in task.text_columns), strict=True)]
        separator = f" {tokenizer.sep_token} "
        choices = _choices(task, rows)
        pairs = cut_first(asked, [separator.join(own) for own in choices], tokenizer, max_length)
        labels = rows.get(task.label_column)
        out: dict[str, list[Any]] = {
            "input_ids": [pair.input_ids for pair in pairs],
            "token_type_ids": [pair.token_type_ids for pair in pairs],
            "token_marks": [],
            "token_begin": [],
        }
        if labels is not None:
            out["token_labels"] = []
        for i, (own, pair) in enumerate(zip(choices, pairs, strict=True)):
            begins = [-1] * len(pair.input_ids)
            character = 0
            for number, text in enumerate(own):
                place = first_token(character, pair.offsets, pair.texts, 1)
                if place is None or begins[place] >= 0:
                    raise UsageError(
                        f"task {task.name!r}: choice {number} ({text[:40]!r}) does not fit into "
                        f"max_seq_length {max_length}; raise it"
                    )
                begins[place] = number
                character += len(text) + len(separator)
            out["token_begin"].append(begins)
            out["token_marks"].append([int(number >= 0) for number in begins])
            if labels is not None:
                right = -2 if labels[i] is None else labels[i]
                out["token_labels"].append([int(number == right) for number in begins])
        return out

    def shortest(self, task: Task, tokenizer: Any) -> int:
        """A token of every text and choice, and what separates them."""
        return int(tokenizer.num_special_tokens_to_add(pair=True)) + 2 * len(task.option("choices")) + 1

    def row(self, task: Task, texts: Sequence[str]) -> dict[str, Any]:
        """The texts that are asked, then the choices."""
        asked, names = len(task.text_columns), list(task.option("choices"))
        if len(texts) < asked + max(2, len(names)) or (len(names) > 1 and len(texts) > asked + len(names)):
            many = " ..." if len(names) == 1 else ""
            raise ValueError(f"reads {', '.join((*task.text_columns, *names))}{many}; given {len(texts)}")
        choices: list[Any] = [list(texts[asked:])] if len(names) == 1 else list(texts[asked:])
        return dict(zip((*task.text_columns, *names), (*texts[:asked], *choices), strict=True))

    def example(self, task: Task) -> tuple[str, ...]:
        """What is asked, with a value that is replaced where there are such, and choices."""
        values = task.option("values")
        asked = (next(iter(values.get(column, ())), "It had rained.") for column in task.text_columns)
        choices = ("The street was wet.", "The sun came out.")
        more = (f"This is choice {number}." for number in range(2, len(task.option("choices"))))
        return (*asked, *choices, *more)

    def answers(self, task: Task) -> str:
        """For tables."""
        return "a choice"

    def head(self, task: Task) -> HeadSpec:
        """One score at every choice."""
        return HeadSpec(outputs=1, reads="positions")

    def decode(self, outputs: Outputs, task: Task) -> list[dict[str, Any]]:
        """``{"choice": number, "text", "score", "probabilities": [of each choice]}`` per row."""
        texts = _choices(task, outputs.need_rows(task))
        rows = []
        for own, p in zip(texts, _probabilities(outputs), strict=True):
            best = max(range(len(p)), key=p.__getitem__)
            rows.append({"choice": best, "text": own[best], "score": p[best], "probabilities": p})
        return rows

    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """Share of rows whose most probable choice is the right one."""
        labels = outputs.need_rows(task)[task.label_column]
        if len(labels) == 0:
            raise UsageError(f"task {task.name!r}: no rows to evaluate")
        chosen = [max(range(len(p)), key=p.__getitem__) for p in _probabilities(outputs)]
        return {"accuracy": sum(a == b for a, b in zip(chosen, labels, strict=True)) / len(labels)}

    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """The number of the choice that is most often right."""
        known = list(rows[task.label_column])
        return max(sorted(set(known)), key=known.count)

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """Share of rows in which that choice is right."""
        labels = list(rows[task.label_column])
        return {"accuracy": labels.count(answer) / max(1, len(labels))}


def _choices(task: Task, rows: Columns) -> list[list[str]]:
    """The choices of every row."""
    names = task.option("choices")
    if len(names) == 1:
        return [list(own) for own in rows[names[0]]]
    return [list(own) for own in zip(*(rows[name] for name in names), strict=True)]


def _listed(value: Any, name: str, where: Where, i: int) -> list[str]:
    value = as_json(value)
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise UsageError(f"{where(i)}: the column {name!r} must list two or more choices, given {value!r}")
    return [as_text(text, name, where, i) for text in value]


def _probabilities(outputs: Outputs) -> list[list[float]]:
    """Of the choices of every row, in their order."""
    assert outputs.token_logits is not None
    found = []
    for begins, logits in zip(outputs.sequences["token_begin"], outputs.token_logits, strict=True):
        places = sorted((number, place) for place, number in enumerate(begins) if number >= 0)
        found.append([float(p) for p in softmax(logits[[place for _, place in places], 0])])
    return found
