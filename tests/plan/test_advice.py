"""What is made of a model, and what stops before its first byte."""

import re
from pathlib import Path

import pytest

import lowmoe
from lowmoe.checkpoint.manifest import read_manifest
from lowmoe.engine.load_options import LoadOptions
from lowmoe.errors import MemoryBudgetError, UsageError
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.plan.advice import advise
from lowmoe.settings import Settings

GB = 10**9


def advised(name: str, tmp_path: Path, **options: object) -> tuple[int, str]:
    spec = read_config(ALIASES[name].config).spec
    asked = LoadOptions(gpu="none", **options)  # type: ignore[arg-type]
    advice = advise(name, spec, asked, Settings(home=tmp_path))
    return advice.bits, advice.words


def test_a_width_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    bits, note = advised("olmoe-1b-7b", tmp_path, ram=4 * GB, bits=2)
    assert bits == 2
    assert re.search(r"olmoe-1b-7b at 2 bits .* [\d.]+-[\d.]+ tokens/s", note)


def test_less_ram_is_advised_fewer_bits(tmp_path: Path) -> None:
    """6 bits and 8192 tokens of context take 6.1 GB."""
    widths = [advised("qwen-72b", tmp_path, ram=n * GB)[0] for n in (100, 50)]
    assert widths == sorted(widths, reverse=True)


def test_what_does_not_fit_names_a_line_that_would(tmp_path: Path) -> None:
    """All the room is for keys and values: 2.6 MB a token."""
    with pytest.raises(MemoryBudgetError) as refused:
        advised("qwen-72b", tmp_path, ram=38 * GB, context=8192)
    said = str(refused.value)
    line = r"lowmoe run qwen-72b --bits (\d) --gpu none --ram 38000000000 --context (\d+)$"
    found = re.search(line, said)
    assert found is not None, said
    bits, context = int(found[1]), int(found[2])
    assert advised("qwen-72b", tmp_path, ram=38 * GB, bits=bits, context=context)[0] == bits


def test_the_line_that_would_run_keeps_what_was_asked_for(tmp_path: Path) -> None:
    asked = {"ram": 38 * GB, "kv": "float32", "threads": 1, "context": 4096}
    with pytest.raises(MemoryBudgetError) as refused:
        advised("qwen-72b", tmp_path, **asked)
    words = str(refused.value).partition("This would: ")[2]
    assert words == (
        "lowmoe run qwen-72b --bits 2 --gpu none --ram 38000000000 --threads 1 --context 2048 "
        "--kv float32"
    )


def test_conversations_beside_each_other_have_caches_of_their_own(tmp_path: Path) -> None:
    """2.6 MB a token: 5.4 GB of 2048."""
    options = {"bits": 2, "context": 2048, "ram": 30 * GB}
    assert advised("qwen-72b", tmp_path, sequences=1, **options)[0] == 2
    with pytest.raises(MemoryBudgetError, match="does not fit"):
        advised("qwen-72b", tmp_path, sequences=4, **options)


def test_as_many_planes_of_misses_as_of_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no more planes"):
        advised("mixtral-8x7b", tmp_path, bits=2, miss_planes=1)


def test_what_fits_in_no_way_says_so(tmp_path: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="Nothing would on this machine"):
        advised("llama-3.1-405b", tmp_path, ram=GB)


def test_a_checkpoint_is_made_at_the_best_width_that_runs_well(
    talking_checkpoint: Path, home: Path
) -> None:
    with lowmoe.load(talking_checkpoint) as model:
        assert model.runtime.bits == 6
    (folder,) = (p for p in (home / "models").iterdir() if p.is_dir())
    assert read_manifest(folder).recipe.expert_planes == 3


def test_nothing_is_made_of_what_cannot_run(talking_checkpoint: Path, home: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="does not fit"):
        lowmoe.load(talking_checkpoint, ram=1000)
    assert not (home / "models").exists()


def test_nothing_is_made_for_a_card_that_is_not_here(talking_checkpoint: Path, home: Path) -> None:
    with pytest.raises(UsageError, match="no NVIDIA driver"):
        lowmoe.load(talking_checkpoint, gpu="4090", ram="64GiB")
    assert not (home / "models").exists()
