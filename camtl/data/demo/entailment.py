"""Does the hypothesis follow from the premise (0), may it or may it not hold (1), or can it not hold (2)?

In every template the hypothesis is drawn first, without regard to the label, so it alone says nothing; then a
premise is made that gives the label.
"""

from __future__ import annotations

from collections.abc import Callable

from camtl.data.demo.grammar import DAYS, NUMBERS, Draw, a, sentence
from camtl.data.demo.words import Lexicon, plural

ENTAILMENT, NEUTRAL, CONTRADICTION = 0, 1, 2


def row(draw: Draw, words: Lexicon, label: int) -> dict[str, object]:
    """A pair of sentences with the given label."""
    template = draw.one(_TEMPLATES)
    premise, hypothesis = template(draw, words, label)
    return {"premise": sentence(premise), "hypothesis": sentence(hypothesis), "label": label}


def _relation(premise: tuple[str, int], hypothesis: tuple[str, int]) -> int:
    """Labels among statements (quantifier, kind) with kind 0 the special and 1 the general word."""
    (q, k), (r, j) = premise, hypothesis
    if q == "no" and r == "no":
        return ENTAILMENT if k >= j else NEUTRAL
    if q != "no" and r != "no":
        stronger = q == "every" or r == "some"
        return ENTAILMENT if stronger and k <= j else NEUTRAL
    positive, negative = (k, j) if r == "no" else (j, k)
    return CONTRADICTION if positive <= negative else NEUTRAL


_STATEMENTS = [(q, k) for q in ("every", "some", "no") for k in (0, 1)]
_QUANTIFIERS = {"every": ("every", "each"), "some": ("some", "at least one"), "no": ("no", "not one")}


def _quantifiers(draw: Draw, words: Lexicon, label: int) -> tuple[str, str]:
    """Every pilot bought a rose. Some pilot bought a flower."""
    # A quantifier has two words, so even a statement that only follows from itself has another wording.
    hypothesis = draw.one(_STATEMENTS)
    premise = draw.one([s for s in _STATEMENTS if _relation(s, hypothesis) == label])
    pair = draw.one(words.kinds)
    person, verb = draw.one(words.people), draw.one(words.picks)
    form = draw.below(2)

    def say(statement: tuple[str, int], wording: int) -> str:
        q, kind = statement
        return f"{_QUANTIFIERS[q][wording]} {person} {verb.past} {a(pair[kind])}"

    place = f" in the {draw.one(words.places)}"
    return say(premise, 1 - form) + place, say(hypothesis, form) + place


def _voice(draw: Draw, words: Lexicon, label: int) -> tuple[str, str]:
    """Active and passive, who to whom, with and without negation."""
    first, second = draw.some(words.people, 2)
    verb = draw.one(words.dealings)
    negative, passive = draw.coin(), draw.coin()
    when = draw.one(("yesterday", "last week", "last month", "this morning", f"on {draw.one(DAYS)}"))

    def say(subject: str, other: str, no: bool, turned: bool, where: str = "") -> str:
        if turned:
            return f"the {other} was {'not ' if no else ''}{verb.participle} by the {subject}{where} {when}"
        did = f"did not {verb.base}" if no else verb.past
        return f"the {subject} {did} the {other}{where} {when}"

    hypothesis = say(first, second, negative, passive)
    where = f" {draw.one(('near', 'behind', 'in'))} the {draw.one(words.places)}" if draw.coin() else ""
    if label == NEUTRAL:
        return say(second, first, draw.coin(), draw.coin(), where), hypothesis
    no = negative == (label == ENTAILMENT)
    # The same voice and words again would be too plain an entailment.
    turned = not passive if label == ENTAILMENT else draw.coin()
    # "did not praise ... in the garden" leaves praise elsewhere open: a negated premise goes without a place.
    return say(first, second, no, turned, "" if no else where), hypothesis


