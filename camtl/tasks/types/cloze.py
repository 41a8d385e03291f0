"""Entity cloze (ReCoRD): which of the entities that a passage names belongs into the gap of a query."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError
from camtl.tasks.squad_scores import normalised, scores
from camtl.tasks.types._given import as_json, check_whole
from camtl.tasks.types._pairs import Pair, shortest, windows
from camtl.tasks.types.base import Columns, HeadSpec, Outputs, TaskType, Where, is_missing

if TYPE_CHECKING:
    from camtl.tasks.schema import Task

#: Of a mention: first and last character, the last included, as ReCoRD's files have it.
_FIELDS = {"text": "string", "start": "int32", "end": "int32"}


class Cloze(TaskType):
    """``text_columns`` are the query, in which ``placeholder`` is the gap (read as the tokenizer's mask), and
    the passage; ``entities`` names the column of the candidates; the label column lists the right ones.

    Candidates are a list of texts, each then looked up in the passage, or of the places where they are
    mentioned, ``{"start", "end"}`` in characters, the last included (with a ``"text"``, "end" may be absent).
    Every mention gets a score at its first token; the mentions of a window go through one softmax, and those
    of all right answers are the target. A long passage gives several windows, which share ``stride`` tokens;
    those without a mention are left out.
    """

    name = "cloze"
    loss = "ce"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    default_metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    texts = (2, 2)
    judged_by_rows = True
    hub_task = "question-answering"
    holds = "`answer`, `score` and `probabilities` by entity"
    options: ClassVar[dict[str, Any]] = {
        "entities": "entities",
        "placeholder": "@placeholder",
        "stride": 128,
    }

    def check(self, task: Task) -> None:
        """No class names; options in their ranges."""
        if task.labels:
            raise ValueError("labels: a cloze task has no class names; its answers are entities of the row")
        for option in ("entities", "placeholder"):
            if not isinstance(task.option(option), str) or not task.option(option):
                raise ValueError(f"options: {option} must be text, given {task.option(option)!r}")
        check_whole(task, "stride", 0)

    def columns(self, task: Task) -> list[str]:
        """Texts and candidates."""
        return [*task.text_columns, task.option("entities")]

    def features(self, task: Task) -> dict[str, Any]:
        """Texts, the mentions of the candidates, the right answers."""
        texts = dict.fromkeys(task.text_columns, "string")
        return {**texts, task.option("entities"): [_FIELDS], task.label_column: ["string"]}

    def prepare_label(self, task: Task, value: Any) -> list[str] | None:
        """The right answers as texts; None, "" and an empty list mean no label."""
        if is_missing(value):
            return None
        value = as_json(value)
        if isinstance(value, (str, dict)):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"answers {value!r} are no list of texts")
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"answers {value!r} are no list of texts")
        return list(dict.fromkeys(text for text in texts if text.strip())) or None

    def prepare(
        self, task: Task, columns: Columns, where: Where, allow_unlabelled: bool = False
    ) -> dict[str, list[Any]]:
        """Texts, mentions in the order of the passage, and answers of which one is among the candidates."""
        out = super().prepare(task, columns, where, allow_unlabelled)
        query, passage = task.text_columns
        name, placeholder = task.option("entities"), task.option("placeholder")
        out[name] = []
        for i, value in enumerate(columns[name]):
            if placeholder not in out[query][i]:
                raise UsageError(f"{where(i)}: task {task.name!r}: {query} has no {placeholder}")
            try:
                out[name].append(_mentions(value, out[passage][i], passage))
            except ValueError as error:
                raise UsageError(f"{where(i)}: task {task.name!r}: {name}: {error}") from None
        for i, answers in enumerate(out.get(task.label_column, ())):
            candidates = _candidates(out[name][i])
            if answers is not None and not _right(answers, candidates):
                raise UsageError(
                    f"{where(i)}: task {task.name!r}: no answer is among the entities of {passage}: "
                    f"{', '.join(map(repr, answers[:3]))}; entities: {', '.join(map(repr, candidates[:8]))}"
                )
        return out

    def encode(self, task: Task, rows: Columns, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Marks are 1 at the first token of each mention; ``token_begin`` is the candidate's number,
        ``token_end`` the mention's among the row's.
        """
        query, passage = task.text_columns
        gap = tokenizer.mask_token or task.option("placeholder")
        asked = [text.replace(task.option("placeholder"), gap) for text in rows[query]]
        found = windows(task, asked, rows[passage], tokenizer, max_length, int(task.option("stride")))
        answers = rows.get(task.label_column)
        names = ("input_ids", "token_type_ids", "row", "token_marks", "token_begin", "token_end")
        out: dict[str, list[Any]] = {name: [] for name in names}
        if answers is not None:
            out["token_labels"] = []
        for row, own in enumerate(found):
            mentions = rows[task.option("entities")][row]
            candidates = _candidates(mentions)
            right = _right(answers[row] or [], candidates) if answers is not None else set()
            named = [candidates.index(mention["text"]) for mention in mentions]
            ends = [_numbers(window, mentions, first=number == 0) for number, window in enumerate(own)]
            begins = [[named[i] if i >= 0 else -1 for i in numbers] for numbers in ends]
            kept = [i for i, numbers in enumerate(begins) if max(numbers) >= 0] or [0]
            for i in kept:
                out["input_ids"].append(own[i].input_ids)
                out["token_type_ids"].append(own[i].token_type_ids)
                out["row"].append(row)
                out["token_begin"].append(begins[i])
                out["token_end"].append(ends[i])
                out["token_marks"].append([int(number >= 0) for number in begins[i]])
                if answers is not None:
                    out["token_labels"].append([int(number in right) for number in begins[i]])
        return out

    def shortest(self, task: Task, tokenizer: Any) -> int:
        """A token of the query, and room for a window."""
        return shortest(tokenizer)

    def row(self, task: Task, texts: Sequence[str]) -> dict[str, Any]:
        """Texts alone do not say which entities there are."""
        raise ValueError(
            f"needs more than texts; give rows as JSON Lines with {', '.join(self.columns(task))}"
        )

    def example(self, task: Task) -> dict[str, Any]:
        """A query, a passage, and the entities in it."""
        query = f"{task.option('placeholder')} lives in Paris."
        texts = (query, "Ann Lee moved from Rome to Paris, Bo Hall stayed.")
        return dict(zip(self.columns(task), (*texts, ["Ann Lee", "Bo Hall"]), strict=True))

    def answers(self, task: Task) -> str:
        """For tables."""
        return "an entity"

    def head(self, task: Task) -> HeadSpec:
        """One score at every mention."""
        return HeadSpec(outputs=1, reads="positions")

    def decode(self, outputs: Outputs, task: Task) -> list[dict[str, Any]]:
        """``{"answer", "score", "probabilities": {entity: p}}`` per row: the candidate with the largest sum
        over its mentions; of a mention that several windows hold, its highest score counts.
        """
        import numpy as np

        assert outputs.token_logits is not None
        candidates = [_candidates(mentions) for mentions in outputs.need_rows(task)[task.option("entities")]]
        found: list[dict[int, tuple[int, float]]] = [{} for _ in candidates]  # by number of the mention
        columns = [outputs.sequences[name] for name in ("row", "token_begin", "token_end")]
        for row, begins, ends, logits in zip(*columns, outputs.token_logits, strict=True):
            for i, (number, mention) in enumerate(zip(begins, ends, strict=True)):
                if number >= 0:
                    score = float(logits[i, 0])
                    before = found[row].get(mention, (number, score))[1]
                    found[row][mention] = (number, max(score, before))
        decoded = []
        for names, mentions in zip(candidates, found, strict=True):
            sums = np.zeros(len(names))
            if mentions:
                numbers, values = map(np.array, zip(*mentions.values(), strict=True))
                np.add.at(sums, numbers, np.exp(values - values.max()))
                sums /= sums.sum()
            best = int(sums.argmax())
            decoded.append(
                {
                    "answer": names[best],
                    "score": float(sums[best]),
                    "probabilities": {name: float(p) for name, p in zip(names, sums, strict=True)},
                }
            )
        return decoded

    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """Exact match and F1 by SQuAD's rules, each the best over the right answers."""
        references = outputs.need_rows(task)[task.label_column]
        if len(references) == 0:
            raise UsageError(f"task {task.name!r}: no rows to evaluate")
        found = scores([row["answer"] for row in self.decode(outputs, task)], references)
        return {name: found[name] for name in task.metrics}

    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """No entity, but a rule: the one that the passage names most often."""
        return "the entity named most often"

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """The candidate that the passage names most often (the first of equals)."""
        usual = [
            Counter(mention["text"] for mention in mentions).most_common(1)[0][0]
            for mentions in rows[task.option("entities")]
        ]
        found = scores(usual, rows[task.label_column])
        return {name: found[name] for name in task.metrics}


def _candidates(mentions: Sequence[dict[str, Any]]) -> list[str]:
    """The candidates of a row, in the order of their first mention."""
    return list(dict.fromkeys(mention["text"] for mention in mentions))


def _right(answers: Sequence[str], candidates: Sequence[str]) -> set[int]:
    """The numbers of the candidates that are right: the same text, or else the same by SQuAD's rules."""
    exact = {number for number, name in enumerate(candidates) if name in answers}
    if exact:
        return exact
    wanted = {normalised(answer) for answer in answers} - {""}
    return {number for number, name in enumerate(candidates) if normalised(name) in wanted}


def _mentions(value: Any, passage: str, column: str) -> list[dict[str, Any]]:
    """The mentions in the passage, in its order, longer ones first; ``ValueError`` if there are none."""
    value = as_json(value)
    if isinstance(value, dict):  # columns of a table: {"text": [...], "start": [...], "end": [...]}
        fields = {name: list(as_json(own)) for name, own in value.items() if name in _FIELDS}
        value = [dict(zip(fields, own, strict=True)) for own in zip(*fields.values(), strict=True)]
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"a list of entities is needed, given {value!r}")
    places = []
    for entity in value:
        if isinstance(entity, dict):
            places.append(_place(entity, passage, column))
    names = [entity for entity in value if not isinstance(entity, dict)]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is neither text nor {{'start': character, 'end': character}}")
    places.extend(_occurrences({name.strip() for name in names} - {""}, passage))
    if not places:
        raise ValueError(f"none of them is in {column}: {', '.join(map(repr, names[:5]))}")
    ordered = sorted(set(places), key=lambda place: (place[0], -place[1]))
    return [{"text": passage[begin:end], "start": begin, "end": end - 1} for begin, end in ordered]


