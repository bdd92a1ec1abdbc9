"""How many tokens a second does lowmoe prefill or decode?   tokens/s, one JSON line.

Counts:      passes over random tokens up to the logits of the last one: all at once (prefill) or
             one by one after a first (decode), the cache emptied before every sample.
Leaves out:  loading, choosing tokens, warm-up runs. Where all experts fit into RAM they are read
             before the clock starts.

    python -m benchmarks.peers.lowmoe_timing FOLDER --bits 4 --measure decode --tokens 128 --threads 2
"""  # noqa: E501, a command in one line

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import lowmoe
from benchmarks.peers.samples import add_sample_arguments, take_samples
from lowmoe.api import Model
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.runtime import Runtime

N_STATISTICS = 3  # tokens; the first comes out of the prefill


class LowmoeSequence:
    """One sequence of tokens in a loaded model."""

    def __init__(self, model: Model) -> None:
        assert model.session is not None
        self._session, self._decoder = model.session, model.runtime.decoder

    def clear(self) -> None:
        """Forget all tokens."""
        self._session.rewind([])

    def continue_after(self, ids: Sequence[int]) -> None:
        """Have exactly these tokens before; what the cache already begins with is not redone."""
        n_kept = self._session.rewind(ids)
        if n_kept < len(ids):
            self.forward(ids[n_kept:])

    def forward(self, ids: Sequence[int]) -> None:
        """Run tokens after those before, up to the logits of the last."""
        for hidden in self._session.forward(ids):
            last = hidden[-1:]
        self._decoder.logits(last)


def fill_ram(runtime: Runtime) -> bool:
    """Read every expert once, if they all fit; returns whether they do."""
    store, layers = runtime.store, runtime.spec.layers
    if store.n_slots < runtime.spec.n_experts_total:
        return False
    for layer_id, layer in enumerate(layers):
        store.want(layer_id, range(layer.feed_forward.n_experts))
        for expert_ids in store.portions():
            with store.borrow(layer_id, expert_ids):
                pass
    return True


def bytes_per_token(model: Model) -> float:
    """Bytes of weights that one token reads, as lowmoe's own statistics of a short answer say.

    The context must have room for N_STATISTICS tokens and one; what was in it is forgotten.
    """
    assert model.session is not None
    options = SamplingOptions(temperature=0.0, max_new_tokens=N_STATISTICS)
    for _ in model.session.token_ids([0], options, heed_ends=False):
        pass
    return float(model.session.statistics().bytes_per_token.ram)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--ram", help="default: what is free")
    add_sample_arguments(parser)
    arguments = parser.parse_args()
    with lowmoe.load(
        arguments.folder,
        gpu="none",
        bits=arguments.bits,
        ram=arguments.ram,
        threads=arguments.threads,
        context=arguments.tokens + 1 + N_STATISTICS,
    ) as model:
        all_in_ram = fill_ram(model.runtime)
        sequence, n_vocab = LowmoeSequence(model), model.runtime.spec.n_vocab
        samples = take_samples(
            sequence.clear, sequence.forward, n_vocab=n_vocab, arguments=arguments
        )
        result = {
            "engine": f"lowmoe, {model.runtime.isa}",
            "bytes_per_token": bytes_per_token(model),
            "all_in_ram": all_in_ram,
            "samples": samples,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
