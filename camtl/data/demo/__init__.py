"""Four small tasks made by templates, so that the whole path runs without any download.

The sentences come from templates and word lists written for this project. Training and validation sentences
share no content word, so a model must have learned the construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from camtl.data.demo import acceptability, entailment, sentiment, similarity
from camtl.data.demo.grammar import Draw
from camtl.data.demo.words import FUNCTION_WORDS, LEXICONS, Lexicon
from camtl.errors import UsageError

Row = Callable[[Draw, Lexicon, int], dict[str, object]]

#: Task name -> (what makes a row, number of labels to balance).
_TASKS: dict[str, tuple[Row, int]] = {
    "demo_acceptability": (acceptability.row, 2),
    "demo_sentiment": (sentiment.row, 2),
    "demo_entailment": (entailment.row, 3),
    "demo_similarity": (similarity.row, 1),
}
#: Rows made by default.
ROWS = {"train": 1200, "validation": 240}


def generate(name: str, split: str, rows: int | None = None, seed: int = 0) -> dict[str, list[Any]]:
    """The columns of a demo task's ``split`` ("train" or "validation"): its text columns and "label".

    Labels are class ids, equally often, or scores from 0 to 5. No row occurs twice; the same arguments give
    the same rows, and fewer rows are the first of more.
    """
    if name not in _TASKS or split not in LEXICONS:
        raise UsageError(
            f"there is no demo data {name!r} {split!r}; tasks: {', '.join(_TASKS)}; splits: "
            f"{', '.join(LEXICONS)}"
        )
    make, labels = _TASKS[name]
    rows = ROWS[split] if rows is None else rows
    draw = Draw("camtl demo", name, split, seed)
    columns: dict[str, list[Any]] = {}
    seen: set[tuple[str, ...]] = set()
    order: list[int] = []
    attempts = 0
    while len(seen) < rows:
        attempts += 1
        if attempts > 100 * rows + 1000:
            raise UsageError(f"{name}: the templates do not give {rows} different rows; ask for fewer")
        # Labels in shuffled blocks: balanced in every stretch of the data.
        order = order or draw.some(range(labels), labels)
        made = make(draw, LEXICONS[split], order[-1])
        texts = tuple(str(value) for column, value in made.items() if column != "label")
        if texts in seen:
            continue
        order.pop()
        seen.add(texts)
        for column, value in made.items():
            columns.setdefault(column, []).append(value)
    return columns


__all__ = ["FUNCTION_WORDS", "LEXICONS", "ROWS", "generate"]
