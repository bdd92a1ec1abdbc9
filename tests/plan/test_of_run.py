"""Which runs correct what is predicted of a machine from then on."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from lowmoe.checkpoint.layout import Recipe
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import PerTier, RunStatistics
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.plan import here
from lowmoe.plan.cost import Places
from lowmoe.plan.here import remember_run, remembered
from lowmoe.plan.machine import Machine, processor
from lowmoe.plan.of_run import Predictor, keep_run
from lowmoe.plan.sizes import model_sizes
from lowmoe.plan.skew import UNIFORM, Skew
from lowmoe.settings import Settings

RUN = RunStatistics(
    prompt_tokens=10,
    new_tokens=20,
    ttft_s=0.1,
    prefill_tokens_per_s=100.0,
    decode_tokens_per_s=8.0,
    bits=4,
    placement=PerTier(),
    hit_rate=PerTier(),
    bytes_per_token=PerTier(),
    bound_tokens_per_s=None,
    predicted_tokens_per_s=20.0,
    to_gpu_bytes=0,
    promoted=0,
    trades=(),
    coarse_rate=0.0,
)


def kept(run: RunStatistics, home: Path) -> tuple[tuple[float, float], ...]:
    """What is remembered once this was the first run, on a machine that is taken for twice as fast
    as its parts.
    """
    spec = read_config(ALIASES["olmoe-1b-7b"].config).spec
    predict = Predictor(
        sizes=model_sizes(spec, Recipe(expert_planes=2), "float16"),
        machine=Machine(
            ram_bytes=0,
            ram_bytes_per_s=50e9,
            disk_bytes_per_s=1e9,
            cpu=processor("avx2", 1),
            factor=2.0,
        ),
        places=Places(on_gpu=0, in_ram=spec.n_experts_total),
        skew=Skew(UNIFORM),
    )
    settings = Settings(home=home)
    remembered(settings, None, with_disk=False)  # as loading a model does
    keep_run(cast(Runtime, SimpleNamespace(predict=predict, pool=None)), run, settings)
    return remembered(settings, None, with_disk=False).runs


def test_a_run_is_kept_beside_what_was_predicted_without_correction(tmp_path: Path) -> None:
    assert kept(RUN, tmp_path) == ((10.0, 8.0),)


@pytest.mark.parametrize(
    "run",
    [
        replace(RUN, new_tokens=3),
        replace(RUN, predicted_tokens_per_s=None),  # as where others were decoded meanwhile
        replace(RUN, trades=("misses at 1 plane",)),
    ],
)
def test_a_run_that_tells_nothing_of_the_machine_is_not_kept(
    run: RunStatistics, tmp_path: Path
) -> None:
    assert kept(run, tmp_path) == ()


def test_of_a_machine_that_nothing_is_kept_of_no_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "measured_ram", lambda threads: pytest.fail("it was measured"))
    remember_run(Settings(home=tmp_path), None, 10.0, 8.0)
    assert list(tmp_path.iterdir()) == []
