"""Do the questions that the demo model learns from ask for what the story tells?"""

from itertools import islice

import pytest

from benchmarks.demo_model.asked import KINDS, QUESTIONS, common_nouns, questions

LIGHTHOUSE = (
    "Once upon a time there lived an old woman named Ines in a tall lighthouse by the sea. Every "
    "night, when the lighthouse was dark, Ines lit a lamp. One night a lost whale was there. "
    '"Why are you here?" asked Ines. But the whale was too tired to speak, so Ines sang, and then '
    "Ines waited by the lighthouse."
)
PROMPT = "Write a bedtime story called `The Keeper's Song`."


def asked(prompt: str, text: str, *, common: frozenset[str] = frozenset(), n: int = 60) -> set[str]:
    return set(islice(questions(prompt, text, KINDS["stories"], common), n))


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
        list(islice(questions(PROMPT, LIGHTHOUSE, KINDS["stories"], frozenset()), 5))
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 1


def test_what_most_stories_have_says_nothing_of_one() -> None:
    things = [f"thing{chr(a)}{chr(b)}" for a in range(97, 102) for b in range(97, 102)]
    others = [f"The forest was dark. The {thing} was lost." for thing in things]
    assert common_nouns([LIGHTHOUSE, *others]) == {"forest"}
    found = asked(PROMPT, LIGHTHOUSE, common=frozenset({"lighthouse"}))
    assert not any("lighthouse" in question for question in found)
    assert any("whale" in question for question in found)


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
