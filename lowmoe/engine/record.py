"""Records where the tokens of texts are routed.

Knows:        how a text goes through a model in windows.
Ignorant of:  files; what is learnt from a trace.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.recorded import RecordedRouting
from lowmoe.engine.runtime import Runtime
from lowmoe.errors import PromptError, UsageError
from lowmoe.experts.store import ExpertStore
from lowmoe.experts.trace import RoutingTrace


def record(
    runtime: Runtime, texts: Sequence[Sequence[int]], progress: Callable[[int, int], None]
) -> RoutingTrace:
    """texts: token ids; longer ones than the context are cut into several.

    progress: of tokens.  Raises PromptError for no tokens, UsageError on a GPU.
    """
    decoder, spec, folder = runtime.decoder, runtime.spec, runtime.folder
    if not isinstance(decoder.store, ExpertStore) or folder is None:
        raise UsageError("routing is recorded of model folders on the CPU. Load with gpu none.")
    windows = [w for ids in texts for w in _windows(ids, runtime.n_context)]
    total = sum(map(len, windows))
    if not total:
        raise PromptError("the text is empty. Give at least one word.")
    recorded = RecordedRouting(decoder.computation, spec)  # type: ignore[arg-type]
    running = Decoder(spec=spec, store=decoder.store, computation=recorded)
    begins, done = [], 0
    for ids in windows:
        begins.append(done)
        cache = running.new_cache(runtime.n_context)
        for first in range(0, len(ids), recorded.max_tokens):
            chunk = torch.tensor(ids[first : first + recorded.max_tokens])
            running.forward(chunk, cache)
            done += len(chunk)
            progress(done, total)
    return RoutingTrace(
        experts=recorded.experts().numpy().astype(np.uint16),
        begins=tuple(begins),
        n_experts=tuple(n for n in spec.n_experts_by_layer if n),
        model=folder.manifest.source.name,
        config=folder.manifest.config,
    )


def _windows(ids: Sequence[int], n_context: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(ids), n_context):
        yield ids[first : first + n_context]
