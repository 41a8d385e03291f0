"""Classification of two marked places (WiC: one word in two sentences; WSC: two phrases of one text)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError
from camtl.tasks.types._places import Offsets, covering
from camtl.tasks.types.base import Columns, HeadSpec, Where, as_text, is_missing, of_task
from camtl.tasks.types.classification import Classification, class_labels

if TYPE_CHECKING:
    from camtl.tasks.schema import Task

_BY_CHARACTERS = {"text", "start", "end"}
_BY_WORDS = {"text", "index", "span"}
_WORD = "bank"
_SENTENCES = ("The bank on the square was closed.", "We sat on the bank of the river.")


class MarkedSpans(Classification):
    """``options: {spans: [first, second]}`` says where the two places are: ``{text, start, end}`` names a
    text column and the columns of the characters (end exclusive), ``{text, index, span}`` the columns of the
    first word's number (between blanks, from 0) and of the phrase. A phrase that is not at its word is taken
    where it is nearest.

    The model reads the mean of each place beside the pooled vector. Where a text is too long, the part of it
    that holds its places is read.
    """

    name = "marked_spans"
    options: ClassVar[dict[str, Any]] = {"spans": ()}
    plain = False

    def check(self, task: Task) -> None:
        """Class names, and two places in text columns."""
        super().check(task)
        spans = task.option("spans")
        if not isinstance(spans, (list, tuple)) or len(spans) != 2:
            raise ValueError(f"options: spans must say where the two marked places are, given {spans!r}")
        for span in spans:
            if not isinstance(span, Mapping) or set(span) not in (_BY_CHARACTERS, _BY_WORDS):
                raise ValueError(
                    "options: each of spans names columns, {text, start, end} or {text, index, span}; "
                    f"given {span!r}"
                )
            if span["text"] not in task.text_columns:
                raise ValueError(f"options: spans is about {span['text']!r}, which is no text column")
            names = [name for field, name in span.items() if field != "text"]
            if not all(isinstance(name, str) and name for name in names) or names[0] == names[1]:
                raise ValueError(
                    f"options: each of spans needs two columns that say where it is, given {dict(span)!r}"
                )
        if dict(spans[0]) == dict(spans[1]):
            raise ValueError(f"options: spans must be two places, given twice {dict(spans[0])!r}")
        numbers, phrases = (
            {span[field] for span in spans for field in fields if field in span}
            for fields in (("start", "end", "index"), ("span",))
        )
        for name in sorted(numbers & phrases):
            raise ValueError(f"options: spans has {name!r} both as a number's column and as a phrase's")

    def columns(self, task: Task) -> list[str]:
        """Texts, and what says where the places are."""
        return [*task.text_columns, *(name for name in _place_columns(task))]

    def features(self, task: Task) -> dict[str, Any]:
        """Numbers for places, text for phrases."""
        return {**_place_columns(task), **super().features(task)}

    def prepare(
        self, task: Task, columns: Columns, where: Where, allow_unlabelled: bool = False
    ) -> dict[str, list[Any]]:
        """Texts, labels, and the places as given, once it is known that they are there."""
        out = super().prepare(task, columns, where, allow_unlabelled)
        named = of_task(task, where)
        for name, kind in _place_columns(task).items():
            out[name] = [
                as_text(value, name, named, i) if kind == "string" else _whole(value, name, named, i)
                for i, value in enumerate(columns[name])
            ]
        for i in range(len(out[task.text_columns[0]])):
            try:
                _places(task, out, i)
            except ValueError as error:
                raise UsageError(f"{where(i)}: task {task.name!r}: {error}") from None
        return out

    def encode(self, task: Task, rows: Columns, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Marks are 1 on the tokens of the first place, 2 on those of the second, 3 on those of both."""
        encoded = tokenizer(
            *(list(rows[column]) for column in task.text_columns),
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = encoded["input_ids"]
        types = encoded.get("token_type_ids") or [[0] * len(own) for own in ids]
        out: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": [], "token_marks": []}
        for i, own in enumerate(ids):
            texts = encoded.sequence_ids(i)
            marked = _marked(task, rows, i, encoded["offset_mapping"][i], texts)
            kept: Sequence[int] = range(len(own))
            if len(own) > max_length:
                kept = _kept(texts, [place for places in marked for place in places], max_length)
                if not kept:
                    raise UsageError(
                        f"task {task.name!r}: the marked places of {rows[task.text_columns[0]][i][:60]!r} do "
                        f"not fit into max_seq_length {max_length}; raise it"
                    )
            first, second = (set(places) for places in marked)
            out["input_ids"].append([own[place] for place in kept])
            out["token_type_ids"].append([types[i][place] for place in kept])
            out["token_marks"].append([(place in first) + 2 * (place in second) for place in kept])
        if task.label_column in rows:
            out["labels"] = class_labels(task, rows)
        return out

    def row(self, task: Task, texts: Sequence[str]) -> dict[str, Any]:
        """Texts alone do not say where the places are."""
        raise ValueError(
            f"needs more than texts; give rows as JSON Lines with {', '.join(self.columns(task))}"
        )

    def example(self, task: Task) -> dict[str, Any]:
        """A word in two sentences, which stand where the columns of the places say."""
        row: dict[str, Any] = dict.fromkeys(task.text_columns, "")
        for span, sentence in zip(task.option("spans"), _SENTENCES, strict=True):
            before = row[span["text"]]
            text = row[span["text"]] = f"{before} {sentence}".strip()
            start = text.index(_WORD, len(before))
            if "start" in span:
                row |= {span["start"]: start, span["end"]: start + len(_WORD)}
            else:
                row |= {span["index"]: len(text[:start].split()), span["span"]: _WORD}
        return {name: _SENTENCES[0] if value == "" else value for name, value in row.items()}

    def head(self, task: Task) -> HeadSpec:
        """One output per class, from the pooled vector and the two places."""
        return HeadSpec(outputs=len(task.labels or ()), reads="spans")


def _place_columns(task: Task) -> dict[str, str]:
    """The columns that say where the places are, and what they hold."""
    return {
        name: "string" if field == "span" else "int32"
        for span in task.option("spans")
        for field, name in span.items()
        if field != "text"
    }


def _whole(value: Any, column: str, where: Where, i: int) -> int:
    try:
        number = -1.0 if is_missing(value) or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if number < 0 or not number.is_integer():
        raise UsageError(f"{where(i)}: the column {column!r} is {value!r}; it must hold a number from 0")
    return int(number)


def _places(task: Task, rows: Columns, i: int) -> list[tuple[int, int, int]]:
    """``(text, begin, end)`` of both places of a row, in characters; ``ValueError`` if one is not there."""
    found = []
    for span in task.option("spans"):
        text = rows[span["text"]][i]
        if "start" in span:
            begin, end = rows[span["start"]][i], rows[span["end"]][i]
            if not begin < end <= len(text) or not text[begin:end].strip():
                raise ValueError(
                    f"characters {begin} to {end} ({span['start']}, {span['end']}) are no place in "
                    f"{span['text']}, which has {len(text)}"
                )
        else:
            begin, end = _phrase(text, rows[span["span"]][i], rows[span["index"]][i], span)
        found.append((task.text_columns.index(span["text"]), begin, end))
    return found


def _phrase(text: str, phrase: str, index: int, span: Mapping[str, str]) -> tuple[int, int]:
    """Where ``phrase`` stands, nearest to where word number ``index`` begins."""
    words = [match.start() for match in re.finditer(r"\S+", text)]
    near = words[min(index, len(words) - 1)] if words else 0
    pattern = r"\s+".join(re.escape(word) for word in phrase.split())
    if pattern:
        whole = rf"(?<!\w){pattern}(?!\w)"
        there = re.compile(whole, re.IGNORECASE).match(text, near)
        if there:
            return there.span()
        # Rather whole words, rather as it is written.
        for form, flags in ((whole, 0), (whole, re.IGNORECASE), (pattern, 0), (pattern, re.IGNORECASE)):
            places = [match.span() for match in re.finditer(form, text, flags)]
            if places:
                return min(places, key=lambda place: abs(place[0] - near))
    raise ValueError(
        f"{span['span']} {phrase!r} is not in {span['text']} (word {index} there, {span['index']}, is "
        f"{text[near:].split()[:1]})"
    )


def _marked(
    task: Task, rows: Columns, i: int, offsets: Offsets, texts: Sequence[int | None]
) -> list[list[int]]:
    """The tokens of both places."""
    marked = []
    for text, begin, end in _places(task, rows, i):
        tokens = covering(begin, end, offsets, texts, text)
        if not tokens:
            place = rows[task.text_columns[text]][i][begin:end]
            raise UsageError(f"task {task.name!r}: the marked place {place!r} has no token of its own")
        marked.append(tokens)
    return marked


def _kept(texts: Sequence[int | None], needed: Sequence[int], max_length: int) -> list[int]:
    """The tokens that remain of a sequence that is too long: special ones, and of each text its beginning,
    or the part around the ``needed`` tokens where the beginning has them not; none if they do not fit.
    """
    own = [[i for i, text in enumerate(texts) if text == number] for number in (0, 1)]
    room = max_length - sum(text is None for text in texts)
    ranges = []  # of each text, the numbers among its tokens of what must remain
    for tokens in own:
        wanted = [i for i, token in enumerate(tokens) if token in needed]
        ranges.append((wanted[0], wanted[-1] + 1) if wanted else (0, 0))
    least = [end - begin for begin, end in ranges]
    sizes = [len(tokens) for tokens in own]
    if sum(least) > room:
        return []
    while sum(sizes) > room:  # the longer text gives first, but not what must remain
        longer = 0 if (sizes[0] > sizes[1] or sizes[1] == least[1]) and sizes[0] > least[0] else 1
        sizes[longer] -= 1
    kept = [i for i, text in enumerate(texts) if text is None]
    for tokens, size, (begin, end) in zip(own, sizes, ranges, strict=True):
        start = 0 if end <= size else min(begin - (size - (end - begin)) // 2, len(tokens) - size)
        kept.extend(tokens[start : start + size])
    return sorted(kept)
