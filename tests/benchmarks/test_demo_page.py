"""What is measured of the demo model's routing, and the page and card made of it."""

from pathlib import Path

import pytest
import torch

from benchmarks.demo_model.card import NAME, card
from benchmarks.demo_model.evaluate import names
from benchmarks.demo_model.page import draw_experts, draw_slots, page
from benchmarks.demo_model.routing import expert_shares, hit_rate, repeat_rate

CHOICES = torch.tensor([[[0, 1], [1, 0], [1, 2]], [[3, 2], [0, 1], [0, 2]]])  # [L, T, K]
SAMPLE = {"prompt": "A story?", "text": "Once.\n\nThe end.", "n_tokens": 5, "most_tokens": 9}
RESULTS = {
    "machine": "a machine",
    "context": 512,
    "tokens": 80_000_000,
    "models": [
        {
            "name": "this",
            "loss": {"stories": 2.125, "scenes": 2.25, "qa": 2.5, "fairy": 3.75},
            "bits_per_byte": 0.875,
        }
    ],
    "widths": [
        {
            **{"bits": bits, "perplexity": 9.5, "kl": 0.25, "top1": 0.875, "samples": [SAMPLE]},
            "about": {"who": 0.75, "what": 0.5, "ended": 1.0},
        }
        for bits in (16, 6, 2)
    ],
    "routing": {
        "shares": {"stories": [[0.25, 0.75], [0.5, 0.5]], "qa": [[0.25, 0.75], [0.5, 0.5]]},
        "repeats": {"stories": [0.25, 0.5], "qa": [0.125, 0.375]},
        "n_active": 1,
        "slots": [1, 2, 4],
        "hits": {"stories": [0.1, 0.5, 1.0], "qa": [0.1, 0.4, 1.0]},
    },
}


def test_shares_are_of_a_layers_choices() -> None:
    assert (expert_shares(CHOICES, 4) * 6).tolist() == [[2, 3, 1, 0], [2, 1, 2, 1]]


def test_a_repeat_is_an_expert_of_the_token_before_in_either_place() -> None:
    assert repeat_rate(CHOICES).tolist() == [0.75, 0.25]


def test_slots_for_all_miss_each_expert_once_and_slots_for_one_layer_hit_nothing() -> None:
    assert hit_rate(CHOICES, 8) == pytest.approx(5 / 12)  # 7 different ones are asked for
    assert hit_rate(CHOICES, 2) == 0


def test_the_page_shows_every_figure_and_every_width(tmp_path: Path) -> None:
    text = page(RESULTS)
    assert "| this | 2.125 | 2.250 | 2.500 | 3.750 | 0.875 |" in text
    assert "| 2 bits | 9.50 | 0.2500 | 87.5% | 75% | 50% | 100% |" in text
    assert "**16 bits**, 5 tokens\n\n> Once.\n>\n> The end." in text
    assert "$" not in text
    for draw in (draw_experts, draw_slots):
        draw(RESULTS["routing"], tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_an_answer_that_did_not_end_is_said_to_be_cut_off() -> None:
    cut = SAMPLE | {"n_tokens": 9}
    widths = [RESULTS["widths"][0] | {"samples": [cut]}]
    text = page(RESULTS | {"widths": widths})
    assert "9 tokens, cut off" in text


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("A crow sat there.", True),
        ("Two Crows!", True),
        ("A crowd under a crown.", False),
        ("", False),
    ],
)
def test_an_answer_names_what_was_asked_for_by_its_word(answer: str, named: bool) -> None:
    assert names(answer, "a talking crow") == named


def test_the_card_has_the_name_the_terms_ask_for_and_says_what_was_measured() -> None:
    text = card(RESULTS)
    assert NAME.startswith("Llama")
    assert text.startswith(f"# {NAME}\n\n**Built with Llama.**")
    assert "80 million tokens" in text
    assert "75% of its answers name the one and 50% the other, and 100% end" in text
    assert "stories 2.12" in text
    assert "$" not in text


def test_a_model_whose_tokens_nobody_counted_gets_no_card() -> None:
    with pytest.raises(SystemExit, match="do not say how many tokens"):
        card(RESULTS | {"tokens": None})
