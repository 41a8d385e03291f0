"""A label for every word: parts of speech, or entities in IOB2 form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError
from camtl.tasks.types.base import (
    IGNORED,
    Columns,
    HeadSpec,
    Outputs,
    TaskType,
    Where,
    is_missing,
    of_task,
    softmax,
)
from camtl.tasks.types.classification import check_classes, class_id

if TYPE_CHECKING:
    from camtl.tasks.schema import Task


class Tagging(TaskType):
    """``text_columns`` is the column of words, the label column holds a tag a word. The first sub-word of a
    word is classified; a word that ``max_seq_length`` cuts off is tagged "O" (without an "O": the first tag).
    """

    name = "tagging"
    loss = "ce"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall", "accuracy")
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    texts = (1, 1)
    judged_by_rows = True
    hub_task = "token-classification"
    holds = "`tags` and `scores`, one a word, and `entities` where the tags are in IOB2 form"

    def check(self, task: Task) -> None:
        """Two or more distinct tags; entity metrics only for tags in IOB2 form."""
        check_classes(task)
        entity = [metric for metric in task.metrics if metric != "accuracy"]
        if entity and not _iob2(task):
            raise ValueError(
                f"metrics: {entity[0]} counts entities, whose tags are O, B-name and I-name; this task has "
                f"{', '.join((task.labels or ())[:5])}; use accuracy"
            )

    def features(self, task: Task) -> dict[str, Any]:
        """Words, and a tag id a word."""
        return {task.text_columns[0]: ["string"], task.label_column: ["label"]}

    def prepare_label(self, task: Task, value: Any) -> list[int] | None:
        """Tag ids of a row."""
        value = _list(value)
        if value is None:
            return None
        ids = []
        for number, tag in enumerate(value, 1):
            try:
                found = class_id(task, tag)
            except ValueError as error:
                raise ValueError(f"word {number}: {str(error).replace('label', 'tag', 1)}") from None
            if found is None:
                raise ValueError(f"word {number}: its tag is {tag!r}")
            ids.append(found)
        return ids

    def classes_in(self, value: Any) -> list[Any]:
        """The tags of a row."""
        return _list(value) or []

    def prepare(
        self, task: Task, columns: Columns, where: Where, allow_unlabelled: bool = False
    ) -> dict[str, list[Any]]:
        """Words as lists of texts (a text is split at blanks), tags as lists of ids, one a word."""
        column = task.text_columns[0]
        out: dict[str, list[Any]] = {
            column: [
                _words(value, column, of_task(task, where), i) for i, value in enumerate(columns[column])
            ]
        }
        if task.label_column in columns or not allow_unlabelled:
            out[task.label_column] = self.prepare_labels(task, columns, where, allow_unlabelled)
            for i, (words, tags) in enumerate(zip(out[column], out[task.label_column], strict=True)):
                if tags is not None and len(words) != len(tags):
                    raise UsageError(
                        f"{where(i)}: task {task.name!r}: {column} has {len(words)} words, "
                        f"{task.label_column} {len(tags)} tags"
                    )
        return out

    def notes(self, task: Task, rows: Columns, where: Where) -> list[str]:
        """How many tags begin an entity with I-, as in IOB1 files, and where the first one is."""
        names = task.labels or ()
        if not _iob2(task):
            return []
        counts = [
            0 if row is None else repaired([names[tag] for tag in row])[1]
            for row in rows.get(task.label_column, ())
        ]
        found = [i for i, count in enumerate(counts) if count]
        if not found:
            return []
        return [
            f"tags that begin an entity with I-, and count as B-: {sum(counts):,}, in rows: {len(found):,}; "
            f"first: {where(found[0])}"
        ]

    def encode(self, task: Task, rows: Columns, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Marks are 1 at the first sub-word of each word; ``token_begin`` is the word's number."""
        words = rows[task.text_columns[0]]
        encoded = tokenizer(
            [list(row) for row in words],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        ids = encoded["input_ids"]
        out: dict[str, list[Any]] = {
            "input_ids": ids,
            "token_type_ids": encoded.get("token_type_ids") or [[0] * len(row) for row in ids],
            "token_marks": [],
            "token_begin": [],
        }
        tags = rows.get(task.label_column)
        if tags is not None:
            out["token_labels"] = []
        for i, row in enumerate(ids):
            marks, begins, before = [], [], None
            for word in encoded.word_ids(i):
                first = word is not None and word != before
                marks.append(int(first))
                begins.append(word if first else -1)
                before = word
            out["token_marks"].append(marks)
            out["token_begin"].append(begins)
            if tags is not None:
                own = tags[i]
                out["token_labels"].append(
                    [IGNORED] * len(row)
                    if own is None
                    else [own[word] if word >= 0 else IGNORED for word in begins]
                )
        return out

    def row(self, task: Task, texts: Any) -> dict[str, Any]:
        """A text, whose words are between blanks."""
        if len(texts) != 1:
            raise ValueError(f"reads one text, whose words are tagged, given {len(texts)}")
        return {task.text_columns[0]: texts[0]}

    def example(self, task: Task) -> tuple[str, ...]:
        """A text with names."""
        return ("Ann Lee lives in Paris .",)

    def answers(self, task: Task) -> str:
        """For tables."""
        return f"{len(task.labels or ())} tags"

    def head(self, task: Task) -> HeadSpec:
        """One output per tag, at every token."""
        return HeadSpec(outputs=len(task.labels or ()), reads="tokens")

    def decode(self, outputs: Outputs, task: Task) -> list[dict[str, Any]]:
        """``{"tags": [a name a word], "scores": [its probability]}`` per row, and for tags in IOB2 form
        ``"entities": [{"type", "text", "begin", "end"}]`` (numbers of words, end exclusive) and
        ``"repaired"``: how many tags were changed so that every entity begins with B- (:func:`repaired`).
        """
        names = task.labels or ()
        rows = outputs.need_rows(task)[task.text_columns[0]]
        decoded = []
        for words, (ids, scores) in zip(rows, _tags(outputs, task), strict=True):
            tags = [names[i] for i in ids]
            answer: dict[str, Any] = {"tags": tags, "scores": scores}
            if _iob2(task):
                answer["tags"], answer["repaired"] = repaired(tags)
                answer["entities"] = [
                    {"type": kind, "text": " ".join(words[begin:end]), "begin": begin, "end": end}
                    for kind, begin, end in entities(answer["tags"])
                ]
            decoded.append(answer)
        return decoded

    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """Share of words with the right tag; precision, recall and F1 of whole entities, as seqeval counts
        them (an I- that follows no entity of its type begins one).
        """
        names = task.labels or ()
        truth = outputs.need_rows(task)[task.label_column]
        if len(truth) == 0:
            raise UsageError(f"task {task.name!r}: no rows to evaluate")
        return _scores([[names[i] for i in ids] for ids, _ in _tags(outputs, task)], truth, task)

    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """The id of the most frequent tag."""
        counts = [0] * len(task.labels or ())
        for row in rows[task.label_column]:
            for tag in row:
                counts[tag] += 1
        return counts.index(max(counts))

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """Metrics of one tag for all words."""
        truth = rows[task.label_column]
        return _scores([[(task.labels or ())[answer]] * len(row) for row in truth], truth, task)


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """The entities of tags in IOB2 form, ``(type, first word, one behind the last)``."""
    found: list[tuple[str, int, int]] = []
    begin, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            found.append((kind, begin, i))
            kind = ""
        if tag != "O" and not kind:
            begin, kind = i, tag[2:]
    return found


def repaired(tags: list[str]) -> tuple[list[str], int]:
    """Tags in which every entity begins with B-, and how many had to be changed: an I- behind another type,
    or behind nothing, begins an entity of its own.
    """
    begins = [
        tag.startswith("I-") and before not in (f"B-{tag[2:]}", tag)
        for before, tag in zip(["O", *tags], tags, strict=False)
    ]
    return [f"B-{tag[2:]}" if begin else tag for begin, tag in zip(begins, tags, strict=True)], sum(begins)


def _iob2(task: Task) -> bool:
    names = task.labels or ()
    return "O" in names and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def _list(value: Any, *, is_text: bool = False) -> list[Any] | None:
    """A list as given, or written as JSON, as CSV files have it; None if there is nothing. ``is_text``: what
    begins like JSON but is none, such as "[ Music ] starts", is a text too.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text) if text.startswith("[") else text.split()
        except json.JSONDecodeError:
            if not is_text:
                raise ValueError(f"{value!r} is neither a list nor JSON") from None
            value = text.split()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is no list")
    return list(value)


def _words(value: Any, column: str, where: Where, i: int) -> list[str]:
    try:
        words = _list(value, is_text=True)
    except ValueError as error:
        raise UsageError(f"{where(i)}: the column {column!r}: {error}") from None
    if not words:
        raise UsageError(f"{where(i)}: the column {column!r} holds no word")
    for word in words:
        if not isinstance(word, str):
            raise UsageError(f"{where(i)}: the column {column!r} holds {word!r} among its words")
    return words


def _tags(outputs: Outputs, task: Task) -> list[tuple[list[int], list[float]]]:
    """Tag ids and their probabilities of every row, a word each."""
    names = task.labels or ()
    fallback = names.index("O") if "O" in names else 0
    assert outputs.token_logits is not None
    found = []
    rows = outputs.need_rows(task)[task.text_columns[0]]
    for words, begins, logits in zip(
        rows, outputs.sequences["token_begin"], outputs.token_logits, strict=True
    ):
        ids, scores = [fallback] * len(words), [0.0] * len(words)
        for place, word in enumerate(begins):
            if word >= 0:
                p = softmax(logits[place, : len(names)])
                ids[word] = int(p.argmax())
                scores[word] = float(p[ids[word]])
        found.append((ids, scores))
    return found


def _scores(predicted: list[list[str]], truth: Any, task: Task) -> dict[str, float]:
    from seqeval.metrics import f1_score, precision_score, recall_score

    names = task.labels or ()
    true = [[names[i] for i in row] for row in truth]
    right = sum(a == b for p, t in zip(predicted, true, strict=True) for a, b in zip(p, t, strict=True))
    known = {
        "f1": lambda: f1_score(true, predicted, zero_division=0),
        "precision": lambda: precision_score(true, predicted, zero_division=0),
        "recall": lambda: recall_score(true, predicted, zero_division=0),
        "accuracy": lambda: right / max(1, sum(map(len, true))),
    }
    return {name: float(known[name]()) for name in task.metrics}
