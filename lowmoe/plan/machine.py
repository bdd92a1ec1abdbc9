"""The machine that a model is planned for: this one, measured, or one of a few words.

Knows:        what of a machine decides speed, reference figures for parts nobody measured.
Ignorant of:  models; how anything is measured.
"""

from dataclasses import dataclass

from lowmoe.cards import CardProfile

# The reference PC: two channels of DDR5, an NVMe disk on PCIe 4, eight cores of Zen 4 or 5.
RAM_BYTES_PER_S = 80e9  # DDR5-6000, 96 GB/s in its data sheet, of which 80 to 85 % are read
DISK_BYTES_PER_S = 5e9  # PCIe 4 x4 disks read 5 to 7 GB/s in blocks of megabytes
CORES, ISA = 8, "avx512"


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What threads do together.

    word_bytes_per_s: bytes of packed weights that the kernels decode and multiply by one token
    where memory is no limit; products_per_s: weights times tokens of a prompt.
    """

    n_threads: int
    word_bytes_per_s: float
    products_per_s: float


# Of one core, measured by probe.py on a Zen 5 at about 4 GHz, which runs them all but NEON.
CORE_WORD_BYTES_PER_S = {"avx512": 55e9, "avxvnni": 7e9, "avx2": 6e9, "neon": 8e9, "scalar": 0.4e9}
CORE_PRODUCTS_PER_S = {
    "avx512": 420e9,
    "avxvnni": 220e9,
    "avx2": 90e9,
    "neon": 80e9,  # never measured
    "scalar": 2e9,
}


def processor(isa: str, n_threads: int) -> Processor:
    """One that nobody measured."""
    return Processor(
        n_threads=n_threads,
        word_bytes_per_s=CORE_WORD_BYTES_PER_S[isa] * n_threads,
        products_per_s=CORE_PRODUCTS_PER_S[isa] * n_threads,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bytes, and bytes a second.

    ram_bytes, vram_bytes: that a model may take; card, card_name: None and "" for none; measured:
    whether speeds are this machine's own; factor: what earlier runs on it achieved of what was
    predicted.
    """

    ram_bytes: int
    ram_bytes_per_s: float
    disk_bytes_per_s: float
    cpu: Processor
    card: CardProfile | None = None
    card_name: str = ""
    vram_bytes: int = 0
    measured: bool = False
    factor: float = 1.0
