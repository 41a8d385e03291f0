"""Two texts in one sequence, where one of them may be too long: cut, or read in windows that overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from camtl.errors import UsageError
from camtl.tasks.types._places import Offsets

if TYPE_CHECKING:
    from camtl.tasks.schema import Task

#: Tokens that a question must leave for the text beside it: with fewer there are windows without end.
LEAST_ROOM = 8


@dataclass(frozen=True)
class Pair:
    """One sequence: its tokens, where they stand in their text (``offsets``), and in which (``texts``: 0, 1,
    None for special tokens). ``row`` is the number of its row, which may have several.
    """

    row: int
    input_ids: list[int]
    token_type_ids: list[int]
    offsets: Offsets
    texts: Sequence[int | None]

    def places(self) -> list[int]:
        """The tokens of the second text, those that stand for a character of it."""
        return [
            place
            for place, (own, (begin, end)) in enumerate(zip(self.texts, self.offsets, strict=True))
            if own == 1 and end > begin
        ]


def windows(
    task: Task, asked: Sequence[str], texts: Sequence[str], tokenizer: Any, max_length: int, stride: int
) -> list[list[Pair]]:
    """The windows on the second text of every row, in its order.

    Neighbours share ``stride`` tokens, or half a window where that is less. A row's windows do not depend
    on the other rows. Raises :class:`UsageError` if what is asked leaves less than ``LEAST_ROOM`` tokens.
    """
    alone = tokenizer(list(asked), add_special_tokens=False, return_attention_mask=False, verbose=False)
    special = int(tokenizer.num_special_tokens_to_add(pair=True))
    by_overlap: dict[int, list[int]] = {}
    for row, ids in enumerate(alone["input_ids"]):
        room = max_length - special - len(ids)
        if room < LEAST_ROOM:
            raise UsageError(
                f"task {task.name!r}: {task.text_columns[0]} {_brief(asked[row])} has {len(ids)} tokens and "
                f"leaves {max(0, room)} for {task.text_columns[1]}, at least {LEAST_ROOM} are needed; raise "
                f"max_seq_length ({max_length}) or shorten it"
            )
        by_overlap.setdefault(min(stride, room // 2), []).append(row)
    found: list[list[Pair]] = [[] for _ in asked]
    for overlap, rows in by_overlap.items():
        for own in _encoded(
            asked, texts, rows, tokenizer, truncation="only_second", max_length=max_length, stride=overlap
        ):
            found[own.row].append(own)
    return found


def cut_first(first: Sequence[str], second: Sequence[str], tokenizer: Any, max_length: int) -> list[Pair]:
    """One sequence a row, tokens being taken from the first text; only where the second alone leaves no room
    for a token of it, from the longer of the two.
    """
    alone = tokenizer(list(second), add_special_tokens=False, return_attention_mask=False, verbose=False)
    room = max_length - int(tokenizer.num_special_tokens_to_add(pair=True))
    fits = [len(ids) < room for ids in alone["input_ids"]]
    found: dict[int, Pair] = {}
    for fit, truncation in ((True, "only_first"), (False, "longest_first")):
        rows = [row for row, own in enumerate(fits) if own == fit]
        if rows:
            pairs = _encoded(first, second, rows, tokenizer, truncation=truncation, max_length=max_length)
            found.update((own.row, own) for own in pairs)
    return [found[row] for row in range(len(fits))]


def _encoded(
    first: Sequence[str], second: Sequence[str], rows: Sequence[int], tokenizer: Any, **arguments: Any
) -> Iterator[Pair]:
    encoded = tokenizer(
        [first[row] for row in rows],
        [second[row] for row in rows],
        padding=False,
        return_overflowing_tokens="stride" in arguments,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        return_attention_mask=False,
        **arguments,
    )
    ids = encoded["input_ids"]
    types = encoded.get("token_type_ids") or [[0] * len(own) for own in ids]
    for i, sample in enumerate(encoded.get("overflow_to_sample_mapping", range(len(ids)))):
        yield Pair(rows[sample], ids[i], types[i], encoded["offset_mapping"][i], encoded.sequence_ids(i))


def shortest(tokenizer: Any) -> int:
    """The least ``max_length``: a token of what is asked, and room for a window."""
    return int(tokenizer.num_special_tokens_to_add(pair=True)) + 1 + LEAST_ROOM


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
