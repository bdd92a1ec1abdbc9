"""A story again, of somebody else: another name, and other animals, trades or treasures.

The stories were written by one model, which has its favourites. Who learns from them alone learns
to tell of those, whoever was asked for. What takes their places here follows from nothing but the
question, so training has to look there.

Knows:        which words may stand for each other.
Ignorant of:  questions, tokens, how often it is used.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.demo_model.asked import names_of


def _words(lines: Iterable[str]) -> list[str]:
    return " ".join(lines).split()


_LISTS = json.loads(Path(__file__).with_name("words.json").read_text("utf-8"))
WOMEN, MEN = _words(_LISTS["women"]), _words(_LISTS["men"])
# Of one kind, and of regular plurals; none that is a verb as well or half of a usual compound.
KINDS = [_words(lines) for lines in _LISTS["kinds"].values()]
_SYLLABLES = {name: _words(lines) for name, lines in _LISTS["syllables"].items()}
LISTED = 0.25  # of names, those of a list; the others are made up
MOST_WORDS = 2  # of the story that others take the place of
_WORDS = {word: kind for kind in KINDS for word in kind}
_SHE, _HE = re.compile(r"\b[Ss]he\b|\bher\b"), re.compile(r"\b[Hh]e\b|\bhis\b|\bhim\b")
_PLACE = r"\b(?:of|in|at|near|from|into) {0}\b(?!')|\b{0} [A-Z]|\b[A-Z][a-z]+ {0}\b|\b[Tt]he {0}\b"


def varied(prompt: str, text: str) -> tuple[str, str]:
    """Both with the same other words, always the same for the same text; as they were where none of
    the words that can be exchanged is there.
    """
    draw = random.Random(text[::-1])
    others = {**_other_name(text, draw), **_other_words(text, draw)}
    return _put(others, prompt), _put(others, text)


def plural(word: str) -> str:
    """Of a regular noun."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")


def _other_name(text: str, draw: random.Random) -> dict[str, str]:
    """For the one most often told of, where all the story says whether it is a woman or a man."""
    names = names_of(text).most_common(1)
    women, men = len(_SHE.findall(text)), len(_HE.findall(text))
    if not names or names[0][1] < 3 or max(women, men) < 4 * min(women, men) + 3:
        return {}
    name = names[0][0]
    if len(re.findall(_PLACE.format(name), text)) * 4 > len(re.findall(rf"\b{name}\b", text)):
        return {}
    while True:
        listed = draw.choice(WOMEN if women > men else MEN)
        other = listed if draw.random() < LISTED else made_up_name(draw, woman=women > men)
        if other not in text:
            return {name: other}


def made_up_name(draw: random.Random, *, woman: bool) -> str:
    """One that nobody need ever have had: names of a list are learnt by heart, not looked up."""
    beginnings, vowels = _SYLLABLES["beginnings"], _SYLLABLES["vowels"]
    ends = _SYLLABLES["ends of women" if woman else "ends of men"]
    syllables = [draw.choice(beginnings) + draw.choice(vowels) for _ in range(draw.choice((1, 2)))]
    return "".join((*syllables, draw.choice(beginnings), draw.choice(ends))).capitalize()


def _other_words(text: str, draw: random.Random) -> dict[str, str]:
    """For those of KINDS that come up more than once."""
    words = Counter(re.findall(r"(?<![\w-])[a-z]+(?![\w-])", text))
    found = [w for w in _WORDS if words[w] > 0 and words[w] + words[plural(w)] > 1]
    found.sort(key=lambda w: -words[w])
    others: dict[str, str] = {}
    for word in found[:MOST_WORDS]:
        free = [w for w in _WORDS[word] if words[w] + words[plural(w)] == 0]
        other = draw.choice([w for w in free if w not in others.values()])
        others |= {word: other, plural(word): plural(other)}
    return others


def _put(others: Mapping[str, str], text: str) -> str:
    """Put them in, with the articles that they take."""
    if not others:
        return text
    either = "|".join(sorted(map(re.escape, others), key=len, reverse=True))

    def exchanged(found: re.Match[str]) -> str:
        word = found["word"]
        other = others.get(word) or others[word.lower()].capitalize()
        article = found["article"]
        if article is None:
            return other
        vowel = other[0].lower() in "aeiou" and not other.lower().startswith("uni")
        return f"{article[0]}{'n' if vowel else ''} {other}"

    found = rf"(?<![\w-])(?P<article>[Aa]n? )?(?P<word>{either}|{either.title()})(?![\w-])"
    return re.sub(found, exchanged, text)
