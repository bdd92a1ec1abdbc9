"""The machine that is planned for: this one, or one that a user describes.

Knows:        which figures are this machine's own and which are the reference PC's.
Ignorant of:  models.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

from cuda_ext.card import CardError, Facts, find_card, is_without, look
from lowmoe.cards import CARDS, CardProfile, profile_name
from lowmoe.engine.load_options import TORCH
from lowmoe.engine.machine import machine_line, physical_cores
from lowmoe.engine.memory import available_ram_bytes, margin_bytes, parse_budget, total_ram_bytes
from lowmoe.errors import DiskSpaceError, FolderError, UsageError
from lowmoe.kernels import cpu
from lowmoe.plan.machine import (
    CORES,
    DISK_BYTES_PER_S,
    ISA,
    RAM_BYTES_PER_S,
    Machine,
    processor,
)
from lowmoe.plan.memo import Memo, read_memo, with_run, write_memo
from lowmoe.plan.probe import measured_disk, measured_processor, measured_ram
from lowmoe.settings import Settings

AUTO, NONE = "auto", "none"
SYSTEM_BYTES = 3 * 2**30  # of a PC's RAM, what its system and desktop have taken already


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a user says of a machine; None, or "auto", for what this one has.

    gpu: a card's name, auto or none; ram, vram: sizes; disk, ram_speed: sizes a second; threads.
    """

    gpu: str = AUTO
    ram: str | int | None = None
    vram: str | int | None = None
    disk: str | None = None
    ram_speed: str | None = None
    threads: int | None = None


def machine_of(described: Described, settings: Settings) -> tuple[Machine, str]:
    """The machine, and where its figures are from, in a line.

    A card that is not here makes it another PC, the reference one but for what is said of it.
    Raises UsageError for what cannot be understood.
    """
    name, is_here = _card(described.gpu)
    card = CARDS.get(name)
    if described.vram is not None and (described.gpu == NONE or is_without(look())) and not card:
        raise UsageError(
            f"--vram is {described.vram!r}, but no GPU is planned for. Leave it out, or name a "
            "card: --gpu 4090."
        )
    elsewhere = card is not None and not is_here
    ram = _ram_bytes(described, elsewhere=elsewhere)
    vram = 0 if card is None else _vram_bytes(described, card, elsewhere=elsewhere)
    disk = None if described.disk is None else parse_speed(described.disk, name="disk")
    speed = None if described.ram_speed is None else parse_speed(described.ram_speed, "ram-speed")
    if elsewhere:
        threads = described.threads or CORES
        machine = Machine(
            ram_bytes=ram,
            ram_bytes_per_s=speed or RAM_BYTES_PER_S,
            disk_bytes_per_s=disk or DISK_BYTES_PER_S,
            cpu=processor(ISA, threads),
            card=card,
            card_name=name,
            vram_bytes=vram,
        )
        return machine, _of_reference(machine, threads)
    memo = remembered(settings, described.threads, with_disk=disk is None)
    machine = Machine(
        ram_bytes=ram,
        ram_bytes_per_s=speed or memo.ram_bytes_per_s,
        disk_bytes_per_s=disk or memo.disk_bytes_per_s or DISK_BYTES_PER_S,
        cpu=memo.cpu,
        card=card,
        card_name=name,
        vram_bytes=vram,
        measured=True,
        factor=memo.factor,
    )
    words = f"this machine, measured: {machine_line()}{_unknown_card(described.gpu, name)}"
    if ram > total_ram_bytes():
        words += f"; but with more RAM than its {total_ram_bytes() / 1e9:.1f} GB, as --ram says"
    return machine, words


def card_here(wanted: str) -> CardProfile | None:
    """The profile of the card that computes where one was wanted by its name or "auto": another may
    stand in for it.  None for none, or one without a profile.
    """
    name, here = _card(wanted)
    return CARDS.get(name if here else _card(AUTO)[0])


def is_here(described: Described) -> bool:
    """Whether it is this machine that is meant."""
    return _card(described.gpu)[1]


def ram_is_here(described: Described) -> bool:
    """Whether it is this machine's RAM that is meant, and there is so much."""
    if described.ram is None or not is_here(described):
        return False
    total = total_ram_bytes()
    return parse_budget(described.ram, name="ram", whole_bytes=total) <= total


def remembered(settings: Settings, threads: int | None, *, with_disk: bool) -> Memo:
    """What is known of this machine, measured now as far as it is not.  threads: None for all."""
    n_threads = threads or physical_cores()
    key = _key(settings, n_threads)
    memo = read_memo(settings, key)
    if memo is None:
        memo = Memo(
            key=key,
            ram_bytes_per_s=measured_ram(n_threads),
            cpu=measured_processor(_isa(settings), n_threads),
        )
        _keep(settings, memo)
    if with_disk and memo.disk_bytes_per_s is None:
        # A home that cannot be written to has no speed; what is read from it is guessed at.
        with suppress(FolderError, DiskSpaceError):
            memo = replace(memo, disk_bytes_per_s=measured_disk(settings.home))
            _keep(settings, memo)
    return memo


