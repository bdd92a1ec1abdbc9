"""What else people might have asked who got this story: it is about whom and what it tells of.

The prompts of the data are of a few patterns, most of them a title. Whoever types "tell me a story
about a lighthouse keeper called Ines" is to get one too, and it is to be about her: so names and
things of a story are put into questions, from which training learns to bring them back.

Knows:        English, as far as the words around a word tell names and nouns.
Ignorant of:  tokens, how often training asks so instead of by the prompt.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

SETS = frozenset({"stories", "simplebooks", "fairy"})  # those that hold stories
SHORT, LONG = 400, 540  # words of a story: over a quarter have fewer, a quarter more
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
FIRST_CHARACTERS = 40  # of a prompt, which say what it asks for
COMMON = 0.06  # of all stories: what more of them tell of says nothing of one
MOSTLY_A_NOUN = 0.25  # of the times that a noun comes up, at least, it stands in a noun's place
MOST_THINGS = 4  # of a story that are asked for
EARLY = 0.5  # of a story: what it is about has come in by then
BY_TITLE_SHARE = 0.1

_BETWEEN = ("a", "an", "and", "the", "of", "in", "to", "for", "is", "was", "with", "who", "that")
_STORY = re.compile(r"\b(?:story|tale|narrative|novel)\b")
_TITLE = re.compile(r"called `?([^`]+?)`?\.?$")
_NAMED = re.compile(r"\b(an? (?:[a-z-]+ ){0,3}?[a-z]+),? (?:named|called) ([A-Z][a-z]+)")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")  # not where sentences begin
_NO_NAMES = frozenset({"The", "And", "But", "She", "His", "Her", "They", "Mrs", "Miss"})
_PAST = re.compile(r"..[^e]ed$")  # "the fire crackled"
_WORD = re.compile(r"\b[a-z]{3,}\b")
# A noun stands behind an article and before what is none.
_NOUN = re.compile(
    r"\b(?:[Aa]n?|[Tt]he) (?:[a-z-]+ )?([a-z]{3,})"
    r"(?=[.,;!?]| (?:was|had|is|were|and|of|in|on|with|who|that|to|for|as)\b)"
)


def names_of(text: str) -> Counter[str]:
    """Names in it, and how often."""
    return Counter(name for name in _NAME.findall(text) if name not in _NO_NAMES)


class Nouns:
    """What stories of a set tell of, and how rare it is to."""

    def __init__(self, texts: Iterable[str]) -> None:
        found, all_words, stories = Counter[str](), Counter[str](), Counter[str]()
        n_texts = 0
        for text in texts:
            nouns = _NOUN.findall(text)
            found.update(nouns)
            stories.update(set(nouns))
            all_words.update(_WORD.findall(text))
            n_texts += 1
        self.rarity: Mapping[str, float] = {
            noun: math.log(n_texts / stories[noun]) + 1
            for noun, n in found.items()
            if n >= MOSTLY_A_NOUN * all_words[noun]
            and stories[noun] <= max(1, COMMON * n_texts)
            and not _PAST.search(noun)
        }

    def most_told_of(self, text: str, title: str) -> list[str]:
        """By this story, beside others: often, from early on, and in its title."""
        words = Counter(_WORD.findall(text))
        titled = {word.lower() for word in re.findall(r"[A-Za-z]+", title)}

        def weight(noun: str) -> float:
            return words[noun] * self.rarity[noun] * (3 if noun in titled else 1)

        nouns = {
            found[1]
            for found in _NOUN.finditer(text)
            if found[1] in self.rarity
            and words[found[1]] > 1
            and (found.start() < EARLY * len(text) or found[1] in titled)
        }
        return sorted(nouns, key=lambda noun: (-weight(noun), noun))[:MOST_THINGS]


def kinds(name: str, text: str) -> Sequence[str]:
    """What a story of a set may be called: short or long where it is."""
    if name == "simplebooks":
        return ("a simple book", "an easy book")
    if name == "fairy":
        return ("a fairy tale", "an old fairy tale")
    n_words = text.count(" ")
    if n_words > LONG:
        return ("a long story",)
    short = ("a short story", "a little story", "a simple story", "a story")
    return short if n_words < SHORT else ("a story",)


def asking_words() -> Iterator[str]:
    """What questions have beside what they ask for, each word as it may stand in one."""
    called = {k for name in SETS for n in (0, SHORT, LONG + 1) for k in kinds(name, " " * n)}
    for pattern in (*QUESTIONS, *BY_TITLE):
        for kind in called:
            words = pattern.format(kind=kind, of="", title="")
            yield from (words, words[0].upper() + words[1:])
    for word in ("bedtime", "girl", "boy", *CALLED, *_BETWEEN):
        yield f" {word}"
    yield from (",", ", ", '."', " the old", "'s", ":", "`", " `", "`.")


def questions(prompt: str, text: str, called: Sequence[str], nouns: Nouns) -> Iterator[str]:
    """As many as are taken, the same for the same text.  called: what it may be, as of kinds().

    The prompt itself where it asks for no story, or nothing is found that the story is about.
    """
    draw = random.Random(text)
    is_story = _STORY.search(prompt[:FIRST_CHARACTERS]) is not None
    found = _TITLE.search(prompt) if is_story else None
    title = "" if found is None else found[1]
    subjects = _subjects(text, nouns.most_told_of(text, title), draw) if is_story else []
    while True:
        kind = draw.choice(called)
        if "bedtime" in prompt and draw.random() < 0.3:
            kind = "a bedtime story"
        if title and (not subjects or draw.random() < BY_TITLE_SHARE):
            yield draw.choice(BY_TITLE).format(kind=kind, title=title)
        elif subjects:
            question = draw.choice(QUESTIONS).format(kind=kind, of=draw.choice(subjects))
            yield question if draw.random() < 0.1 else question[0].upper() + question[1:]
        else:
            yield prompt


def _subjects(text: str, nouns: Sequence[str], draw: random.Random) -> list[str]:
    """What it can be said to be about, in several ways."""
    things = [_introduced(noun, text) for noun in nouns]
    named = _NAMED.search(text[:1500])
    who = [name for name, n in names_of(text).most_common(2) if n > 2]
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
