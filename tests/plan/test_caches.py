"""A server has as many caches as decode together, or as a part of the memory holds."""

from pathlib import Path

import pytest

import lowmoe
from lowmoe.engine.load_options import MOST_SEQUENCES, LoadOptions
from lowmoe.errors import UsageError
from lowmoe.plan.caches import SHARE, advised_caches


@pytest.mark.parametrize("kv", ["float16", "int8"])
@pytest.mark.parametrize("context", [256, 512])
def test_a_cache_takes_what_the_model_that_is_loaded_sets_aside_for_it(
    kv: str, context: int
) -> None:
    with lowmoe.load(kv=kv, context=context, threads=1) as model:
        found = advised_caches(model.runtime.spec, LoadOptions(kv=kv, context=context))
        assert found.cache_bytes == model.runtime.decoder.computation.cache_bytes(context)


@pytest.mark.parametrize(
    ("n_fitting", "n"), [(0.1, 1), (1.5, 1), (3.9, 3), (MOST_SEQUENCES + 5, MOST_SEQUENCES)]
)
def test_caches_take_their_share_of_the_budget_and_no_more_than_decode_together(
    model_folder: Path, n_fitting: float, n: int
) -> None:
    with lowmoe.load(model_folder) as model:
        spec = model.runtime.spec
    one = advised_caches(spec, LoadOptions()).cache_bytes
    assert advised_caches(spec, LoadOptions(ram=int(n_fitting * one / SHARE))).n == n


def test_a_budget_that_is_none_is_refused(model_folder: Path) -> None:
    with lowmoe.load(model_folder) as model, pytest.raises(UsageError, match="--ram is 'much'"):
        advised_caches(model.runtime.spec, LoadOptions(ram="much"))
