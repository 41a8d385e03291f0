"""Extractive question answering: the answer is a piece of the context."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError
from camtl.tasks.squad_scores import scores
from camtl.tasks.types._given import as_json, check_whole
from camtl.tasks.types._pairs import Pair, shortest, windows
from camtl.tasks.types._places import covering
from camtl.tasks.types.base import Columns, HeadSpec, Outputs, TaskType, Where, is_missing, softmax

if TYPE_CHECKING:
    import numpy as np

    from camtl.tasks.schema import Task

_START, _END = 1, 2


class Span(TaskType):
    """``text_columns`` are question and context; the label column holds the answers as SQuAD writes them,
    ``{"text": [...], "answer_start": [...]}`` with offsets in characters.

    Also read are a list of ``{"text", "answer_start"}``, and texts alone, which are looked up in the context,
    if need be in other letters' case. An offset of -1 means that the text is not in the context: it counts in
    scoring only. With ``no_answer`` an empty list says that the context has no answer.

    A long context gives several windows, which share ``stride`` tokens. In each one start and one end are
    chosen; where the answer is not inside the window, both are the first token ([CLS]). Of several answers
    the first that a window holds is learned.
    """

    name = "span"
    loss = "ce"
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "f1")
    default_metrics: ClassVar[tuple[str, ...]] = ("exact_match", "f1")
    texts = (2, 2)
    judged_by_rows = True
    hub_task = "question-answering"
    holds = "`answer`, `score`, `begin` and `end` in characters of the context, and `n_best`"
    options: ClassVar[dict[str, Any]] = {
        "stride": 128,
        "n_best": 20,
        "max_answer_length": 30,
        "no_answer": False,
        "null_threshold": 0.0,
    }

    def check(self, task: Task) -> None:
        """No class names; options in their ranges."""
        if task.labels:
            raise ValueError("labels: a span task has no class names; its answers are pieces of the context")
        check_whole(task, "stride", 0)
        check_whole(task, "n_best", 1)
        check_whole(task, "max_answer_length", 1)
        if not isinstance(task.option("no_answer"), bool):
            raise ValueError(f"options: no_answer must be true or false, given {task.option('no_answer')!r}")
        threshold = task.option("null_threshold")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise ValueError(f"options: null_threshold must be a number, given {threshold!r}")

    def features(self, task: Task) -> dict[str, Any]:
        """Answers as SQuAD has them."""
        answers = {"text": ["string"], "answer_start": ["int32"]}
        return {**dict.fromkeys(task.text_columns, "string"), task.label_column: answers}

    def prepare_label(self, task: Task, value: Any) -> dict[str, list[Any]] | None:
        """Texts and offsets; the offset is -1 where only the text is given."""
        if is_missing(value) or (isinstance(value, str) and not value):
            return None
        texts, starts = _answers(value)
        kept = [(text, start) for text, start in zip(texts, starts, strict=True) if text.strip()]
        if not kept and not task.option("no_answer"):
            return None
        return {"text": [text for text, _ in kept], "answer_start": [start for _, start in kept]}

    def prepare(
        self, task: Task, columns: Columns, where: Where, allow_unlabelled: bool = False
    ) -> dict[str, list[Any]]:
        """Texts, and answers that stand in the context where their offsets say."""
        if task.label_column in columns and not allow_unlabelled and not task.option("no_answer"):
            for i, value in enumerate(columns[task.label_column]):
                if not is_missing(value) and _empty(value):
                    raise UsageError(
                        f"{where(i)}: task {task.name!r}: {task.label_column} has no answer; a task with "
                        "such rows needs options: {no_answer: true}"
                    )
        out = super().prepare(task, columns, where, allow_unlabelled)
        name = task.text_columns[1]
        for i, context in enumerate(out[name]):
            if not context.strip():
                raise UsageError(f"{where(i)}: task {task.name!r}: {name} is empty")
        for i, label in enumerate(out.get(task.label_column, ())):
            if label is not None:
                try:
                    _locate(label, out[name][i], name)
                except ValueError as error:
                    raise UsageError(f"{where(i)}: task {task.name!r}: {error}") from None
        return out

    def encode(self, task: Task, rows: Columns, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Marks are 1 on the tokens of the context and on the first token; bit 0 of ``token_labels`` is the
        start, bit 1 the end; ``token_begin`` and ``token_end`` are characters of the context.
        """
        question, context = task.text_columns
        found = windows(
            task, rows[question], rows[context], tokenizer, max_length, int(task.option("stride"))
        )
        labels = rows.get(task.label_column)
        out: dict[str, list[Any]] = {
            name: []
            for name in ("input_ids", "token_type_ids", "row", "token_marks", "token_begin", "token_end")
        }
        if labels is not None:
            out["token_labels"] = []
        for row, own in enumerate(found):
            for window in own:
                nothing = no_answer_place(window, tokenizer)
                places = set(window.places())
                tokens = range(len(window.input_ids))
                out["input_ids"].append(window.input_ids)
                out["token_type_ids"].append(window.token_type_ids)
                out["row"].append(row)
                out["token_marks"].append([int(i in places or i == nothing) for i in tokens])
                out["token_begin"].append([window.offsets[i][0] if i in places else -1 for i in tokens])
                out["token_end"].append([window.offsets[i][1] if i in places else -1 for i in tokens])
            if labels is not None:
                out["token_labels"].extend(_targets(own, labels[row], tokenizer))
        return out

    def shortest(self, task: Task, tokenizer: Any) -> int:
        """A token of the question, and room for a window."""
        return shortest(tokenizer)

    def example(self, task: Task) -> tuple[str, ...]:
        """A question and its context."""
        return ("Where does Ann Lee live?", "Ann Lee lives in Paris.")

    def answers(self, task: Task) -> str:
        """For tables."""
        return "a piece of text"

    def head(self, task: Task) -> HeadSpec:
        """A score as start and one as end, at every token."""
        return HeadSpec(outputs=2, reads="positions")

    def decode(self, outputs: Outputs, task: Task) -> list[dict[str, Any]]:
        """``{"answer", "score", "begin", "end", "n_best": [the same of each]}`` per row: the best spans of
        all its windows, by the sum of start and end score. ``score`` is a probability among the n best.

        With ``no_answer`` the n best include "", whose score is the least of the windows' (a window without
        the answer says "" too); it is the answer if it beats the best span by more than ``null_threshold``.
        """
        assert outputs.token_logits is not None
        contexts = outputs.need_rows(task)[task.text_columns[1]]
        sequences = outputs.sequences
        best: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
        nothing: list[float | None] = [None] * len(contexts)
        for i, logits in enumerate(outputs.token_logits):
            row = sequences["row"][i]
            begins, ends = sequences["token_begin"][i], sequences["token_end"][i]
            places = [place for place, begin in enumerate(begins) if begin >= 0]
            for score, first, last in _best_spans(
                logits[places], int(task.option("max_answer_length")), int(task.option("n_best"))
            ):
                span = (begins[places[first]], ends[places[last]])
                best[row][span] = max(score, best[row].get(span, score))
            null = next(
                place for place, mark in enumerate(sequences["token_marks"][i]) if mark and begins[place] < 0
            )
            score = float(logits[null, 0]) + float(logits[null, 1])
            known = nothing[row]
            nothing[row] = score if known is None else min(known, score)
        return [_decoded(*row, task) for row in zip(contexts, best, nothing, strict=True)]

    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """Exact match and F1 by SQuAD's rules, each the best over a row's answers."""
        references = [label["text"] for label in outputs.need_rows(task)[task.label_column]]
        if not references:
            raise UsageError(f"task {task.name!r}: no rows to evaluate")
        answers = [row["answer"] for row in self.decode(outputs, task)]
        found = scores(answers, references, no_answer=task.option("no_answer"))
        return {name: found[name] for name in task.metrics}

    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """No answer, where rows may have none; else there is no frequent answer to give."""
        return "" if task.option("no_answer") else None

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """Metrics of no answer for all rows."""
        references = [label["text"] for label in rows[task.label_column]]
        found = scores([""] * len(references), references, no_answer=True)
        return {name: found[name] for name in task.metrics}


