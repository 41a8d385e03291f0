"""How SQuAD (and ReCoRD after it) compares an answer with its references: exact match and F1 over words."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single blanks."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals a reference after :func:`normalised`, else 0.0."""
    return float(any(normalised(answer) == normalised(reference) for reference in references))


def f1(answer: str, references: Sequence[str], *, no_answer: bool = False) -> float:
    """The largest F1 of the answer's words with those of a reference, both :func:`normalised`.

    Where one of the two has no word, version 1.1 of SQuAD gives 0; version 2 (``no_answer``) gives 1 if
    neither has.
    """
    return max(_f1(answer, reference, no_answer) for reference in references)


def _f1(answer: str, reference: str, no_answer: bool) -> float:
    given, wanted = normalised(answer).split(), normalised(reference).split()
    if not given or not wanted:
        return float(no_answer and given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], *, no_answer: bool = False
) -> dict[str, float]:
    """``exact_match`` and ``f1``, means over answers; each has one or more references.

    With ``no_answer`` a row without a reference that holds a word has the reference "", as in SQuAD 2.
    """
    pairs = []
    for answer, given in zip(answers, references, strict=True):
        wanted = [text for text in given if normalised(text)] or [""] if no_answer else given
        pairs.append((answer, wanted))
    return {
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "f1": sum(f1(*pair, no_answer=no_answer) for pair in pairs) / len(pairs),
    }
