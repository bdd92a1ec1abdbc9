"""Perplexity and divergence are held to their definitions, on models that can be worked out."""

import math
from collections.abc import Sequence

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from lowmoe.engine.evaluate import evaluate
from lowmoe.engine.text import Tokenizer
from lowmoe.errors import PromptError
from tests.talking_mixtral import learned_tokenizer


def uniform(ids: Sequence[int]) -> Tensor:
    """Every one of 8 tokens is as likely."""
    return torch.zeros(len(ids), 8)


def counting(ids: Sequence[int]) -> Tensor:
    """The next number is three times as likely as each of the 7 others."""
    scores = torch.zeros(len(ids), 8)
    scores[torch.arange(len(ids)), (torch.tensor(ids) + 1) % 8] = math.log(3)
    return scores


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity() -> None:
    result = evaluate(uniform, [1, 5, 2, 2, 7], window=5)
    assert result.perplexity == pytest.approx(8)
    assert (result.tokens, result.kl, result.top1) == (4, None, None)


def test_perplexity_is_the_inverse_of_the_mean_likelihood() -> None:
    # Two tokens are the next number (3/10), one is not (1/10): exp of the mean of -log.
    result = evaluate(counting, [1, 2, 3, 3], window=4)
    assert result.perplexity == pytest.approx((0.3 * 0.3 * 0.1) ** (-1 / 3))


def test_windows_share_nothing_and_their_first_tokens_are_not_predicted() -> None:
    seen: list[list[int]] = []
    steps: list[tuple[int, int]] = []

    def remembering(ids: Sequence[int]) -> Tensor:
        seen.append(list(ids))
        return uniform(ids)

    result = evaluate(
        remembering,
        [0, 1, 2, 3, 4, 5, 6],
        window=3,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert seen == [[0, 1, 2], [3, 4, 5]]  # the last window has nothing to predict
    assert result.tokens == 4
    assert steps == [(1, 2), (2, 2)]


def test_divergence_is_what_the_model_lost_against_the_reference() -> None:
    result = evaluate(uniform, [1, 2, 3], window=3, reference=counting)
    # KL(reference || model) = .3 ln(.3 * 8) + 7 * .1 ln(.1 * 8)
    assert result.kl == pytest.approx(0.3 * math.log(2.4) + 0.7 * math.log(0.8), abs=1e-6)
    # Of equal scores the first is the likeliest: token 0, where the reference says 2, then 3.
    assert result.top1 == 0.0


def test_a_model_against_itself_loses_nothing() -> None:
    result = evaluate(counting, [1, 2, 3, 3], window=4, reference=counting)
    assert result.kl == pytest.approx(0, abs=1e-7)
    assert result.top1 == 1.0


@pytest.mark.parametrize("ids", [[], [3]])
def test_a_text_too_short_to_predict_anything_is_a_prompt_error(ids: list[int]) -> None:
    with pytest.raises(PromptError, match=f"the text has {len(ids)} tokens, but at least 2"):
        evaluate(uniform, ids, window=4)


def test_what_goes_in_front_is_in_every_window_and_never_predicted() -> None:
    seen: list[list[int]] = []

    def remembering(ids: Sequence[int]) -> Tensor:
        seen.append(list(ids))
        return counting(ids)

    result = evaluate(remembering, [1, 2, 5], window=3, prefix=[0], reference=counting)
    assert seen == [[0, 1, 2], [0, 5]]
    # 1 and 2 are the next numbers (3/10), 5 is not (1/10).
    assert result.perplexity == pytest.approx((0.3 * 0.3 * 0.1) ** (-1 / 3))
    assert (result.tokens, result.top1) == (3, 1.0)


def test_a_window_that_is_all_prefix_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="a window has 2 tokens, but 2 go in front"):
        evaluate(uniform, [1, 2, 3], window=2, prefix=[0, 0])


@pytest.mark.parametrize(
    ("template", "prefix"), [("$A", []), ("<|system|> $A", [1]), ("<|system|> $A <|end|>", [1])]
)
def test_a_prefix_is_what_the_tokenizer_puts_in_front(template: str, prefix: list[int]) -> None:
    tokenizer = learned_tokenizer()
    special = [("<|end|>", 0), ("<|system|>", 1)]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    assert Tokenizer(tokenizer).prefix == prefix
