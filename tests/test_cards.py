"""The table of cards, held to what does not come from it."""

import pytest

from lowmoe.cards import CARDS
from tests.cuda_ext.machine_code import ARCHITECTURES
from tests.stand_in_gpu import CARD

# CUDA cores and TFLOPS of float32 with a multiply-add in two, from the same data sheets; boost
# clocks in GHz. Cores * 2 * clock are the TFLOPS.
CORES = {
    "3060": (3584, 1.78, 12.7),
    "3090": (10496, 1.70, 35.6),
    "4060ti-16g": (4352, 2.54, 22.1),
    "4070": (5888, 2.48, 29.1),
    "4070tisuper": (8448, 2.61, 44.1),
    "4080": (9728, 2.51, 48.7),
    "4090": (16384, 2.52, 82.6),
    "5070ti": (8960, 2.45, 43.9),
    "5080": (10752, 2.62, 56.3),
    "5090": (21760, 2.41, 104.8),
    "a6000": (10752, 1.80, 38.7),
    "l4": (7424, 2.04, 30.3),
    "a100": (6912, 1.41, 19.5),
    "h100": (16896, 1.98, 66.9),
    "h200": (16896, 1.98, 66.9),
}


@pytest.mark.parametrize("name", CARDS)
def test_multiprocessors_and_clock_make_the_flops_of_the_data_sheet(name: str) -> None:
    cores, clock, tflops = CORES[name]
    of_one = 64 if name == "a100" else 128
    assert CARDS[name].n_multiprocessors * of_one == cores
    # Clocks are given to three digits.
    assert cores * 2 * clock / 1e3 == pytest.approx(tflops, rel=0.005)


def test_a_4090_is_the_reference_machines() -> None:
    card = CARDS["4090"]
    assert card.memory_bytes == 24e9 < CARD.memory_bytes
    assert (card.sm, card.n_multiprocessors) == (CARD.sm, CARD.n_multiprocessors)
    assert card.bandwidth == 1008e9
    assert card.bus_bandwidth == pytest.approx(25e9, rel=0.02)


def test_half_the_lanes_or_another_generation_halve_or_double_the_bus() -> None:
    whole = CARDS["4090"].bus_bandwidth
    assert CARDS["4060ti-16g"].bus_bandwidth == pytest.approx(whole / 2)
    assert CARDS["5090"].bus_bandwidth == pytest.approx(whole * 2)


def test_kernels_are_compiled_for_every_card() -> None:
    assert {card.sm for card in CARDS.values()} <= set(ARCHITECTURES)
