"""Do the questions that the demo model learns from ask for what the story tells?"""

import re
from itertools import islice
from random import Random

import pytest

from benchmarks.demo_model.asked import LONG, QUESTIONS, SHORT, Nouns, kinds, questions
from benchmarks.demo_model.evaluate import WHO
from benchmarks.demo_model.varied import KINDS, MEN, WOMEN, made_up_name, plural, varied

LIGHTHOUSE = (
    "Once upon a time there lived an old woman named Ines in a tall lighthouse, far out at sea. "
    'One night a lost whale was there. "Why are you here?" asked Ines. But the whale was too tired '
    "to speak, so Ines sang. Every night, when the lighthouse was dark, Ines lit a lamp, and then "
    "Ines waited by the lighthouse."
)
PROMPT = "Write a bedtime story called `The Keeper's Song`."


CALLED = ("a short story", "a story")


def asked(prompt: str, text: str, *others: str, n: int = 60) -> set[str]:
    """Questions for a text among others."""
    return set(islice(questions(prompt, text, CALLED, Nouns([text, *others])), n))


def test_a_story_is_asked_for_by_who_and_what_is_in_it() -> None:
    found = asked(PROMPT, LIGHTHOUSE)
    for subject in (
        "an old woman (called|named) Ines",
        "Ines and a lost whale",
        "a tall lighthouse and a lost whale",
        "Ines, a tall lighthouse and a lost whale",
    ):
        of = subject.replace("(called|named)", "called"), subject.replace("(called|named)", "named")
        assert any(o in question for o in of for question in found), subject


def test_it_is_asked_for_by_its_title_too() -> None:
    found = asked(PROMPT, LIGHTHOUSE, n=200)
    assert "Write a story called The Keeper's Song." in found
    assert len([q for q in found if "Keeper's Song" in q]) < len(found) / 2


def test_it_is_asked_for_in_many_words() -> None:
    beginnings = {question.split("{")[0].strip().lower() for question in QUESTIONS}
    found = {q.lower() for q in asked(PROMPT, LIGHTHOUSE, n=200)}
    for beginning in beginnings:
        assert any(q.startswith(beginning) for q in found), beginning


def test_the_same_story_is_always_asked_for_in_the_same_words() -> None:
    first, again = (
        list(islice(questions(PROMPT, LIGHTHOUSE, CALLED, Nouns([LIGHTHOUSE])), 5))
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 1


def test_what_most_stories_have_says_nothing_of_one() -> None:
    others = [f"There was a lighthouse. The lighthouse was number {n}." for n in range(25)]
    found = asked(PROMPT, LIGHTHOUSE, *others)
    assert not any("lighthouse" in question for question in found)
    assert any("whale" in question for question in found)


def test_what_is_no_noun_is_never_asked_for() -> None:
    text = "The small was here. The small crackled and the fire crackled in the night. " * 2
    others = ["It is small. How small it is, so small! They crackled, all crackled."] * 5
    found = asked(PROMPT, LIGHTHOUSE + text, *others, n=200)
    assert not any("small" in question or "crackled" in question for question in found)


def test_what_comes_in_at_the_end_is_asked_for_only_if_the_title_has_it() -> None:
    text = f"{LIGHTHOUSE} There was a key. The key was lost."
    assert not any("key" in q for q in asked(PROMPT, text, n=200))
    found = asked("Write a bedtime story called `The Golden Key`.", text, n=200)
    assert any("a key" in q for q in found)


def test_a_story_is_called_short_or_long_where_it_is() -> None:
    for n_words, words in ((SHORT - 1, {"a short story"}), (LONG + 2, {"a long story"})):
        assert words <= set(kinds("stories", "word " * n_words))
    assert set(kinds("stories", "word " * ((SHORT + LONG) // 2))) == {"a story"}


@pytest.mark.parametrize(
    "prompt",
    [
        "Describe the food, animal, or beverage 'whale' in detail, and tell a story about it.",
        "Explain lighthouses in simple terms.",
    ],
)
def test_what_is_no_story_is_asked_for_as_it_was(prompt: str) -> None:
    assert asked(prompt, LIGHTHOUSE) == {prompt}


def test_a_story_of_nobody_and_nothing_is_asked_for_as_it_was() -> None:
    prompt = "Write a story about rain."
    assert asked(prompt, "It rained. It rained on.") == {prompt}


def told(name: str, pronoun: str) -> str:
    """A story of somebody, with an owl and a map."""
    return (
        f"There was a child named {name}. One day {name} met an owl. The owl gave {name} a map, "
        f"and {pronoun} thanked the owls. An old owl is wise, said {name}. {name}'s map was torn; "
        f"but {pronoun} and {name} went on, and {pronoun} sang. Owl and {name} slept."
    )


@pytest.mark.parametrize("pronoun", ["she", "he"])
def test_a_varied_story_is_the_same_of_somebody_else(pronoun: str) -> None:
    prompt, text = varied("Tell of `Luna and the Owl`.", told("Luna", pronoun))
    other = re.findall(r"named ([A-Z][a-z]+)", text)[0]
    bird, writing = re.findall(r"met an? (\w+)\. .* gave \w+ an? (\w+),", text)[0]
    assert {"Luna", "owl", "map"}.isdisjoint({other, bird, writing})
    back = re.sub(r"\b[Aa]n? (?=owl|old|map)", "", text.replace(other, "Luna"))
    for word, was in ((bird, "owl"), (writing, "map")):
        for form in (str, plural):
            back = re.sub(rf"\b(?:an? )?{form(word)}\b", form(was), back)
            back = back.replace(form(word).capitalize(), form(was).capitalize())
    bare = re.sub(r"\b[Aa]n? (?=owl|old|map)", "", told("Luna", pronoun))
    assert back == bare
    assert prompt == f"Tell of `{other} and the {bird.capitalize()}`."
    assert varied("Tell of `Luna and the Owl`.", told("Luna", pronoun)) == (prompt, text)


def test_made_up_names_are_many_and_can_be_said() -> None:
    draw = Random(0)
    names = [made_up_name(draw, woman=bool(i % 2)) for i in range(400)]
    assert len(set(names)) > 380
    assert all(re.fullmatch(r"[A-Z][a-z]{2,13}", name) for name in names)


def test_articles_go_with_the_words_they_stand_before() -> None:
    for n in range(60):
        _, text = varied("", f"Story {n}. An owl saw a fox. The fox and the owl slept.")
        for article, word in re.findall(r"\b([Aa]n?) ([a-z]+)", text):
            vowel = word[0] in "aeiou" and not word.startswith("uni")
            assert article.lower() == ("an" if vowel else "a"), text


def test_a_name_stays_where_it_may_be_a_place_or_several_people() -> None:
    of_place = "They lived in Oak. She loved Oak. She said, I am from Oak, and she left Oak. " * 2
    of_both = told("Luna", "she") + told("Luna", "he")
    assert "Oak" in varied("", of_place)[1]
    assert "Luna" in varied("", of_both)[1]


def test_words_that_can_be_exchanged_are_of_one_kind() -> None:
    words = [word for kind in KINDS for word in kind]
    assert len(words) == len(set(words))
    assert not set(words) & {plural(word) for word in words}


def test_whom_the_evaluation_asks_for_nobody_has_met() -> None:
    assert not {who.split()[-1] for who in WHO} & {*WOMEN, *MEN}
