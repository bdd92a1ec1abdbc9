"""Conversations with layers that keep states, cut short and asked for by a session."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from lowmoe.decoder.computation import Cache
from lowmoe.decoder.decoder import Decoder
from lowmoe.engine.generate import Session


def interrupted(decoder: Decoder, at: int) -> Callable[[Tensor, Cache], None]:
    """A pass that ends in the middle of a layer, as Ctrl-C ends it."""
    computation: Any = decoder.computation
    mix = type(computation).mix

    def stopping(self: Any, x: Tensor, routing: Any, layer_id: int, store: Any) -> Tensor:
        if layer_id == at:
            raise KeyboardInterrupt
        found: Tensor = mix(self, x, routing, layer_id, store)
        return found

    def run(ids: Tensor, cache: Cache) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(computation), "mix", stopping)
            with pytest.raises(KeyboardInterrupt):
                decoder.forward(ids, cache)

    return run


def runtime_over(decoder: Decoder, n_sequences: int = 1) -> Any:
    """What answers ask of a runtime, without files and text."""
    return SimpleNamespace(
        decoder=decoder,
        n_context=decoder.spec.context_length,
        n_sequences=n_sequences,
        spec=decoder.spec,
        store=decoder.store,
        dense_bytes=0,
        dense_bytes_per_token=0,
    )


def session_over(decoder: Decoder) -> Session:
    session = Session(runtime_over(decoder))
    session.batch.chunk_tokens = 40
    return session