def no_answer_place(window: Pair, tokenizer: Any) -> int:
    """The token that is chosen where a window has no answer: [CLS], else the first special one."""
    if tokenizer.cls_token_id in window.input_ids:
        return window.input_ids.index(tokenizer.cls_token_id)
    return next((place for place, text in enumerate(window.texts) if text is None), 0)


def _answers(value: Any) -> tuple[list[str], list[int]]:
    """Texts and offsets of any of the forms; ``ValueError`` for others."""
    value = as_json(value)
    wrong = ValueError(
        f"answers {value!r} are not of the form {{'text': ['...'], 'answer_start': [character]}}"
    )
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        parts = [part if isinstance(part, dict) else {"text": part} for part in value]
        value = {
            "text": [part.get("text") for part in parts],
            "answer_start": [part.get("answer_start", -1) for part in parts],
        }
    if not isinstance(value, dict) or "text" not in value:
        raise wrong
    texts = as_json(value["text"])
    texts = [texts] if isinstance(texts, str) else texts
    starts = value.get("answer_start")
    starts = [-1] * len(texts) if starts is None else as_json(starts)
    starts = [starts] if isinstance(starts, int) else starts
    if not isinstance(texts, (list, tuple)) or not isinstance(starts, (list, tuple)):
        raise wrong
    if len(texts) != len(starts):
        raise ValueError(f"answers: {len(texts)} texts but {len(starts)} offsets (answer_start)")
    if not all(isinstance(text, str) for text in texts):
        raise wrong
    if not all(isinstance(start, int) and not isinstance(start, bool) for start in starts):
        raise wrong
    return list(texts), [int(start) for start in starts]


