"""From places in a text, in characters, to places among its tokens."""

from __future__ import annotations

from collections.abc import Sequence

Offsets = Sequence[tuple[int, int]]


def first_token(begin: int, offsets: Offsets, sequence_ids: Sequence[int | None], text: int) -> int | None:
    """The first token of text number ``text`` that reaches beyond character ``begin``; None if it is cut off.

    ``offsets`` are the tokens' characters ``(begin, end)``, ``sequence_ids`` their texts (None: a special
    token).
    """
    for place, (own, (_, end)) in enumerate(zip(sequence_ids, offsets, strict=True)):
        if own == text and end > begin:
            return place
    return None


def covering(
    begin: int, end: int, offsets: Offsets, sequence_ids: Sequence[int | None], text: int
) -> list[int]:
    """The tokens of text number ``text`` that share a character with ``[begin, end)``."""
    return [
        place
        for place, (own, (first, last)) in enumerate(zip(sequence_ids, offsets, strict=True))
        if own == text and first < end and last > begin
    ]
