"""Does a conversion that was killed end as if it had not been, whenever and however often?"""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.faulty_os import MOMENTS, Death
from tests.checkpoint.tiny_mixtral import config_with, contents, write_tiny_mixtral
from tests.loader.zygote import Zygote

CAMPAIGN_RUNS = int(os.environ.get("LOWMOE_TEST_KILLS", "3000"))


class Patient:
    """A conversion to be killed, and what it makes when it is left alone."""

    def __init__(self, zygote: Zygote, folder: Path, *, tied: bool, calibrated: bool) -> None:
        self.zygote, self.source, self.calibrated = zygote, folder / "checkpoint", calibrated
        self.folder = folder / "model"
        write_tiny_mixtral(self.source, config_with(tie_word_embeddings=tied))
        whole = folder / "unbroken"
        self.calls = zygote.count_calls(self.source, whole, calibrated=calibrated)
        self.wanted = contents(whole)

    def begin_anew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def die(self, death: Death) -> bool:
        return self.zygote.die(self.source, self.folder, death, calibrated=self.calibrated)

    def recovers(self) -> bool:
        """Whether a run without faults ends with the same names and bytes as an unbroken one."""
        self.zygote.finish(self.source, self.folder, calibrated=self.calibrated)
        return contents(self.folder) == self.wanted

    def survives(self, *deaths: Death) -> bool:
        """Whether it recovers from runs that end so, one after the other."""
        self.begin_anew()
        for death in deaths:
            self.die(death)
        return self.recovers()

    def random_death(self, chance: random.Random) -> Death:
        return Death(chance.randint(1, len(self.calls)), chance.choice(MOMENTS))


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="module")
def patient(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Patient:
    return Patient(zygote, tmp_path_factory.mktemp("untied"), tied=False, calibrated=True)


def test_there_are_enough_moments_to_die_at(patient: Patient) -> None:
    assert len(patient.calls) >= 100
    # Every kind of change: a span, a journal line, a sync, a rename, a removal, a reservation.
    assert set(patient.calls) == {
        "pwrite", "write", "fsync", "replace", "unlink", "posix_fallocate",
    }  # fmt: skip


# To a disk, behind a call and before the next are one moment: some of these will do.
@pytest.mark.parametrize(("moment", "step"), [("before", 1), ("after", 5), ("lost", 1)])
def test_a_death_at_any_call_leaves_no_trace(patient: Patient, moment: str, step: int) -> None:
    for call in range(len(patient.calls), 0, -step):
        patient.begin_anew()
        assert patient.die(Death(call, moment))
        assert patient.recovers(), (call, patient.calls[call - 1])


def test_a_write_of_which_half_arrived_leaves_no_trace(patient: Patient) -> None:
    writes = [n for n, name in enumerate(patient.calls, start=1) if name in ("pwrite", "write")]
    for call in writes:
        assert patient.survives(Death(call, "half")), call


@pytest.mark.parametrize("moment", ["named", "mixed"])
def test_a_power_cut_that_keeps_a_part_leaves_no_trace(patient: Patient, moment: str) -> None:
    for call in range(2, len(patient.calls) + 1, 3):
        assert patient.survives(Death(call, moment)), (call, patient.calls[call - 1])


@pytest.mark.parametrize(("tied", "calibrated"), [(True, True), (False, False)])
def test_other_conversions_leave_no_trace_either(
    zygote: Zygote, tmp_path: Path, tied: bool, calibrated: bool
) -> None:
    patient = Patient(zygote, tmp_path, tied=tied, calibrated=calibrated)
    for call in range(1, len(patient.calls) + 1, 4):
        assert patient.survives(Death(call, MOMENTS[call % len(MOMENTS)])), call


def test_what_follows_half_a_line_of_the_journal_is_not_lost(patient: Patient) -> None:
    """A line written behind the half would be torn with it, for whoever reads it after that."""
    lines = [n for n, name in enumerate(patient.calls, start=1) if name == "write"]
    for call in lines:
        # Far enough to save a state, and to remove the one before it.
        assert patient.survives(Death(call, "half"), Death(75, "after")), call


def test_deaths_while_going_on_leave_no_trace(patient: Patient) -> None:
    chance = random.Random(1)
    for depth in (2, 3) * 12:
        deaths = [patient.random_death(chance) for _ in range(depth)]
        assert patient.survives(*deaths), deaths


def test_runs_that_all_die_early_arrive_together(patient: Patient) -> None:
    patient.begin_anew()
    deaths = 0
    # 12 calls find the place again, the longest commit takes 19 more: a run may come this far.
    while patient.die(Death(40, "after")):
        deaths += 1
        assert deaths < len(patient.calls)
    assert deaths > 3
    assert patient.recovers()


def test_a_death_at_any_time_leaves_no_trace(patient: Patient) -> None:
    """Where no call is in sight: in the middle of computing, or of a real fsync."""
    chance, killed = random.Random(2), 0
    for _ in range(12):
        patient.begin_anew()
        seconds = chance.uniform(0, 0.1)
        killed += patient.zygote.die_after(
            patient.source, patient.folder, seconds, calibrated=patient.calibrated
        )
        assert patient.recovers(), seconds
    assert killed >= 3


@pytest.mark.campaign
def test_thousands_of_random_deaths_leave_no_trace(zygote: Zygote, tmp_path: Path) -> None:
    """Runs are numbered by their seeds; LOWMOE_TEST_KILLS says how many, a failure says which."""
    patients = []
    for tied in (True, False):
        for calibrated in (True, False):
            folder = tmp_path / f"{tied}-{calibrated}"
            patients.append(Patient(zygote, folder, tied=tied, calibrated=calibrated))
    for seed in range(CAMPAIGN_RUNS):
        chance = random.Random(seed)
        patient = chance.choice(patients)
        deaths = [patient.random_death(chance) for _ in range(chance.randint(1, 4))]
        patient.begin_anew()
        for death in deaths:
            patient.die(death)
            if chance.random() < 0.2:
                patient.zygote.die_after(
                    patient.source,
                    patient.folder,
                    chance.uniform(0, 0.1),
                    calibrated=patient.calibrated,
                )
        assert patient.recovers(), (seed, deaths)
