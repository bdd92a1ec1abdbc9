"""The loss on documents that training never saw.

Knows:        held-out sets, the model.
Ignorant of:  training.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.demo_model.documents import Batch, Documents, Frame, Ids, load_documents
from benchmarks.demo_model.mixtral import Mixtral

SETS = ("stories", "scenes", "qa", "fairy")
BATCH_TOKENS = 4096


def load_heldout(
    folder: Path, frame: Frame, *, context: int, at_most: int | None = None
) -> dict[str, list[Batch]]:
    """Every set's documents, one as a chat, one bare, and so on; at_most: tokens of each set."""
    return {
        name: batches(
            framed(load_documents(folder / f"{name}.safetensors"), frame),
            context=context,
            at_most=at_most,
        )
        for name in SETS
    }


def framed(documents: Documents, frame: Frame) -> list[Ids]:
    """Even ones as chats, odd ones as bare texts."""
    return [
        frame.bare(documents.text(i))
        if i % 2
        else frame.chat(documents.prompt(i), documents.text(i))
        for i in range(len(documents))
    ]


def batches(documents: Sequence[Ids], *, context: int, at_most: int | None) -> list[Batch]:
    """As they are, cut into pieces of the context."""
    pieces = [d[a : a + context + 1] for d in documents for a in range(0, len(d) - 1, context)]
    found: list[Batch] = []
    held: list[Ids] = []
    total = 0
    for piece in pieces:
        if at_most is not None and total >= at_most:
            break
        held.append(piece)
        total += len(piece) - 1
        if sum(len(p) - 1 for p in held) >= BATCH_TOKENS:
            found.append(together(held))
            held = []
    return [*found, together(held)] if held else found


def together(pieces: Sequence[Ids]) -> Batch:
    """One batch of them."""
    return Batch(
        ids=np.concatenate([p[:-1] for p in pieces]),
        targets=np.concatenate([p[1:] for p in pieces]),
        lengths=[len(p) - 1 for p in pieces],
        weights=np.ones(sum(len(p) - 1 for p in pieces), dtype=np.float32),
    )


@torch.no_grad()
def loss_of(model: Mixtral, batches: Sequence[Batch]) -> float:
    """Nats a token."""
    device, total = model.norm.weight.device, 0.0
    for batch in batches:
        ids, targets = (
            torch.from_numpy(x.astype("int64")).to(device) for x in (batch.ids, batch.targets)
        )
        total += model.loss(ids, targets, batch.lengths).item() * len(ids)
    return total / sum(len(b.ids) for b in batches)


def heldout_losses(model: Mixtral, heldout: dict[str, list[Batch]]) -> dict[str, float]:
    """Nats a token of every set."""
    return {name: round(loss_of(model, found), 4) for name, found in heldout.items()}
