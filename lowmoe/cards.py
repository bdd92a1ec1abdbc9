"""What cards by their names have: memory, how fast it and the bus are, multiprocessors.

For a larger card that stands in for a smaller one, and for what is reckoned without any card.

Sources: memory, its bandwidth, bus and number of CUDA cores are those of the cards' product pages
and data sheets at nvidia.com (GeForce "specs"; RTX A6000, L4, A100, H100 and H200 data sheets). A
multiprocessor has 128 CUDA cores, on A100 64; its sm is that of developer.nvidia.com/cuda-gpus.
A100, H100 and H200 are those on SXM boards, the A100 that of 80 GB. NVIDIA gives no cores of the
L4: 58 multiprocessors make its 30.3 TFLOPS of float32 at 2.04 GHz.

Knows:        names and numbers.
Ignorant of:  which cards are here; models.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# PCI Express Base Specification: a lane of generation 4 makes 16e9 transfers a second, 128 bits of
# every 130 are data.
_LANE_OF_GENERATION_4 = 16e9 * 128 / 130 / 8
# Of it copies of megabytes from pinned memory take about this much, 25 GB/s on 4.0 x16: headers of
# packets of 256 bytes, acknowledgements, refills of the queue.
_USABLE = 0.8
# Of dense int8 matrices, a clock and multiprocessor: 660 TOPS of the 4090, 624 of the A100, 1979 of
# the H100, 838 of the 5090 are twice this times multiprocessors and clock.
_INT8_PRODUCTS_A_CLOCK = {80: 2048, 86: 1024, 89: 1024, 90: 4096, 120: 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardProfile:
    """One card.

    memory_bytes: of the name, a real card has a little more; bandwidth: bytes a second of its
    memory, as its data sheet says; sm: of CUDA, 89 for 8.9; clock: of its boost, in Hz.
    """

    memory_bytes: int
    bandwidth: float
    pcie_generation: int
    pcie_lanes: int
    sm: int
    n_multiprocessors: int
    clock: float

    @property
    def int8_products(self) -> float:
        """Products of int8 numbers that its tensor cores multiply and add a second."""
        return _INT8_PRODUCTS_A_CLOCK[self.sm] * self.n_multiprocessors * self.clock

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second that are copied to it, on a board with as fast a slot."""
        of_a_lane = _LANE_OF_GENERATION_4 * 2.0 ** (self.pcie_generation - 4)
        return _USABLE * of_a_lane * self.pcie_lanes


def _card(
    gigabytes: int,
    gigabytes_per_s: float,
    pcie: tuple[int, int],
    sm: int,
    n_multiprocessors: int,
    gigahertz: float,
) -> CardProfile:
    generation, lanes = pcie
    return CardProfile(
        memory_bytes=gigabytes * 10**9,
        bandwidth=gigabytes_per_s * 1e9,
        pcie_generation=generation,
        pcie_lanes=lanes,
        sm=sm,
        n_multiprocessors=n_multiprocessors,
        clock=gigahertz * 1e9,
    )


CARDS: Mapping[str, CardProfile] = {
    "3060": _card(12, 360, (4, 16), 86, 28, 1.777),
    "3090": _card(24, 936, (4, 16), 86, 82, 1.695),
    "4060ti-16g": _card(16, 288, (4, 8), 89, 34, 2.535),
    "4070": _card(12, 504, (4, 16), 89, 46, 2.475),
    "4070tisuper": _card(16, 672, (4, 16), 89, 66, 2.61),
    "4080": _card(16, 716.8, (4, 16), 89, 76, 2.505),
    "4090": _card(24, 1008, (4, 16), 89, 128, 2.52),
    "5070ti": _card(16, 896, (5, 16), 120, 70, 2.452),
    "5080": _card(16, 960, (5, 16), 120, 84, 2.617),
    "5090": _card(32, 1792, (5, 16), 120, 170, 2.407),
    "a6000": _card(48, 768, (4, 16), 86, 84, 1.8),
    "l4": _card(24, 300, (4, 16), 89, 58, 2.04),
    "a100": _card(80, 2039, (4, 16), 80, 108, 1.41),
    "h100": _card(80, 3350, (5, 16), 90, 132, 1.83),
    "h200": _card(141, 4800, (5, 16), 90, 132, 1.83),
}


def profile_name(text: str) -> str:
    """A card's name as CARDS has it, if it does: of "RTX 4090" or "GeForce RTX 4070 Ti Super"."""
    words = text.lower().replace("nvidia", "").replace("geforce", "").replace("rtx", "")
    return words.replace(" ", "")
