"""Small helpers of the sentence templates: reproducible draws, articles, capital letters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class Draw:
    """Random choices that stay the same over Python versions (only ``random()`` itself is promised to)."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("/".join(map(str, seed)))

    def below(self, n: int) -> int:
        """A whole number from 0 to n-1."""
        return int(self._random.random() * n)

    def coin(self, p: float = 0.5) -> bool:
        """True with probability p."""
        return self._random.random() < p

    def one(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], n: int) -> list[T]:
        """n different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(n)]


def a(noun: str) -> str:
    """The noun phrase with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("u") else f"a {noun}"


def sentence(text: str, end: str = ".") -> str:
    """First letter upper case, one space between words, a full stop."""
    text = " ".join(text.split())
    return f"{text[0].upper()}{text[1:]}{end}"
