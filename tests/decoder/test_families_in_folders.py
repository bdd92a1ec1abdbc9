"""Every family from a checkpoint through a model folder to tokens."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from goldens import GOLDENS, spell_as_the_family_does
from tiny_models import VOCABULARY, decoder_over, in_chunks
from torch import Tensor

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder import gpu_buffers, native
from lowmoe.decoder.abilities import ALL, lacking, needs
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.gpu_buffers import why_not_shape
from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.weights import from_folder
from lowmoe.engine.load import TORCH, load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.experts.source import FolderExperts
from lowmoe.experts.store import ExpertStore
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.loader.synthetic import write_synthetic
from tests.checkpoint.tiny_mixtral import Options, convert

# Of each family the checkpoint with most kinds of tensors in it.
CASES = {
    family: max(goldens, key=lambda name: len(str(goldens[name].config)))
    for family, goldens in GOLDENS.items()
}
N_TOKENS = 24


@pytest.fixture(scope="module", params=sorted(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: str = request.param
    folder = tmp_path_factory.mktemp(family)
    GOLDENS[family][CASES[family]].save(folder, family)
    spell_as_the_family_does(folder, family)
    return folder


def some_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (N_TOKENS,), generator=torch.Generator().manual_seed(2))


@contextlib.contextmanager
def folder_decoder(path: Path, *, n_slots: int = 1000) -> Iterator[Decoder]:
    """A float32 decoder in torch over a model folder, with RAM for n_slots experts."""
    with ModelFolder(path) as folder:
        spec, recipe = read_config(folder.manifest.config).spec, folder.recipe
        format = recipe.expert_format(spec)
        source = FolderExperts(folder, recipe.part_names, format.part_bytes)
        budget, total = n_slots * sum(source.buffer_bytes), spec.n_experts_total
        with ExpertStore(source, ram_budget_bytes=budget, n_experts_total=total) as store:
            computation = TorchComputation(
                spec=spec,
                weights=from_folder(folder, spec),
                format=format,
                kernels=ReferenceKernels(),
                dtype=torch.float32,
                max_tokens=64,
                n_context=64,
            )
            yield Decoder(spec=spec, store=store, computation=computation)


def greedy(decoder: Decoder, ids: Tensor, count: int) -> list[int]:
    """The likeliest tokens after these."""
    cache, found, new = decoder.new_cache(64), [], ids
    for _ in range(count):
        new = decoder.logits(decoder.forward(new, cache)[-1:]).argmax(-1)
        found += new.tolist()
    return found


def test_an_unquantized_folder_computes_what_its_checkpoint_does(
    checkpoint: Path, tmp_path: Path
) -> None:
    convert(checkpoint, tmp_path / "model", Options(recipe=Recipe(format="fp32")))
    with decoder_over(checkpoint) as decoder:
        wanted = in_chunks(decoder, some_ids(), [N_TOKENS])
    with folder_decoder(tmp_path / "model") as decoder:
        assert torch.equal(in_chunks(decoder, some_ids(), [N_TOKENS]), wanted)


def test_a_quantized_folder_says_the_same_whatever_the_budget_and_nearly_what_its_checkpoint_says(
    checkpoint: Path, tmp_path: Path
) -> None:
    convert(checkpoint, tmp_path / "model", Options(recipe=Recipe(expert_planes=3)))
    with decoder_over(checkpoint) as decoder:
        original = in_chunks(decoder, some_ids(), [N_TOKENS])
    with folder_decoder(tmp_path / "model") as decoder:
        found = in_chunks(decoder, some_ids(), [N_TOKENS])
        tokens = greedy(decoder, some_ids(), 12)
    # Three planes change a weight by a relative 1e-2, a dozen matrices one after the other by some
    # times more, and a token that changes its expert by more than that. Logits that have nothing
    # to do with each other would be 1.4 apart.
    moved = (found - original).square().mean(1).sqrt().median()
    assert moved < 0.4 * original.std()
    with folder_decoder(tmp_path / "model", n_slots=2) as decoder:
        assert greedy(decoder, some_ids(), 12) == tokens


def test_two_planes_are_run_from_a_small_budget(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "model", Options(recipe=Recipe(expert_planes=2)))
    with folder_decoder(tmp_path / "model") as decoder:
        tokens = greedy(decoder, some_ids(), 12)
    with folder_decoder(tmp_path / "model", n_slots=2) as decoder:
        assert greedy(decoder, some_ids(), 12) == tokens
        assert decoder.store.traffic().disk_bytes > 0


class Hearing:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_synthetic_folder_loads_computes_and_says_what_computes_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    family, heard = read_config(config), Hearing()
    write_synthetic(
        tmp_path / "model", config, family, Recipe(), name="tiny", progress=lambda done, total: None
    )
    runtime = load_folder(tmp_path / "model", LoadOptions(context=64, gpu="none"), heard)
    try:
        decoder = runtime.decoder
        logits = decoder.logits(decoder.forward(some_ids(), decoder.new_cache(64)))
        assert logits.isfinite().all()
        assert logits.std() > 0.1
    finally:
        runtime.close()
    in_torch = runtime.isa == TORCH
    assert [("torch computes this model" in note) for note in heard.notes] == [True] * in_torch


def test_a_plain_decoder_needs_nothing_and_what_others_need_is_named() -> None:
    assert needs(read_config(ALIASES["mixtral-8x7b"].config).spec) == []
    spec = read_config(ALIASES["gpt-oss-20b"].config).spec
    assert lacking(spec, ALL) == []
    assert lacking(spec, ALL - {"attention sinks"}) == ["attention sinks"]
    every = {n for alias in ALIASES.values() for n in needs(read_config(alias.config).spec)}
    of_none = {
        "norms behind layers that keep states",
        "rope by length",
        "states in every layer",
    }
    assert ALL - every <= of_none, "a need that no model has"


def test_a_gpu_does_what_native_code_does_and_refuses_the_rest_by_name() -> None:
    specs = {name: read_config(alias.config).spec for name, alias in ALIASES.items()}
    assert gpu_buffers.ABLE <= native.ABLE
    for name, spec in specs.items():
        refused = why_not_shape(spec)
        if name == "llama-3.1-405b":
            assert refused == "GPU kernels cannot do 16384 hidden channels"
        elif lacks := lacking(spec, gpu_buffers.ABLE):
            assert refused == f"GPU kernels have no {', '.join(lacks)} yet"
        else:
            assert refused is None
    assert why_not_shape(specs["glm-4.5-air"]) is None
    assert "no latent attention" in (why_not_shape(specs["kimi-k2"]) or "")
