"""A small synthetic language of opinions, labelled by construction; nothing is downloaded.

A sentence has a topic and two or three opinion clauses about things of that topic. A clause is positive or negative;
its words say so only together with their order:

* *negation*: a negator turns the opinion of its own clause, from just before the opinion word ("was not very tasty")
  or from far off ("we never found the soup to be tasty"); a negator of a neutral clause turns nothing ("the soup was
  not near the oven"), so that the position of "not" matters, not its presence;
* *position*: clauses are joined by "and" (same opinion) or "but" (the opposite one), and the **label is the opinion
  of the last clause**;
* *agreement*: determiner, noun and verb agree in number.

Counting words leaves more than a tenth of the sentences wrong, and unlabelled text is enough to learn which words and
clauses go together, so a masked language model pretrained on it knows most of what the label asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.data.labelled import Corpus, LabelledText
from fedsim.rng import Stream, generator
from fedsim.settings import DataSettings

TRAIN_SENTENCES = 6_400
TEST_SENTENCES = 800
MAX_WORDS = 30
"""No sentence has more words (punctuation counted); with the two boundary tokens that is 32."""

LABEL_NAMES = ("negative", "positive")

_TOPICS: dict[str, tuple[str, str]] = {
    # topic: (nouns, whose plural adds an s; places)
    "food": ("soup salad dessert pizza curry sauce waiter menu", "oven kitchen table counter"),
    "film": ("actor scene script ending plot trailer director camera", "screen cinema stage studio"),
    "hotel": ("room bed shower towel pillow clerk guest lift", "pool hallway balcony entrance"),
    "travel": ("train ticket driver seat flight pilot shuttle tour", "station airport border harbour"),
    "sport": ("player goal trainer game team referee race athlete", "stadium pitch court bench"),
    "music": ("song singer drummer guitar tune concert lyric violin", "hall club festival cellar"),
    "gadget": ("phone laptop charger keyboard headset speaker button cable", "desk office shop drawer"),
    "garden": ("flower tree rose hedge path gardener pond lawn", "fence gate shed greenhouse"),
}
_POSITIVE = tuple(
    "good great excellent wonderful lovely superb fantastic amazing delightful pleasant charming brilliant perfect "
    "fresh bright clever elegant fine friendly graceful happy impressive joyful kind magnificent marvellous neat nice "
    "outstanding polished refined reliable remarkable rich satisfying sharp smooth splendid stunning stylish".split()
)
_NEGATIVE = tuple(
    "bad poor awful terrible horrible dreadful nasty ugly dull boring broken cheap clumsy cold crude dirty "
    "disappointing dreary faulty feeble filthy flawed gloomy grim harsh hopeless inferior lazy messy miserable "
    "painful pathetic rotten rude shabby sloppy sour stale tedious weak".split()
)
_NEGATORS = ("not", "never", "hardly")
_FAR_NEGATORS = ("never", "hardly")
_INTENSIFIERS = ("very", "really", "so", "quite", "truly", "rather")
_PEOPLE = tuple("we they you i everybody critics friends visitors".split())
_JUDGING = tuple("found considered called thought".split())
_LIKING = {True: tuple("loved liked enjoyed praised".split()), False: tuple("hated disliked regretted blamed".split())}
_NEAR = ("near", "behind", "beside")
_TIMES = tuple("today yesterday again later finally usually often there".split())
_BE = {False: ("was", "is"), True: ("were", "are")}
_DETERMINERS = {False: ("the", "this", "that"), True: ("the", "these", "those")}
_FUNCTION_WORDS = ("to", "be", "and", "but", ",", ".")

_NEGATED = 0.2
_BUT = 0.2
_THREE_CLAUSES = 0.4
_NEUTRAL = 0.4
_NEUTRAL_NEGATED = 0.4
_JUDGED = 0.3
_ATTRIBUTE = 0.3
_LIKED = 0.15
_DESCRIPTIONS = 0.6
_PLAIN = 0.4
_LIST_UNTURNED = 0.5
_LIST_DENIED = 0.25
_LISTED = 8
_DRAWS = 80
"""Uniform numbers set aside for one sentence: more than any sentence needs."""


def _nouns(topic: str) -> tuple[str, ...]:
    return tuple(_TOPICS[topic][0].split())


def _places(topic: str) -> tuple[str, ...]:
    return tuple(_TOPICS[topic][1].split())


def topics() -> tuple[str, ...]:
    """The topics, in a fixed order: the values of the built-in corpus's ``topic`` column."""
    return tuple(_TOPICS)


