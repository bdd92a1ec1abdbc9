import random

from lowmoe.experts.foresight import N_RANKS, TRUST, Foresight


def after(share_true: float, rank: int = 3, n: int = 400) -> Foresight:
    """A foresight that saw a rank come true so often, in no order."""
    foresight, chance = Foresight(), random.Random(0)
    outcomes = [i < share_true * n for i in range(n)]
    chance.shuffle(outcomes)
    for came_true in outcomes:
        foresight.learn(rank, came_true=came_true)
    return foresight


def test_a_rank_is_trusted_until_it_has_failed() -> None:
    assert all(Foresight().trusts(rank) for rank in range(1000))


def test_a_rank_that_comes_true_often_enough_is_trusted_and_another_is_not() -> None:
    # Some fifty outcomes count: their share strays by a tenth.
    assert after(TRUST + 0.15).trusts(3)
    assert not after(TRUST - 0.15).trusts(3)


def test_ranks_are_judged_apart() -> None:
    foresight = after(0.0, rank=5)
    assert foresight.trusts(4)
    assert not foresight.trusts(5)


def test_trust_comes_back_when_guesses_come_true_again() -> None:
    foresight = after(0.0)
    for _ in range(200):
        foresight.learn(3, came_true=True)
    assert foresight.trusts(3)


def test_the_many_guesses_of_a_long_prompt_share_the_last_rank() -> None:
    foresight = after(0.0, rank=10 * N_RANKS)
    assert not foresight.trusts(N_RANKS - 1)
    assert foresight.trusts(N_RANKS - 2)
