"""Graphics cards by name."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CardProfile:
    name: str
    memory_bytes: int
    bytes_per_s: float
    pcie_bytes_per_s: float
    n_multiprocessors: int
    int8_products_per_s: float


CARDS: Mapping[str, CardProfile] = {
    "4090": CardProfile(
        name="4090",
        memory_bytes=24 * 10**9,
        bytes_per_s=1008e9,
        pcie_bytes_per_s=25e9,
        n_multiprocessors=128,
        int8_products_per_s=330e12,
    ),
    "3060": CardProfile(
        name="3060",
        memory_bytes=12 * 10**9,
        bytes_per_s=360e9,
        pcie_bytes_per_s=25e9,
        n_multiprocessors=28,
        int8_products_per_s=51e12,
    ),
}
