"""How evenly do random tokens spread over the experts of a model folder?   One JSON line.

Counts:      the experts that each token is sent to in every layer, all tokens at once.

    python -m benchmarks.peers.lowmoe_routing FOLDER
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

import lowmoe
from benchmarks.peers.evenness import N_TOKENS, evenness_of, require_even
from lowmoe.decoder.computation import Cache, Computation, layer_by_layer
from lowmoe.decoder.moe import Routing
from lowmoe.engine.generate import Session
from lowmoe.experts.store import ExpertStore
from lowmoe.spec import ModelSpec


class ListeningComputation:
    """Notes where tokens are sent, and in everything else is the computation it was given."""

    def __init__(self, computation: Any, spec: ModelSpec) -> None:
        self._computation = computation
        self.counts = [np.zeros(layer.feed_forward.n_experts, np.int64) for layer in spec.layers]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._computation, name)

    def run_layers(self, x: Tensor, cache: Cache, store: ExpertStore) -> Tensor:
        return layer_by_layer(self, len(self.counts), x, cache, store)

    def route(self, x: Tensor, layer_id: int) -> Routing:
        routing = self._computation.route(x, layer_id)
        np.add.at(self.counts[layer_id], routing.expert_ids.reshape(-1).numpy(), 1)
        return routing


def main() -> None:
    """Print one JSON object; fail if too few experts do the work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ram", help="default: what is free")
    arguments = parser.parse_args()
    with lowmoe.load(arguments.folder, gpu="none", ram=arguments.ram, context=N_TOKENS) as model:
        runtime, generator = model.runtime, random.Random(0)
        listener = ListeningComputation(runtime.decoder.computation, runtime.spec)
        decoder = replace(runtime.decoder, computation=cast(Computation, listener))
        session = Session(replace(runtime, decoder=decoder))
        ids = [generator.randrange(runtime.spec.n_vocab) for _ in range(N_TOKENS)]
        for _ in session.forward(ids):
            pass
    evenness = evenness_of(listener.counts)
    require_even(str(arguments.folder), evenness)
    print(json.dumps(evenness))


if __name__ == "__main__":
    main()
