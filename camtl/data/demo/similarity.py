"""How alike are two sentences, 0 to 5? The score counts what the two events share, not how many words.

Who (1.0), does what (1.75), with what (1.5), where (0.5), when (0.25); a synonym or the passive changes words
but no meaning, a negation changes one word and takes 2 points (never below 0).
"""

from __future__ import annotations

from dataclasses import dataclass

from camtl.data.demo.grammar import DAYS, Draw, sentence
from camtl.data.demo.words import Lexicon, Verb

_WEIGHTS = {"who": 1.0, "act": 1.75, "thing": 1.5, "where": 0.5, "when": 0.25}
_NEGATION = 2.0


@dataclass(frozen=True)
class _Event:
    """Each part with its possible wordings; what is compared is the meaning, not the wording."""

    who: tuple[str, ...]
    act: tuple[Verb, ...]
    thing: tuple[str, ...]
    where: tuple[str, ...]
    when: tuple[str, ...]
    negative: bool = False


def row(draw: Draw, words: Lexicon, label: int) -> dict[str, object]:
    """A pair and its score; ``label`` is not used, scores come from what was changed."""
    first = _event(draw, words)
    other = _event(draw, words)
    # From "all kept" to "all changed", each as often; which parts are kept is drawn.
    kept = draw.some(tuple(_WEIGHTS), draw.below(len(_WEIGHTS) + 1))
    parts = {part: getattr(first if part in kept else other, part) for part in _WEIGHTS}
    second = _Event(**parts, negative=draw.coin(0.2))
    score = sum(weight for part, weight in _WEIGHTS.items() if getattr(first, part) == getattr(second, part))
    if second.negative:
        score = max(0.0, score - _NEGATION)
    texts = [_say(draw, first), _say(draw, second)]
    if draw.coin():
        texts.reverse()
    return {"sentence1": texts[0], "sentence2": texts[1], "label": score}


def _event(draw: Draw, words: Lexicon) -> _Event:
    return _Event(
        who=_noun(draw, words.people_synonyms, words.people),
        act=draw.one(words.act_synonyms),
        thing=_noun(draw, words.thing_synonyms, words.things),
        where=(f"{draw.one(('in', 'near', 'behind'))} the {draw.one(words.places)}",),
        when=(f"on {draw.one(DAYS)}",),
    )


def _noun(draw: Draw, pairs: tuple[tuple[str, str], ...], single: tuple[str, ...]) -> tuple[str, ...]:
    """A pair of synonyms, or a noun that has none."""
    if draw.coin(0.7):
        return draw.one(pairs)
    paired = {word for pair in pairs for word in pair}
    return (draw.one([word for word in single if word not in paired]),)


def _say(draw: Draw, event: _Event) -> str:
    who, act, thing = draw.one(event.who), draw.one(event.act), draw.one(event.thing)
    if draw.coin():
        core = f"the {thing} was {'not ' if event.negative else ''}{act.participle} by the {who}"
    else:
        core = f"the {who} {f'did not {act.base}' if event.negative else act.past} the {thing}"
    where, when = draw.one(event.where), draw.one(event.when)
    return sentence(draw.one((f"{core} {where} {when}", f"{when} {core} {where}", f"{where} {core} {when}")))