def measured_again(settings: Settings) -> Memo:
    """All of this machine now, the disk too; what its runs came to is kept."""
    before = remembered(settings, None, with_disk=False)
    cpu = measured_processor(_isa(settings), before.cpu.n_threads)
    memo = replace(before, ram_bytes_per_s=measured_ram(None), cpu=cpu, disk_bytes_per_s=None)
    _keep(settings, memo)
    return remembered(settings, None, with_disk=True)


def remember_run(
    settings: Settings, threads: int | None, predicted: float, achieved: float
) -> None:
    """One more run of this machine, in tokens/s; predicted: without correction.

    Of a machine that nothing is kept of, nothing is: measuring it would disturb who runs.
    """
    memo = read_memo(settings, _key(settings, threads or physical_cores()))
    if memo is not None:
        _keep(settings, with_run(memo, predicted, achieved))


def _key(settings: Settings, n_threads: int) -> str:
    return f"{machine_line()}, {_isa(settings)}, {n_threads} threads"


def _isa(settings: Settings) -> str:
    """What native code would use: torch has no speed of its own to measure."""
    return cpu.isas()[0] if settings.isa in (None, TORCH) else cpu.choose_isa(settings.isa)


def _keep(settings: Settings, memo: Memo) -> None:
    # Kept to save a second; where that cannot be, it is measured every time.
    with suppress(FolderError, DiskSpaceError):
        write_memo(settings, memo)


def parse_speed(text: str, name: str) -> float:
    """Bytes a second of a speed such as 7GB/s.  Raises UsageError naming the option."""
    amount, slash, unit = text.strip().rpartition("/")
    refusal = UsageError(f"--{name} is {text!r}, but must be a speed like 7GB/s.")
    if not slash or unit.strip() != "s":
        raise refusal
    try:
        return float(parse_budget(amount, name=name, whole_bytes=0))
    except UsageError:
        raise refusal from None


def _card(wanted: str) -> tuple[str, bool]:
    """The name of a profile, "" for none, and whether such a card is here."""
    if wanted == NONE:
        return "", True
    facts, name = look(), profile_name(wanted)
    if wanted != AUTO:
        if name not in CARDS:
            raise UsageError(
                f"--gpu is {wanted!r}, but must be auto, none or one of {', '.join(CARDS)}. For "
                "another card name a like one, and its memory: --gpu 4080 --vram 12GB."
            )
        return name, _is_here(name, facts)
    if is_without(facts) or find_card(AUTO, facts) is None:
        return "", True
    return next((name for name in CARDS if _is_here(name, facts)), ""), True


def _unknown_card(wanted: str, name: str) -> str:
    """What to say where a card is here that nothing is known of."""
    found = None if wanted == NONE or name else find_card(AUTO, look())
    return "" if found is None else f"; of its {found.name} no speeds are known, so without it"


def _is_here(name: str, facts: Facts) -> bool:
    try:
        return find_card(name, facts) is not None
    except CardError:
        return False


def _ram_bytes(described: Described, *, elsewhere: bool) -> int:
    """What a model may take: of this machine what `run` would be told, of another what it has."""
    if described.ram is None and elsewhere:
        raise UsageError(
            f"--gpu is {described.gpu!r}, which is not here, so it is another PC that is planned "
            "for. Say how much RAM it has: --ram 64GiB."
        )
    if described.ram is None:
        return available_ram_bytes()
    if elsewhere and str(described.ram).strip().endswith("%"):
        raise UsageError(
            f"--ram is {described.ram}, but how much RAM a PC has that is not here nobody knows. "
            "Give a size: --ram 64GiB."
        )
    n_bytes = parse_budget(described.ram, name="ram", whole_bytes=total_ram_bytes())
    return max(0, n_bytes - margin_bytes(n_bytes) - SYSTEM_BYTES) if elsewhere else n_bytes


def _vram_bytes(described: Described, card: CardProfile, *, elsewhere: bool) -> int:
    """What a model may take: of a card that is not here as much as is said, for it may stand for a
    like one with more memory.
    """
    if described.vram is None:
        return card.memory_bytes
    n_bytes = parse_budget(described.vram, name="vram", whole_bytes=card.memory_bytes)
    return n_bytes if elsewhere else min(card.memory_bytes, n_bytes)


def _of_reference(machine: Machine, threads: int) -> str:
    return (
        f"a PC with that card, {threads} cores with {ISA.upper().replace('AVX', 'AVX-')}, RAM at "
        f"{machine.ram_bytes_per_s / 1e9:.0f} GB/s and a disk at "
        f"{machine.disk_bytes_per_s / 1e9:.3g} GB/s (--threads, --ram-speed, --disk)"
    )
