"""How many of the next layer's experts does a look one layer ahead name?   %, of the experts used.

Counts:      every layer but the first, token by token as when decoding: the experts that the
             decoder asks the store to read ahead, against those the layer then wants.
Leaves out:  the first token; how much time the reads get; whether the store had room for them.

Beside it: as many experts drawn blindly, and those that the token before went to in that layer,
which a cache already has. The ceiling is 100 %.

    python benchmarks/read_ahead.py [MODEL] [--text FILE] [--tokens 512]
"""

import argparse
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import lowmoe
from lowmoe.decoder.decoder import Decoder
from lowmoe.engine.machine import machine_line
from lowmoe.experts.store import ExpertStore
from lowmoe.families.aliases import DEMO


@dataclass
class ListeningStore:
    """Notes what a decoder guesses and wants, and leaves the work to its store."""

    store: ExpertStore
    guessed: dict[int, list[set[int]]] = field(default_factory=dict)
    wanted: dict[int, list[set[int]]] = field(default_factory=dict)

    has_all = is_complete = False  # so that every layer is guessed

    def want(self, layer_id: int, expert_ids: Collection[int]) -> None:
        self.wanted.setdefault(layer_id, []).append(set(expert_ids))
        self.store.want(layer_id, expert_ids)

    def prefetch(self, layer_id: int, expert_ids: Collection[int]) -> None:
        self.guessed.setdefault(layer_id, []).append(set(expert_ids))
        self.store.prefetch(layer_id, expert_ids)

    def read_rest(self, n_experts: Sequence[int]) -> None:
        self.store.read_rest(n_experts)

    def portions(self) -> Iterator[list[int]]:
        return self.store.portions()

    def borrow(
        self, layer_id: int, expert_ids: Collection[int]
    ) -> AbstractContextManager[dict[int, tuple[Tensor, ...]]]:
        return self.store.borrow(layer_id, expert_ids)


def listen(decoder: Decoder, ids: list[int]) -> ListeningStore:
    """Run a text through a model token by token."""
    store = ListeningStore(decoder.store)
    decoder = replace(decoder, store=cast(ExpertStore, store))
    cache = decoder.new_cache(len(ids))
    for token_id in ids:
        decoder.forward(torch.tensor([token_id]), cache)
    return store


def recall(guesses: list[set[int]], truths: list[set[int]]) -> list[float]:
    """Of each token's experts, the share that its guess names."""
    return [len(guess & truth) / len(truth) for guess, truth in zip(guesses, truths, strict=True)]


def measure(decoder: Decoder, ids: list[int]) -> list[dict[str, Any]]:
    """The recall of every layer that can be guessed."""
    store = listen(decoder, ids)
    rows = []
    for layer_id, guesses in sorted(store.guessed.items()):
        experts = decoder.spec.layers[layer_id].feed_forward
        truths = store.wanted[layer_id]
        rows.append(
            {
                "layer": layer_id,
                "look_ahead": recall(guesses[1:], truths[1:]),
                "token_before": recall(truths[:-1], truths[1:]),
                "blind": experts.router.n_active / experts.n_experts,
            }
        )
    return rows


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO, help="an alias or a path")
    parser.add_argument("--text", type=Path, help="default: the text that models are calibrated on")
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()

    shipped = resources.files("lowmoe.loader") / "calibration.txt"
    text = (options.text or shipped).read_text(encoding="utf-8")
    with lowmoe.load(options.model, gpu="none", context=options.tokens) as model:
        print(machine_line())
        ids = model.runtime.text.encode(text)[: options.tokens]
        rows = measure(model.runtime.decoder, ids)
    print(f"{options.model}, {len(ids)} tokens, % of the experts used")
    print("layer   look ahead   token before   blind")
    for row in rows:
        print(
            f"{row['layer']:5}{mean(row['look_ahead']):13.1%}{mean(row['token_before']):15.1%}"
            f"{row['blind']:8.1%}"
        )
    overall = {
        name: mean([mean(row[name]) for row in rows]) for name in ("look_ahead", "token_before")
    }
    print(f"  all{overall['look_ahead']:13.1%}{overall['token_before']:15.1%}")
    result = {"machine": machine_line(), "model": options.model, "tokens": len(ids)}
    print(json.dumps({**result, **overall, "layers": rows}))


if __name__ == "__main__":
    main()
