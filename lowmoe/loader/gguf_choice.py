"""Which of a repository's GGUF files is taken: one quantization of the model, whole or in parts.

Knows:        how uploads are named: kinds such as Q4_K_M, parts, files that are no model.
Ignorant of:  the network, what is in a file.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lowmoe.errors import CheckpointError, UnknownModelError

SUFFIX = ".gguf"
# Kinds end a name or a part of it: model.Q4_K_M.gguf, Model-UD-Q4_K_XL-00001-of-00003.gguf.
_KIND = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d(?:_\w+)?|TQ\d_\d|BF16|FP?16|FP?32|[MN][XV]FP4\w*))$", re.I
)
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})$")
# What the picture encoder, the data of a quantization or a guesser of tokens are called.
_NO_MODEL = re.compile(r"mmproj|imatrix|^mtp-|vocab-only|(?:^|[-._])lora(?:[-._]|$)", re.I)
# The codes that models run from here have 6 bits at most, and those of 8 add a three-hundredth of
# what 6 lose: more of them would only be a longer download.
ENOUGH_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufChoice:
    """kind: as the name tells it, "" if it does not; names: of its files, the first first, in the
    repository; why: for the user."""

    kind: str
    names: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class _Offer:
    """fault: what is wrong with its parts, "" where all are there."""

    kind: str
    names: tuple[str, ...]
    n_bytes: int
    fault: str

    @property
    def bits(self) -> int:
        """Of a weight, by the kind's name; 0 where it has none."""
        digits = re.search(r"\d+", self.kind)
        return int(digits[0]) if digits else 0


def choose_gguf(repo_id: str, n_bytes: Mapping[str, int], asked: str | None) -> GgufChoice | None:
    """None where there are no such files.

    n_bytes: of each file of the repository; asked: the kind after the colon.
    Raises UnknownModelError for a kind that is not there, CheckpointError for parts that are
    missing and for names that do not tell several models apart.
    """
    offers = _offers(n_bytes)
    named = sorted({offer.kind for offer in offers} - {""})
    kinds = ", ".join([*named, *["one without a kind"] * any(not offer.kind for offer in offers)])
    if asked is not None:
        found = [offer for offer in offers if offer.kind.upper() == asked.upper()]
        if not found:
            instead = f"Give {' or '.join(named)} after the colon, or no colon"
            raise UnknownModelError(
                f"{repo_id}: holds no GGUF file of kind {asked!r}, but {kinds or 'none at all'}. "
                f"{instead if named else 'Leave out the colon and what follows it'}."
            )
        why = "as asked"
    elif not offers:
        return None
    else:
        found, why = _best(offers)
        why = f"{why} of {kinds}" if len(offers) > 1 else "the only one"
    if len(found) > 1:
        first, second = (offer.names[0] for offer in found[:2])
        raise CheckpointError(
            f"{repo_id}: {first} and {second} cannot be told apart by a kind such as Q8_0. "
            "Download the one you mean, and give its path."
        )
    if found[0].fault:
        counts = Counter(offer.kind for offer in offers)
        whole = {offer.kind for offer in offers if not offer.fault and counts[offer.kind] == 1}
        others = ", ".join(sorted(whole - {""}))
        instead = f" or one of {others} after the colon" if others else ""
        raise CheckpointError(
            f"{repo_id}: {found[0].fault}. The upload is incomplete; name another "
            f"repository{instead}."
        )
    return GgufChoice(kind=found[0].kind, names=found[0].names, why=why)


def _best(offers: list[_Offer]) -> tuple[list[_Offer], str]:
    """Those of one kind, and why."""
    enough = [offer for offer in offers if offer.bits >= ENOUGH_BITS]
    if enough:
        best = min(enough, key=lambda offer: (offer.bits, offer.n_bytes))
        why = f"the shortest of {ENOUGH_BITS} bits or more, as more would be lost again,"
    else:
        best = max(offers, key=lambda offer: (offer.bits, offer.n_bytes))
        why = "the most bits"
    return [offer for offer in offers if offer.kind.upper() == best.kind.upper()], why


def _offers(n_bytes: Mapping[str, int]) -> list[_Offer]:
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(n_bytes):
        stem = name.rpartition("/")[2].removesuffix(SUFFIX)
        if not name.endswith(SUFFIX) or _NO_MODEL.search(stem):
            continue
        place, number, count = name.removesuffix(SUFFIX), 1, 1
        if part := _PART.fullmatch(place):
            place, number, count = part[1], int(part[2]), int(part[3])
        groups.setdefault((place, count), {})[number] = name
    return [_offer(place, count, of, n_bytes) for (place, count), of in groups.items()]


def _offer(place: str, count: int, parts: Mapping[int, str], n_bytes: Mapping[str, int]) -> _Offer:
    missing = next((n for n in range(1, count + 1) if n not in parts), None)
    fault = f"{place} has {len(parts)} of {count} parts"
    if missing is not None:
        fault += f", part {missing} is missing"
    elif len(parts) == count:
        fault = ""
    folder, _, name = place.rpartition("/")
    found = _KIND.search(name) or _KIND.search(folder)
    names = tuple(parts[n] for n in sorted(parts))
    total = sum(n_bytes[name] for name in names)
    return _Offer(found[1] if found else "", names, total, fault)