def _place(entity: dict[str, Any], passage: str, column: str) -> tuple[int, int]:
    """First character and the one behind the last; without blanks at the ends."""
    start, text = entity.get("start"), entity.get("text")
    end = start + len(text) if isinstance(start, int) and isinstance(text, str) else entity.get("end", "")
    if not isinstance(start, int) or not isinstance(end, int):
        raise ValueError(f"{entity!r} is neither text nor {{'start': character, 'end': character}}")
    end += 0 if isinstance(text, str) else 1
    found = passage[max(0, start) : end]
    if not 0 <= start < end <= len(passage) or not found.strip() or (text is not None and text != found):
        raise ValueError(f"{entity!r} is not in {column}, which has {found!r} there")
    return start + len(found) - len(found.lstrip()), start + len(found.rstrip())


def _occurrences(names: set[str], passage: str) -> list[tuple[int, int]]:
    """Where the names stand as words of their own, longer names first: "Bush" is not mentioned by
    "George Bush". A name that is found in no other way may be a part of words or of other names.
    """
    taken: list[tuple[int, int]] = []
    missing = []
    for name in sorted(names, key=lambda name: (-len(name), name)):
        own = [
            match.span()
            for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", passage)
            if not any(begin < match.end() and match.start() < end for begin, end in taken)
        ]
        taken.extend(own)
        if not own:
            missing.append(name)
    return taken + [match.span() for name in missing for match in re.finditer(re.escape(name), passage)]


def _numbers(window: Pair, mentions: Sequence[dict[str, Any]], *, first: bool) -> list[int]:
    """The mention that begins at each token of a window, by its number, -1 elsewhere. A token at which
    several begin is the longest one's; the others take their next token.
    """
    numbers = [-1] * len(window.input_ids)
    places = window.places()
    ends = [window.offsets[place][1] for place in places]
    for number, mention in enumerate(mentions):
        i = bisect_right(ends, mention["start"])
        # The window before holds the beginning of a mention that this one holds the rest of.
        if i == 0 and not first and places and window.offsets[places[0]][0] > mention["start"]:
            continue
        while i < len(places) and window.offsets[places[i]][0] <= mention["end"]:
            if numbers[places[i]] < 0:
                numbers[places[i]] = number
                break
            i += 1
    return numbers
