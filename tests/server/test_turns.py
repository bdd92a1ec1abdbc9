"""Callers take turns, in a circle."""

import random

from lowmoe.server.turns import Turns


def served(turns: Turns[str], n: int) -> list[str]:
    found = []
    for _ in range(n):
        thing = turns.next(lambda thing: True)
        assert thing is not None
        assert turns.remove(thing[0], thing)
        found.append(thing)
    return found


def test_nobody_is_served_twice_while_another_waits() -> None:
    turns: Turns[str] = Turns()
    for thing in ("a1", "a2", "a3", "b1", "c1", "b2"):
        turns.add(thing[0], thing)
    assert served(turns, 6) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert turns.next(lambda thing: True) is None
    assert len(turns) == 0


def test_who_asks_for_the_first_time_comes_before_those_who_were_served() -> None:
    turns: Turns[str] = Turns()
    for thing in ("a1", "a2", "a3"):
        turns.add("a", thing)
    assert served(turns, 1) == ["a1"]
    turns.add("b", "b1")
    assert served(turns, 1) == ["b1"]
    turns.add("b", "b2")  # whose last turn is remembered though nothing of b waited
    assert served(turns, 3) == ["a2", "b2", "a3"]


def test_what_may_not_be_served_yet_lets_others_pass_and_keeps_its_place() -> None:
    turns: Turns[str] = Turns()
    for thing in ("a1", "a2"):
        turns.add("a", thing)
    assert turns.next(lambda thing: thing != "a1") == "a2"
    assert turns.next(lambda thing: thing == "b") is None
    assert turns.next(lambda thing: True) == "a1"


def test_however_they_come_no_caller_is_two_ahead_of_another_that_waits() -> None:
    generator = random.Random(1)
    turns: Turns[tuple[str, int]] = Turns()
    n_served = dict.fromkeys("abcd", 0)
    for number in range(400):
        turns.add(generator.choice("aaaabbcd"), (str(number), 0))
    waiting = {caller: turns._lines[caller] for caller in "abcd"}
    while all(waiting.values()):
        thing = turns.next(lambda thing: True)
        assert thing is not None
        (caller,) = [c for c in "abcd" if thing in waiting[c]]
        assert turns.remove(caller, thing)
        n_served[caller] += 1
        assert max(n_served.values()) - min(n_served.values()) <= 1