def _empty(value: Any) -> bool:
    try:
        return value != "" and not any(text.strip() for text in _answers(value)[0])
    except ValueError:
        return False  # prepare_label says what is wrong with it


def _locate(label: dict[str, list[Any]], context: str, column: str) -> None:
    """Look up the texts whose offset is -1; ``ValueError`` if a text is not where its offset says, or if no
    text is in the context.
    """
    for i, (text, start) in enumerate(zip(label["text"], label["answer_start"], strict=True)):
        if start < 0:
            found = context.find(text)
            if found < 0:
                other = re.search(r"\s+".join(map(re.escape, text.split())), context, re.IGNORECASE)
                if other:
                    found, label["text"][i] = other.start(), other.group()
            label["answer_start"][i] = found
        elif context[start : start + len(text)] != text:
            there = context[start : start + len(text)]
            found = context.find(text)
            hint = f"; it is at {found}" if found >= 0 else f"; it is nowhere in {column}"
            raise ValueError(f"answer {text!r} is not at character {start} of {column} ({there!r}){hint}")
    if label["answer_start"] and max(label["answer_start"]) < 0:
        raise ValueError(f"no answer is in {column}: {', '.join(map(repr, label['text'][:3]))}")


def _targets(own: Sequence[Pair], label: dict[str, list[Any]] | None, tokenizer: Any) -> list[list[int]]:
    """``token_labels`` of a row's windows; all 0 for a row without label or whose answer no window holds."""
    nothing = [[0] * len(window.input_ids) for window in own]
    if label is None:
        return nothing
    for text, start in zip(label["text"], label["answer_start"], strict=True):
        if start < 0:
            continue
        tokens = [covering(start, start + len(text), window.offsets, window.texts, 1) for window in own]
        # Where the answer begins and ends in tokens of the whole context, of which a window may hold a part.
        first = min(
            (w.offsets[part[0]][0] for w, part in zip(own, tokens, strict=True) if part), default=None
        )
        last = max(
            (w.offsets[part[-1]][1] for w, part in zip(own, tokens, strict=True) if part), default=None
        )
        targets, held = [], False
        for window, part in zip(own, tokens, strict=True):
            bits = [0] * len(window.input_ids)
            if part and (window.offsets[part[0]][0], window.offsets[part[-1]][1]) == (first, last):
                bits[part[0]] |= _START
                bits[part[-1]] |= _END
                held = True
            else:
                bits[no_answer_place(window, tokenizer)] = _START | _END
            targets.append(bits)
        if held:
            return targets
    if label["text"]:
        return nothing
    for window, bits in zip(own, nothing, strict=True):
        bits[no_answer_place(window, tokenizer)] = _START | _END
    return nothing


def _best_spans(logits: np.ndarray, longest: int, keep: int) -> list[tuple[float, int, int]]:
    """The ``keep`` best ``(score, first, last)`` of at most ``longest`` places of ``logits [places, 2]``;
    the earlier first of equals.
    """
    import numpy as np

    values = np.asarray(logits, dtype=np.float64)
    if not len(values):
        return []
    longest = min(longest, len(values))
    ends = np.concatenate([values[:, 1], np.full(longest - 1, -np.inf)])
    table = values[:, :1] + np.lib.stride_tricks.sliding_window_view(ends, longest)
    flat = table.ravel()
    keep = min(keep, flat.size)
    least = np.partition(flat, flat.size - keep)[flat.size - keep]
    candidates = np.flatnonzero((flat >= least) & np.isfinite(flat))
    order = candidates[np.argsort(-flat[candidates], kind="stable")][:keep]
    return [(float(flat[i]), int(i // longest), int(i // longest + i % longest)) for i in order]


def _decoded(
    context: str, best: dict[tuple[int, int], float], nothing: float | None, task: Task
) -> dict[str, Any]:
    ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[: int(task.option("n_best"))]
    entries = []
    for (begin, end), score in ranked:
        text = context[begin:end].strip()
        first = context.index(text, begin)
        entries.append((score, {"answer": text, "begin": first, "end": first + len(text)}))
    chosen = entries[0][1] if entries else {"answer": "", "begin": 0, "end": 0}
    if task.option("no_answer") and nothing is not None:
        none = {"answer": "", "begin": 0, "end": 0}
        if not entries or nothing - entries[0][0] > task.option("null_threshold"):
            chosen = none
        entries = sorted([*entries, (nothing, none)], key=lambda entry: -entry[0])
    if not entries:
        return {"answer": "", "score": 0.0, "begin": 0, "end": 0, "n_best": []}
    import numpy as np

    probabilities = softmax(np.array([score for score, _ in entries]))
    for (_, entry), p in zip(entries, probabilities, strict=True):
        entry["score"] = float(p)
    fields = ("answer", "score", "begin", "end")
    n_best = [{name: entry[name] for name in fields} for _, entry in entries]
    return {**{name: chosen[name] for name in fields}, "n_best": n_best}
