"""The words of the demo sentences, written for this project, in two halves that share no content word.

Training sentences use only ``LEXICONS["train"]``, validation sentences only ``LEXICONS["validation"]``. What
both use (articles, auxiliaries, prepositions, quantifiers, numbers, connectives) stands in
``FUNCTION_WORDS``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """Base form, past tense, past participle."""

    base: str
    past: str
    participle: str

    @property
    def third(self) -> str:
        """Third person singular present."""
        return plural(self.base)


@dataclass(frozen=True)
class Lexicon:
    """Content words of one half. Pairs are (word, synonym), (special, general) or (quality, opposite)."""

    people: tuple[str, ...]
    women: tuple[str, ...]
    men: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]
    acts: tuple[Verb, ...]  # on a thing; the object cannot be left out
    dealings: tuple[Verb, ...]  # with a person
    states: tuple[Verb, ...]  # no object
    moods: tuple[str, ...]  # of a person
    events: tuple[str, ...]
    picks: tuple[Verb, ...]  # on anything that is a special case of something
    kinds: tuple[tuple[str, str], ...]
    opposites: tuple[tuple[str, str], ...]
    done: tuple[str, ...]  # "managed to" and the like: it happened
    undone: tuple[str, ...]  # it did not
    unsure: tuple[str, ...]  # who knows
    works: tuple[str, ...]  # what one has an opinion of
    good: tuple[str, ...]
    bad: tuple[str, ...]
    good_nouns: tuple[str, ...]
    bad_nouns: tuple[str, ...]
    liked: tuple[str, ...]
    disliked: tuple[str, ...]
    people_synonyms: tuple[tuple[str, str], ...]
    thing_synonyms: tuple[tuple[str, str], ...]
    act_synonyms: tuple[tuple[Verb, Verb], ...]


def plural(word: str) -> str:
    """The plural of a noun, or the third person of a verb: regular spelling."""
    if word.endswith(("s", "sh", "ch", "x", "z", "o")) and word not in ("piano", "radio"):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def _verb(text: str) -> Verb:
    """``"paint"`` is regular; others are given as ``"buy:bought"`` or ``"steal:stole:stolen"``."""
    base, *rest = text.split(":")
    if rest:
        return Verb(base, rest[0], rest[-1])
    if base.endswith("e"):
        past = f"{base}d"
    elif base.endswith("y") and base[-2] not in "aeiou":
        past = f"{base[:-1]}ied"
    else:
        past = f"{base}ed"
    return Verb(base, past, past)


def _verbs(text: str) -> tuple[Verb, ...]:
    return tuple(_verb(word) for word in text.split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((first, second) for first, second in (pair.split("/") for pair in text.split()))


def _verb_pairs(text: str) -> tuple[tuple[Verb, Verb], ...]:
    return tuple((_verb(first), _verb(second)) for first, second in _pairs(text))


_TRAIN = Lexicon(
    people=_words(
        "baker pilot nurse plumber teacher tailor farmer dentist lawyer singer tourist gardener waiter "
        "soldier "
        "editor banker clerk sailor painter juggler student astronaut detective inventor"
    ),
    women=_words("woman queen mother niece waitress duchess widow"),
    men=_words("father king uncle monk nephew duke bridegroom"),
    things=_words(
        "lamp guitar bicycle vase carpet ladder blanket suitcase mirror clock kettle umbrella basket helmet "
        "candle "
        "pillow wallet telescope violin barrel"
    ),
    places=_words("station garden museum kitchen harbour market theatre tunnel office church factory stable"),
    acts=_verbs("receive repair carry borrow damage inspect polish fetch remove"),
    dealings=_verbs("praise visit thank follow ignore help interview trust"),
    states=_verbs("sleep:slept sneeze arrive vanish laugh kneel:knelt faint tremble"),
    moods=_words("tired nervous grateful famous curious lonely"),
    events=_words("parade concert lecture auction wedding exam rehearsal"),
    picks=_verbs("draw:drew:drawn photograph examine buy:bought"),
    kinds=_pairs(
        "rose/flower poodle/dog hammer/tool apple/fruit canoe/boat diamond/jewel sandwich/snack "
        "cello/instrument"
    ),
    opposites=_pairs("heavy/light wet/dry old/new dirty/spotless valuable/worthless"),
    done=_words("managed remembered"),
    undone=_words("failed refused"),
    unsure=_words("hoped planned agreed"),
    works=_words("film soup novel concert holiday lecture dessert album exhibition service"),
    good=_words(
        "delightful brilliant charming superb memorable refreshing splendid lovely impressive fascinating"
    ),
    bad=_words("dreadful boring awful disappointing clumsy tedious bland annoying miserable mediocre"),
    good_nouns=_words("treat triumph gem joy"),
    bad_nouns=_words("failure waste disaster mess"),
    liked=_words("loved praised"),
    disliked=_words("hated regretted"),
    people_synonyms=_pairs(
        "teacher/instructor lawyer/attorney pilot/aviator tourist/traveller farmer/grower"
    ),
    thing_synonyms=_pairs("bicycle/bike suitcase/bag carpet/rug umbrella/parasol barrel/cask vase/urn"),
    act_synonyms=_verb_pairs(
        "buy:bought/purchase repair/fix hide:hid:hidden/conceal find:found/discover carry/transport "
        "damage/harm"
    ),
)

_VALIDATION = Lexicon(
    people=_words(
        "doctor mechanic poet sculptor butcher driver librarian actor chemist judge carpenter neighbour "
        "porter captain "
        "drummer scientist barber coach hunter translator professor acrobat spy architect"
    ),
    women=_words("girl princess sister aunt actress heroine grandmother"),
    men=_words("boy prince brother wizard gentleman grandfather hero"),
    things=_words(
        "chair piano camera mug curtain bucket desk radio hat shovel lantern towel purse microscope trumpet "
        "bowl sofa "
        "jacket drawer sledge"
    ),
    places=_words("airport park gallery cellar valley school castle tower hotel hospital stadium attic"),
    acts=_verbs("mend throw:threw:thrown lift wrap:wrapped ruin acquire discard handle locate"),
    dealings=_verbs("admire greet warn blame rescue avoid invite scold"),
    states=_verbs("cough yawn disappear fall:fell:fallen smile shiver snore stumble"),
    moods=_words("hungry angry proud clever patient restless"),
    events=_words("match festival meeting race dinner ceremony debate"),
    picks=_verbs("sketch describe notice choose:chose:chosen"),
    kinds=_pairs(
        "carrot/vegetable sparrow/bird trout/fish oak/tree sedan/car beetle/insect ballad/song dagger/weapon"
    ),
    opposites=_pairs("big/small cheap/expensive rough/smooth hot/cold pretty/ugly"),
    done=_words("dared bothered"),
    undone=_words("forgot neglected"),
    unsure=_words("wanted intended wished"),
    works=_words("play meal book trip talk cake song musical tour speech"),
    good=_words(
        "wonderful excellent fantastic marvellous pleasant terrific magnificent satisfying outstanding "
        "amazing"
    ),
    bad=_words("terrible horrible frustrating tiresome dismal lousy weak pathetic dreary irritating"),
    good_nouns=_words("pleasure masterpiece success hit"),
    bad_nouns=_words("letdown flop nightmare insult"),
    liked=_words("enjoyed adored"),
    disliked=_words("disliked despised"),
    people_synonyms=_pairs(
        "doctor/physician scientist/researcher driver/motorist judge/magistrate professor/scholar"
    ),
    thing_synonyms=_pairs("sofa/couch mug/cup jacket/coat sledge/sled purse/handbag bucket/pail"),
    act_synonyms=_verb_pairs(
        "choose:chose:chosen/select throw:threw:thrown/toss grab:grabbed/seize mend/patch:patched "
        "ruin/destroy deliver/bring:brought"
    ),
)

LEXICONS = {"train": _TRAIN, "validation": _VALIDATION}

#: Words that both halves use; together with the lexicons every word of every sentence.
FUNCTION_WORDS = frozenset(
    _words(
        "a an the this that these those each every all some any no not never ever hardly nobody "
        "everybody everyone one anybody anything i we it they us my our himself herself who which what "
        "when where why as than then is are was were been did has have had will would could must should "
        "of to in on at by from near beside behind and but although though while even yet before after "
        "yesterday tomorrow today last next week month soon already still once twice again monday "
        "tuesday wednesday thursday friday saturday sunday morning very quite rather really more most "
        "least fewer several exactly means two three four five six seven eight nine ten eleven twelve "
        "first end far say another others wonder know expected got call thought told "
    )
)
