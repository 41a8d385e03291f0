"""Is the sentence grammatical? Faults that no single word gives away.

Each template is used as often for good as for bad sentences, and within a template each word form too: what
is wrong is always a relation between words (agreement past a nearer noun, an object that is missing or too
much, word order).
"""

from __future__ import annotations

from camtl.data.demo.grammar import Draw, sentence
from camtl.data.demo.words import Lexicon, plural


def row(draw: Draw, words: Lexicon, label: int) -> dict[str, object]:
    """A sentence that is acceptable (label 1) or not (label 0)."""
    template = draw.one(_TEMPLATES)
    return {"sentence": template(draw, words, bool(label)), "label": label}


def _number(draw: Draw, noun: str, is_plural: bool) -> str:
    return plural(noun) if is_plural else noun


def _agreement(draw: Draw, words: Lexicon, good: bool) -> str:
    """The key to the cabinets is / are ..."""
    head, near = draw.some(words.people, 2)
    many, near_many = draw.coin(), draw.coin()
    where = draw.one(("behind", "near", "beside"))
    link = draw.one((("was", "were"), ("is", "are"), ("has been", "have been")))
    verb = link[many == good]
    return sentence(
        f"the {_number(draw, head, many)} {where} the {_number(draw, near, near_many)} {verb} "
        f"{draw.one(('very', 'quite', 'rather'))} {draw.one(words.moods)}"
    )


def _relative_agreement(draw: Draw, words: Lexicon, good: bool) -> str:
    """The pilots that the nurse trusts are / is ..."""
    head, inner = draw.some(words.people, 2)
    many, inner_many = draw.coin(), draw.coin()
    verb = draw.one(words.dealings)
    inner_verb = verb.base if inner_many else verb.third
    outer = draw.one((("was", "were"), ("is", "are")))[many == good]
    return sentence(
        f"the {_number(draw, head, many)} that the {_number(draw, inner, inner_many)} {inner_verb} {outer} "
        f"{draw.one(words.moods)} {draw.one(('today', 'again', 'already'))}"
    )


def _determiner(draw: Draw, words: Lexicon, good: bool) -> str:
    """These lamps / this lamps ..."""
    thing, person = draw.one(words.things), draw.one(words.people)
    many = draw.coin()
    determiner = draw.one((("this", "these"), ("that", "those"), ("each", "all"), ("another", "several")))[
        many == good
    ]
    verb = draw.one(words.acts)
    return sentence(
        f"{draw.one(('the', 'my', 'our'))} {person} {verb.past} {determiner} {_number(draw, thing, many)} "
        f"{draw.one(('near', 'behind'))} the {draw.one(words.places)}"
    )


def _object(draw: Draw, words: Lexicon, good: bool) -> str:
    """A verb that needs an object without one, or one that takes none with one."""
    needs = draw.coin()
    verb = draw.one(words.acts if needs else words.states)
    thing = draw.one(words.things)
    if needs == good:
        middle = f"the {thing}"
    else:
        middle = f"{draw.one(('beside', 'near', 'behind'))} the {thing}"
    return sentence(
        f"the {draw.one(words.people)} {verb.past} {middle} {draw.one(('before', 'after'))} the "
        f"{draw.one(words.events)}"
    )


def _gap(draw: Draw, words: Lexicon, good: bool) -> str:
    """What did the pilot buy (the lamp)?"""
    asks_what = draw.coin()
    start = "what did" if asks_what else draw.one(("did", "when did", "why did"))
    with_object = asks_what != good
    thing = f"{draw.one(('the', 'this', 'my'))} {draw.one(words.things)}" if with_object else ""
    return sentence(
        f"{start} the {draw.one(words.people)} {draw.one(words.acts).base} {thing} "
        f"{draw.one(('in', 'near', 'behind'))} the {draw.one(words.places)}",
        "?",
    )


def _inversion(draw: Draw, words: Lexicon, good: bool) -> str:
    """Direct questions invert subject and auxiliary, indirect ones do not."""
    direct = draw.coin()
    helper, form = draw.one(
        (("has", "participle"), ("had", "participle"), ("will", "base"), ("should", "base"))
    )
    verb = getattr(draw.one(words.acts), form)
    subject = f"the {draw.one(words.people)}"
    clause = f"{helper} {subject} {verb}" if direct == good else f"{subject} {helper} {verb}"
    which = f"which {draw.one(words.things)} {clause} {draw.one(('today', 'again', 'this week'))}"
    if direct:
        return sentence(which, "?")
    return sentence(f"{draw.one(('i wonder', 'they know', 'we know')).replace('i ', 'I ')} {which}")


def _reflexive(draw: Draw, words: Lexicon, good: bool) -> str:
    """The mother of the kings praised herself / themselves."""
    woman = draw.coin()
    head, near = draw.one(words.women), draw.one(words.men)
    if not woman:
        head, near = near, head
    verb = draw.one(words.dealings)
    own, wrong = ("herself", "himself") if woman else ("himself", "herself")
    return sentence(
        f"the {head} {draw.one(('near', 'behind', 'beside'))} the {near} {draw.one(('has', 'had'))} "
        f"{verb.participle} "
        f"{own if good else wrong} {draw.one(('again', 'twice', 'already'))}"
    )