def _order(draw: Draw, words: Lexicon, label: int) -> tuple[str, str]:
    """Before and after, over three events."""
    one, two, three = (f"the {event}" for event in draw.some(words.events, 3))
    before = draw.coin()
    word, reverse = ("before", "after") if before else ("after", "before")
    hypothesis = f"{one} was {word} {two}"
    if label == NEUTRAL:
        premise = draw.one(
            (
                f"{one} and {two} were {draw.one(('before', 'after'))} {three}",
                f"{three} was {draw.one(('before', 'after'))} {two} and {one}",
            )
        )
    else:
        # ahead: the order in which ``one`` stands to ``two`` by the premise.
        ahead, behind = (word, reverse) if label == ENTAILMENT else (reverse, word)
        premise = draw.one(
            (
                f"{two} was {behind} {one} and {three}",
                f"{one} was {ahead} {three} and {three} was {ahead} {two}",
                f"{two} and {three} were {behind} {one}",
            )
        )
    return premise, hypothesis


def _counts(draw: Draw, words: Lexicon, label: int) -> tuple[str, str]:
    """Exactly seven, more than five, fewer than nine."""
    threshold = 3 + draw.below(len(NUMBERS) - 6)
    more = draw.coin()
    person, verb, thing = draw.one(words.people), draw.one(words.acts), plural(draw.one(words.things))
    hypothesis = f"the {person} {verb.past} {'more' if more else 'fewer'} than {NUMBERS[threshold]} {thing}"
    above = more == (label == ENTAILMENT)
    step = 1 + draw.below(2)
    if label == NEUTRAL:
        # The premise has a bound of its own that leaves the threshold open; where the bounds look opposite
        # ways they must overlap by a whole number.
        same = draw.coin(0.7)
        if more == same:
            amount = f"more than {NUMBERS[threshold - step - (0 if same else 1)]}"
        else:
            amount = f"fewer than {NUMBERS[threshold + step + (0 if same else 1)]}"
    else:
        number = threshold + step if above else threshold - step
        bound = "at least" if above else "at most"
        amount = f"{draw.one(('exactly', bound, bound))} {NUMBERS[number]}"
    return (
        f"the {person} {verb.past} {amount} {thing} {draw.one(('yesterday', 'last week', 'this morning'))}",
        hypothesis,
    )


def _attempt(draw: Draw, words: Lexicon, label: int) -> tuple[str, str]:
    """Managed to, failed to, hoped to."""
    person, verb, thing = draw.one(words.people), draw.one(words.acts), draw.one(words.things)
    negative = draw.coin()
    rest = f"the {thing} {draw.one(('near', 'behind', 'in'))} the {draw.one(words.places)}"
    hypothesis = f"the {person} {f'did not {verb.base}' if negative else verb.past} {rest}"
    happened = (label == ENTAILMENT) != negative
    word = draw.one(words.unsure if label == NEUTRAL else words.done if happened else words.undone)
    when = draw.one(("yesterday", "last week", "this morning", f"on {draw.one(DAYS)}"))
    return f"{draw.one((f'{when} the', 'the'))} {person} {word} to {verb.base} {rest}", hypothesis


def _quality(draw: Draw, words: Lexicon, label: int) -> tuple[str, str]:
    """The heavy lamp ...: the lamp that the pilot carried was light."""
    thing, other = draw.some(words.things, 2)
    pair = draw.one(words.opposites)
    side = draw.below(2)
    person, verb = draw.one(words.people), draw.one(words.acts)
    hypothesis = f"the {thing} that the {person} {verb.past} was {pair[side]}"
    mine = {ENTAILMENT: pair[side], CONTRADICTION: pair[1 - side], NEUTRAL: ""}[label]
    # The other thing has the quality too or its opposite, whatever the label.
    theirs = draw.one(pair) if label == NEUTRAL or draw.coin() else ""
    parts = [f"the {mine} {thing}", f"the {theirs} {other}"]
    if draw.coin():
        parts.reverse()
    return f"the {person} {verb.past} {parts[0]} and {parts[1]}", hypothesis


_TEMPLATES: tuple[Callable[[Draw, Lexicon, int], tuple[str, str]], ...] = (
    _quantifiers,
    _voice,
    _order,
    _counts,
    _attempt,
    _quality,
)
