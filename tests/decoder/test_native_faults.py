"""Native passes that an error breaks off, and weights that are no numbers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_goldens import (
    N_TOKENS,
    Golden,
    some_ids,
)
from tiny_models import in_chunks
from torch import Tensor
from trellis_models import trellis_model
from trellis_shapes import SHAPES

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.decoder.weights import DenseWeights
from lowmoe.kernels import cpu


def test_a_layer_that_an_error_broke_off_is_computed_anew(
    plain: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain.model.decoder(plain.model.native()) as decoder:
        wanted = in_chunks(decoder, plain.ids, [20])
    read_expert = ModelFolder.read_expert
    with plain.model.decoder(plain.model.native(), n_slots=2) as decoder:
        for n_good in (0, 1, 2, 5):
            left = n_good

            def failing(*what: Any, **how: Any) -> int:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError("thrown by the test")
                return read_expert(*what, **how)

            cache = decoder.new_cache(N_TOKENS)
            with monkeypatch.context() as patch:
                patch.setattr(ModelFolder, "read_expert", failing)
                with pytest.raises(OSError, match="thrown by the test"):
                    decoder.forward(plain.ids[:20], cache)
            assert cache.n_tokens == 0
            hidden = decoder.forward(plain.ids[:20], cache)
            assert torch.equal(decoder.logits(hidden), wanted[:20])


POISONED: dict[str, Callable[[DenseWeights], Tensor]] = {
    "embedding's d": lambda w: w.embedding.d,  # type: ignore[union-attr]
    "attention's norm": lambda w: w.layers[1].attention_norm,
    "q, k and v's d": lambda w: w.layers[1].qkv.d,  # type: ignore[union-attr]
    "attention's output's d": lambda w: w.layers[1].attention_out.d,  # type: ignore[union-attr]
    "experts' norm": lambda w: w.layers[1].experts_norm,
    "router": lambda w: w.layers[1].router[2],
    "gate and up's d": lambda w: w.layers[1].transforms.d_in,
    "down's d": lambda w: w.layers[1].transforms.d_inner[2],
    "final norm": lambda w: w.final_norm,
    "head's d": lambda w: w.head.d,  # type: ignore[union-attr]
}


@pytest.mark.parametrize(
    ("which", "number"),
    [(which, number) for which in POISONED for number in (math.nan, math.inf)
     if (which, number) != ("router", math.inf)],  # an infinite score below 0 is one, never chosen
)  # fmt: skip
def test_a_weight_that_is_no_number_leaves_no_logit_that_is_one(
    tmp_path: Path, which: str, number: float
) -> None:
    # Rounded to int8 it could pass for a number, and a wrong answer for a right one.
    with trellis_model(tmp_path / "folder", SHAPES["4 heads of 16 over 2"]) as model:
        POISONED[which](model.weights)[5] = number
        ids = some_ids(model, 12)
        for isa in cpu.isas():
            with model.decoder(model.native(isa=isa)) as decoder:
                assert in_chunks(decoder, ids, [9, 1]).isnan().all()
