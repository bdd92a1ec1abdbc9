"""Lets contenders run one after the other, round after round.

Knows:        the order of turns, what a command leaves as its last line, cold files.
Ignorant of:  what contenders compute; the machine, but for asking that it be observed.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.machine_state import MachineProbe
from benchmarks.peers.observation import Observation, observe
from benchmarks.peers.processes import last_line

Report = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A command whose last line of output is a JSON object with its samples.

    side: "lowmoe" or "llama.cpp"; environment: variables beside those that are set; cold_files:
    dropped from the page cache before every turn.
    """

    name: str
    side: str
    bits: int
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    cold_files: Sequence[Path] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One run of one contender."""

    contender: str
    side: str
    bits: int
    stage: str
    round: int
    observed: Observation[Report]

    @property
    def rates(self) -> list[float]:
        """tokens/s, one a sample."""
        return [sample["tokens_per_s"] for sample in self.observed.result["samples"]]

    @property
    def disk_bytes_per_token(self) -> list[float]:
        """One a sample."""
        return [sample["disk_bytes_per_token"] for sample in self.observed.result["samples"]]

    @property
    def bytes_per_token(self) -> float:
        """Of weights, wherever they are."""
        return float(self.observed.result["bytes_per_token"])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnOptions:
    """max_others_cores: observe's; autogroup_nice: last_line's."""

    probe: MachineProbe
    max_others_cores: float
    autogroup_nice: int | None


def take_turns(
    contenders: Sequence[Contender], *, stage: str, rounds: int, options: TurnOptions
) -> Iterator[Turn]:
    """A B C, A B C, ...: whatever drifts, drifts under all of them."""
    for number in range(rounds):
        for contender in contenders:
            yield Turn(
                contender=contender.name,
                side=contender.side,
                bits=contender.bits,
                stage=stage,
                round=number,
                observed=observe(
                    lambda contender=contender: _run(contender, options.autogroup_nice),
                    options.probe,
                    max_others_cores=options.max_others_cores,
                ),
            )


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Let the kernel forget what it holds of these files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages not yet written cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _run(contender: Contender, autogroup_nice: int | None) -> Report:
    drop_from_page_cache(contender.cold_files)
    line = last_line(
        contender.command, autogroup_nice=autogroup_nice, environment=contender.environment
    )
    report: Report = json.loads(line)
    return report