def _time(draw: Draw, words: Lexicon, good: bool) -> str:
    """... will buy the lamp tomorrow / yesterday."""
    future = draw.coin()
    verb = draw.one(words.acts)
    when = draw.one((("yesterday", "tomorrow"), ("last week", "next week"), ("last month", "next month")))[
        future == good
    ]
    return sentence(
        f"{draw.one(('the', 'my', 'our'))} {draw.one(words.people)} "
        f"{'will ' + verb.base if future else verb.past} "
        f"the {draw.one(words.things)} near the {draw.one(words.places)} {when}"
    )


def _ever(draw: Draw, words: Lexicon, good: bool) -> str:
    """No pilot who knows the nurses has ever ... / the pilot who knows no nurses has ever ..."""
    subject, other = draw.some(words.people, 2)
    first, second = ("no", "the") if good else ("the", "no")
    verb = draw.one(words.acts)
    return sentence(
        f"{first} {subject} who {draw.one(words.dealings).past} {second} {other} has ever {verb.participle} "
        f"{draw.one(('a', 'any', 'this'))} {_plain_thing(draw, words)}"
    )


def _verb_form(draw: Draw, words: Lexicon, good: bool) -> str:
    """... has hidden / has hide ...; will hide / will hidden ..."""
    perfect = draw.coin()
    verb = draw.one(words.acts)
    helper = draw.one(("has", "had") if perfect else ("will", "could", "must"))
    form = verb.participle if perfect == good else verb.base
    return sentence(
        f"the {draw.one(words.people)} {draw.one(('from', 'near'))} the {draw.one(words.places)} {helper} "
        f"{draw.one(('never', 'already', 'soon', 'still'))} {form} the {draw.one(words.things)}"
    )


def _article_place(draw: Draw, words: Lexicon, good: bool) -> str:
    """... carried the lamp / carried lamp the."""
    person, thing, place = draw.one(words.people), draw.one(words.things), draw.one(words.places)
    phrases = [f"the {person}", f"the {thing}", f"the {place}"]
    if not good:
        wrong = draw.below(3)
        phrases[wrong] = " ".join(reversed(phrases[wrong].split()))
    who, what, where = phrases
    return sentence(f"{who} {draw.one(words.acts).past} {what} {draw.one(('near', 'in', 'behind'))} {where}")


def _helper_place(draw: Draw, words: Lexicon, good: bool) -> str:
    """... has already carried / carried has already."""
    helper, form = draw.one(
        (("has", "participle"), ("had", "participle"), ("will", "base"), ("must", "base"))
    )
    adverb, verb = draw.one(("never", "already", "once", "really")), getattr(draw.one(words.acts), form)
    inner = (
        f"{helper} {adverb} {verb}"
        if good
        else draw.one((f"{verb} {helper} {adverb}", f"{adverb} {verb} {helper}"))
    )
    return sentence(
        f"the {draw.one(words.people)} {inner} {draw.one(('a', 'my', 'the', 'this'))} "
        f"{_plain_thing(draw, words)}"
    )


def _preposition_place(draw: Draw, words: Lexicon, good: bool) -> str:
    """... near the market / the market near."""
    where, place = draw.one(("near", "in", "behind")), f"the {draw.one(words.places)}"
    phrase = f"{where} {place}" if good else f"{place} {where}"
    if draw.coin():
        return sentence(
            f"the {draw.one(words.people)} {phrase} {draw.one(words.acts).past} the {draw.one(words.things)}"
        )
    return sentence(
        f"the {draw.one(words.people)} {draw.one(words.states).past} {phrase} "
        f"{draw.one(('again', 'once', 'twice'))}"
    )


def _plain_thing(draw: Draw, words: Lexicon) -> str:
    return draw.one([thing for thing in words.things if thing[0] not in "aeiou"])


def _adverb_place(draw: Draw, words: Lexicon, good: bool) -> str:
    """A very heavy lamp / a heavy very lamp."""
    adjective = draw.one(draw.one(words.opposites))
    degree = draw.one(("very", "rather", "really", "quite"))
    inner = f"{degree} {adjective}" if good else f"{adjective} {degree}"
    return sentence(
        f"the {draw.one(words.people)} {draw.one(words.acts).past} the {inner} {draw.one(words.things)} "
        f"in the {draw.one(words.places)}"
    )


# Word order is easier to learn than agreement and argument structure: a mixture is neither hopeless nor
# trivial.
_WORD_ORDER = (_article_place, _helper_place, _preposition_place, _adverb_place)
_TEMPLATES = (
    *4 * _WORD_ORDER,
    _agreement,
    _relative_agreement,
    _determiner,
    _object,
    _gap,
    _inversion,
    _reflexive,
    _time,
    _ever,
    _verb_form,
)
