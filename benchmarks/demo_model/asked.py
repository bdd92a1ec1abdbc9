"""What else people might have asked who got this story: it is about whom and what it tells of.

The prompts of the data are of a few patterns, most of them a title. Whoever types "tell me a story
about a lighthouse keeper called Ines" is to get one too, and it is to be about her: so names and
things of a story are put into questions, from which training learns to bring them back.

Knows:        English, as far as the words around a word tell names and nouns.
Ignorant of:  tokens, how often each question is used.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

# What a story of a set may be called.
KINDS: Mapping[str, Sequence[str]] = {
    "stories": ("a story", "a story", "a short story", "a little story"),
    "simplebooks": ("a simple story",),
    "fairy": ("a fairy tale", "an old fairy tale"),
}
QUESTIONS = (
    "tell me {kind} about {of}.",
    "tell me {kind} about {of}.",
    "tell me {kind} about {of}",
    "write {kind} about {of}.",
    "please tell me {kind} about {of}.",
    "can you tell me {kind} about {of}?",
    "write me {kind} about {of}.",
    "I would like {kind} about {of}.",
    "{kind} about {of}, please.",
)
BY_TITLE = ('Tell me {kind} called "{title}".', "Write {kind} called {title}.")
CALLED = ("called", "named")
FIRST_WORDS = 40  # characters of a prompt that say what it asks for
COMMON = 0.06  # of all stories: what more of them tell of says nothing of one

_STORY = re.compile(r"\b(?:story|tale|narrative|novel)\b")
_TITLE = re.compile(r"called `?([^`]+?)`?\.?$")
_NAMED = re.compile(r"\b(an? (?:[a-z-]+ ){0,3}?[a-z]+),? (?:named|called) ([A-Z][a-z]+)")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")  # not where sentences begin
_NO_NAMES = frozenset({"The", "And", "But", "She", "His", "Her", "They", "Mrs", "Miss"})
# A noun stands behind an article and before what is none.
_NOUN = re.compile(
    r"\b(?:[Aa]n?|[Tt]he) (?:[a-z-]+ )?([a-z]{3,})"
    r"(?=[.,;!?]| (?:was|had|is|were|and|of|in|on|with|who|that|to|for|as)\b)"
)


def nouns_of(text: str) -> Counter[str]:
    """Words in a noun's place, and how often."""
    return Counter(_NOUN.findall(text))


def common_nouns(texts: Iterable[str]) -> frozenset[str]:
    """Those that many texts have."""
    of_each = [nouns_of(text).keys() for text in texts]
    found = Counter(noun for nouns in of_each for noun in nouns)
    return frozenset(noun for noun, n in found.items() if n > COMMON * len(of_each))


def questions(prompt: str, text: str, kinds: Sequence[str], common: Set[str]) -> Iterator[str]:
    """As many as are taken, the same for the same text.  kinds: what it may be called.

    The prompt itself where it asks for no story, or nothing is found that the story is about.
    """
    draw = random.Random(text)
    is_story = _STORY.search(prompt[:FIRST_WORDS]) is not None
    subjects = _subjects(text, common, draw) if is_story else []
    title = _TITLE.search(prompt) if is_story else None
    while True:
        kind = draw.choice(kinds)
        if "bedtime" in prompt and draw.random() < 0.3:
            kind = "a bedtime story"
        if title is not None and (not subjects or draw.random() < 0.15):
            yield draw.choice(BY_TITLE).format(kind=kind, title=title[1])
        elif subjects:
            question = draw.choice(QUESTIONS).format(kind=kind, of=draw.choice(subjects))
            yield question if draw.random() < 0.1 else question[0].upper() + question[1:]
        else:
            yield prompt


def _subjects(text: str, common: Set[str], draw: random.Random) -> list[str]:
    """What it can be said to be about, in several ways."""
    nouns = [noun for noun, n in nouns_of(text).most_common() if n > 1 and noun not in common][:4]
    things = [_introduced(noun, text) for noun in nouns]
    named = _NAMED.search(text[:1500])
    names = Counter(name for name in _NAME.findall(text) if name not in _NO_NAMES)
    who = [name for name, n in names.most_common(2) if n > 2]
    people = [] if named is None else [f"{named[1]} {draw.choice(CALLED)} {named[2]}"]
    people += who[:1]
    found = [*people, *([" and ".join(who)] if len(who) > 1 else [])]
    for thing in things:
        found += [f"{person} and {thing}" for person in people] or [thing]
    if len(things) > 1:
        found += [f"{things[0]} and {things[1]}", f"{things[1]} and {things[0]}"]
        found += [f"{person}, {things[0]} and {things[1]}" for person in people]
    return found


def _introduced(noun: str, text: str) -> str:
    """With what stands before it where it comes in first, such as "a hidden cave"."""
    found = re.search(rf"\b(an? (?:[a-z-]+ )?{noun})\b", text)
    if found is not None:
        return found[1]
    return noun if noun.endswith("s") else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