def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark of the language, each once, in a fixed order (the tokenizer's)."""
    words: list[str] = [*_FUNCTION_WORDS, *_NEGATORS, *_INTENSIFIERS, *_PEOPLE]
    words += [*_JUDGING, *_LIKING[True], *_LIKING[False], *_NEAR, *_TIMES]
    words += [word for plural in (False, True) for word in (*_BE[plural], *_DETERMINERS[plural])]
    words += [*_POSITIVE, *_NEGATIVE]
    for topic in _TOPICS:
        words += [form for noun in _nouns(topic) for form in (noun, noun + "s")]
        words += _places(topic)
    return tuple(dict.fromkeys(words))


class _Draws:
    """Choices read off one row of uniform numbers, so that a sentence depends on its own row alone."""

    def __init__(self, uniforms: Sequence[float]) -> None:
        self._next = iter(uniforms).__next__

    def chance(self, probability: float) -> bool:
        return self._next() < probability

    def whole(self, low: int, high: int) -> int:
        return low + int(self._next() * (high - low))

    def pick(self, words: Sequence[str]) -> str:
        return words[int(self._next() * len(words))]

    def pick_skewed(self, words: Sequence[str]) -> str:
        """Early words more often than late ones, as in real text: a tenth of the words has a third of the uses."""
        return words[int(self._next() ** 2 * len(words))]


def _thing(draws: _Draws, topic: str, attribute: str | None) -> tuple[list[str], bool]:
    plural = draws.chance(0.5)
    noun = draws.pick(_nouns(topic)) + ("s" if plural else "")
    determiner = draws.pick(_DETERMINERS[plural])
    return [determiner, *([attribute] if attribute else []), noun], plural


def _opinion(draws: _Draws, topic: str, positive: bool) -> list[str]:
    """A clause whose opinion, negation included, is `positive`."""
    negated = draws.chance(_NEGATED)
    word = draws.pick_skewed(_POSITIVE if positive != negated else _NEGATIVE)
    intensifier = [draws.pick(_INTENSIFIERS)] if draws.chance(0.3) else []
    # An attribute is outside the negator's reach: "the tasty soup was not bad".
    attribute = draws.pick_skewed(_POSITIVE if positive else _NEGATIVE) if draws.chance(_ATTRIBUTE) else None
    thing, plural = _thing(draws, topic, attribute)
    if draws.chance(_LIKED):
        verb = draws.pick(_LIKING[positive != negated])
        return [draws.pick(_PEOPLE), *([draws.pick(_FAR_NEGATORS)] if negated else []), verb, *thing]
    judged = draws.chance(_JUDGED)
    negator = [draws.pick(_FAR_NEGATORS if judged else _NEGATORS)] if negated else []
    if judged:
        return [draws.pick(_PEOPLE), *negator, draws.pick(_JUDGING), *thing, "to", "be", *intensifier, word]
    return [*thing, draws.pick(_BE[plural]), *negator, *intensifier, word]


def _neutral(draws: _Draws, topic: str) -> list[str]:
    """A clause without opinion; its negator, if any, turns nothing."""
    thing, plural = _thing(draws, topic, None)
    negator = [draws.pick(_NEGATORS)] if draws.chance(_NEUTRAL_NEGATED) else []
    place = [draws.pick(_NEAR), "the", draws.pick(_places(topic))]
    return [*thing, draws.pick(_BE[plural]), *negator, *place, draws.pick(_TIMES)]


def _sentence(draws: _Draws) -> tuple[str, bool, str]:
    """(text, whether its last opinion is positive, topic)."""
    topic = draws.pick(tuple(_TOPICS))
    positive = draws.chance(0.5)
    clauses = 3 if draws.chance(_THREE_CLAUSES) else 2
    words = _opinion(draws, topic, positive)
    for _ in range(clauses - 1):
        turn = draws.chance(_BUT)
        positive ^= turn
        words = [*words, "but" if turn else "and", *_opinion(draws, topic, positive)]
    if draws.chance(_NEUTRAL):
        aside = _neutral(draws, topic)
        longer = [*aside, ",", *words] if draws.chance(0.5) else [*words, ",", *aside]
        words = longer if len(longer) < MAX_WORDS else words
    return " ".join([*words, "."]), positive, topic


def _sentences(rng: np.random.Generator, count: int) -> list[tuple[str, bool, str]]:
    return [_sentence(_Draws(row)) for row in rng.random((count, _DRAWS)).tolist()]


def _description(draws: _Draws) -> str:
    """A thing and a long list of opinion words: of one opinion, or some denied and the rest turned by "but"."""
    thing, plural = _thing(draws, draws.pick(tuple(_TOPICS)), None)
    positive, plain = draws.chance(0.5), draws.chance(_PLAIN)
    turn = 0 if plain or draws.chance(_LIST_UNTURNED) else draws.whole(1, _LISTED)
    words = [*thing, draws.pick(_BE[plural])]
    for place in range(_LISTED):
        turned = turn > 0 and place == turn
        positive ^= turned
        denied = not plain and draws.chance(_LIST_DENIED)
        separator = [] if place == 0 else ["but" if turned else ","]
        negator = [draws.pick(_NEGATORS)] if denied else []
        words += [*separator, *negator, draws.pick_skewed(_POSITIVE if positive != denied else _NEGATIVE)]
    return " ".join([*words, "."])


def unlabelled_text(count: int, seed: int) -> tuple[str, ...]:
    """`count` sentences without labels, for pretraining; from a stream of its own.

    Wider than the labelled text, as pretraining text is: beside sentences of the same kind it holds descriptions, whose
    long lists make plain which words go together and what negators and "but" do. Without them a small masked language
    model spends thousands of steps before it tells good from bad.
    """
    rows = generator(seed, Stream.CORPUS, 2).random((count, _DRAWS + 1))
    return tuple(
        _description(_Draws(row[1:])) if row[0] < _DESCRIPTIONS else _sentence(_Draws(row[1:]))[0]
        for row in rows.tolist()
    )


def _labelled(rng: np.random.Generator, count: int) -> LabelledText:
    rows = _sentences(rng, count)
    return LabelledText(
        texts=tuple(text for text, _, _ in rows),
        pairs=None,
        labels=np.array([positive for _, positive, _ in rows], dtype=np.int64),
        fields=tuple(topic for _, _, topic in rows),
    )


def synthetic_corpus(settings: DataSettings, seed: int) -> Corpus:
    """The built-in corpus: 6,400 training sentences (or ``max_samples``) and 800 test sentences.

    Each row is drawn on its own, so a smaller corpus is the beginning of a larger one. ``fields`` holds the topic.
    """
    return Corpus(
        train=_labelled(generator(seed, Stream.CORPUS, 0), settings.max_samples or TRAIN_SENTENCES),
        test=_labelled(generator(seed, Stream.CORPUS, 1), TEST_SENTENCES),
        label_names=LABEL_NAMES,
    )


def completions_corpus(settings: DataSettings, seed: int) -> Corpus:
    """The sentences of `synthetic_corpus`, to be completed: half of the words are the prompt, the rest the response.

    Categories are the topics. [ours; it lets a language model's study be tried without any file]
    """
    whole = synthetic_corpus(settings, seed)
    topics = tuple(sorted({*(whole.train.fields or ()), *(whole.test.fields or ())}))
    return Corpus(_halved(whole.train, topics), _halved(whole.test, topics), topics)


def _halved(rows: LabelledText, topics: tuple[str, ...]) -> LabelledText:
    words = [text.split() for text in rows.texts]
    return LabelledText(
        texts=tuple(" ".join(row[: len(row) // 2]) for row in words),
        pairs=None,
        labels=np.array([topics.index(topic) for topic in rows.fields or ()], dtype=np.int64),
        fields=rows.fields,
        responses=tuple(" ".join(row[len(row) // 2 :]) for row in words),
    )
