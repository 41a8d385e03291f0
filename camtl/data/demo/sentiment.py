"""Is the writer pleased? What counts is the construction, not which nice or nasty words occur.

Every template is used for both labels, and praise and blame occur equally often under either label: through
negation, through clauses that do not decide, through expectations that were not met.
"""

from __future__ import annotations

from camtl.data.demo.grammar import DAYS, Draw, a, sentence
from camtl.data.demo.words import Lexicon


def row(draw: Draw, words: Lexicon, label: int) -> dict[str, object]:
    """A sentence of a pleased (label 1) or displeased (label 0) writer."""
    template = draw.one(_TEMPLATES)
    return {"sentence": template(draw, words, bool(label)), "label": label}


def _adjective(draw: Draw, words: Lexicon, good: bool) -> str:
    return draw.one(words.good if good else words.bad)


def _when(draw: Draw) -> str:
    return draw.one(("last week", "yesterday", f"on {draw.one(DAYS)}", "last month", "this morning"))


def _plain(draw: Draw, words: Lexicon, good: bool) -> str:
    link = draw.one(("was", "was really", "was quite"))
    return sentence(
        f"the {draw.one(words.works)} that we had {_when(draw)} {link} {_adjective(draw, words, good)}"
    )


def _negated(draw: Draw, words: Lexicon, good: bool) -> str:
    no = draw.one(("was far from", "was anything but", "was not at all", "was hardly", "was never once"))
    return sentence(f"the {draw.one(words.works)} {_when(draw)} {no} {_adjective(draw, words, not good)}")


def _nobody(draw: Draw, words: Lexicon, good: bool) -> str:
    who = draw.one(("nobody could", "no one would", "everyone would", "anybody would"))
    inner = good if who[0] in "ea" else not good
    return sentence(f"{who} call the {draw.one(words.works)} {_when(draw)} {_adjective(draw, words, inner)}")


def _double(draw: Draw, words: Lexicon, good: bool) -> str:
    """Two negations."""
    adjective = _adjective(draw, words, good)
    work = f"the {draw.one(words.works)} {_when(draw)}"
    return sentence(
        draw.one(
            (
                f"nobody could call {work} anything but {adjective}",
                f"no one would say that {work} was not {adjective}",
                f"nobody thought {work} was not at all {adjective}",
            )
        )
    )


def _noun(draw: Draw, words: Lexicon, good: bool) -> str:
    how, turns = draw.one(
        (("was", False), ("was really", False), ("was hardly", True), ("was by no means", True))
    )
    noun = draw.one(words.good_nouns if good != turns else words.bad_nouns)
    return sentence(f"as we all know, our {draw.one(words.works)} {_when(draw)} {how} {a(noun)}")


def _contrast(draw: Draw, words: Lexicon, good: bool) -> str:
    """The clause that is not subordinate, or comes after "but", decides."""
    work, other = draw.some(words.works, 2)
    decides = f"the {work} was {_adjective(draw, words, good)}"
    yields = f"the {other} was {_adjective(draw, words, not good)}"
    return sentence(
        draw.one(
            (
                f"{yields}, but in the end {decides}",
                f"although {yields}, {decides}",
                f"{decides}, even though {yields}",
                f"while {yields}, {decides}",
            )
        )
    )


def _turn(draw: Draw, words: Lexicon, good: bool) -> str:
    first, last = _adjective(draw, words, not good), _adjective(draw, words, good)
    return sentence(
        draw.one(
            (
                f"at first the {draw.one(words.works)} was {first}, but then it was {last}",
                f"the {draw.one(words.works)} was {last} in the end, not {first} as at first",
                f"the {draw.one(words.works)} is no more {first}, but {last}",
            )
        )
    )


def _expected(draw: Draw, words: Lexicon, good: bool) -> str:
    hoped, real = _adjective(draw, words, not good), _adjective(draw, words, good)
    work = draw.one(words.works)
    return sentence(
        draw.one(
            (
                f"they told us of {a(hoped)} {work} and we got {a(real)} one",
                f"we got {a(real)} {work} where others had thought of {a(hoped)} one",
                f"everybody expected {a(hoped)} {work}, yet it was {real}",
                f"it was {a(real)} {work}, while everybody expected {a(hoped)} one",
            )
        )
    )


def _verdict(draw: Draw, words: Lexicon, good: bool) -> str:
    opinion, negated = draw.one(((" ", False), (" really ", False), (" never ", True), (" hardly ", True)))
    verb = draw.one(words.liked if good != negated else words.disliked)
    who = draw.one(("we", "I", "all of us", "the two of us"))
    return sentence(
        f"{who}{opinion}{verb} the {draw.one(words.works)} and the {draw.one(words.works)} {_when(draw)}"
    )


_TEMPLATES = (_plain, _negated, _negated, _nobody, _double, _noun, _contrast, _turn, _expected, _verdict)
