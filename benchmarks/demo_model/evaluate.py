"""How good is the demo model?   nats a token, bits a byte, perplexity by width, samples, routing.

    python -m benchmarks.demo_model.evaluate MODEL TOKENS --beside FIRST --out RESULTS.json

MODEL is a Hugging Face folder that export.py wrote, TOKENS the folder of prepare.py, FIRST an
earlier model with the same tokenizer.  RESULTS.json is what page.py and card.py read.

Counts:      every held-out document, alternately as a chat and bare, in pieces of the smaller
             model's context; bits a byte on bare stories alone; perplexities on the first
             PERPLEXITY_TOKENS of each set, samples as they come from seed 1; of an answer to each
             question about somebody of WHO and something of WHAT, whether it names them and ends.
Leaves out:  what was learnt from; speed.
"""

import argparse
import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import lowmoe
from benchmarks.demo_model.documents import Documents, load_documents
from benchmarks.demo_model.export import TRAINING, load_trained
from benchmarks.demo_model.heldout import SETS, batches, heldout_losses, load_heldout, loss_of
from benchmarks.demo_model.mixtral import Mixtral
from benchmarks.demo_model.routing import expert_shares, hit_rate, repeat_rate
from benchmarks.demo_model.train import frame_of
from lowmoe.api import Model
from lowmoe.engine.evaluate import evaluate
from lowmoe.engine.machine import machine_line

WIDTHS = (16, 6, 4, 2)
WINDOW, PERPLEXITY_TOKENS = 512, 3072  # tokens of each set
ROUTING_TOKENS, CACHE_TOKENS = 4096, 512  # of each set; playing a cache is slow
PROMPTS = (
    "Tell me a story about a lighthouse keeper called Ines and a lost whale.",
    "Tell a bedtime story called `The Clockmaker's Mouse`.",
    "Write a short story about two sisters who find a map in the attic.",
    "Tell me a simple story about a boy, a kite and a storm.",
    "Tell the old fairy tale called the frog who would be king.",
)
WHO = (
    "a lighthouse keeper called Ines",
    "a boy named Tomas",
    "an old baker called Greta",
    "a girl named Amara",
)
WHAT = (
    "a lost whale",
    "a broken clock",
    "a young dragon",
    "a terrible storm",
    "a talking crow",
    "a golden key",
)


def bits_per_byte(
    model: Mixtral, stories: Documents, tokenizer: Tokenizer, *, context: int
) -> float:
    """Of bare texts, in pieces of a context; the first token of a piece is given."""
    texts = [stories.text(i) for i in range(len(stories))]
    pieces = [t[a : a + context + 1] for t in texts for a in range(0, len(t) - 1, context)]
    found = batches(pieces, context=context, at_most=None)
    nats = loss_of(model, found) * sum(len(b.ids) for b in found)
    n_bytes = sum(
        len(tokenizer.decode(piece[1:].tolist(), skip_special_tokens=False).encode())
        for piece in pieces
    )
    return nats / math.log(2) / n_bytes


def losses(folder: Path, tokens: Path, *, context: int) -> dict[str, Any]:
    """A model on all that is held out."""
    model = load_trained(folder)
    heldout = load_heldout(tokens / "heldout", frame_of(tokens / "tokenizer.json"), context=context)
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    stories = load_documents(tokens / "heldout" / "stories.safetensors")
    return {
        "name": folder.name,
        "loss": heldout_losses(model, heldout),
        "bits_per_byte": bits_per_byte(model, stories, tokenizer, context=context),
    }


@torch.no_grad()
def routing(folder: Path, tokens: Path) -> dict[str, Any]:
    """Shares of every expert by kind of text, repeats, hits by the number of slots."""
    model = load_trained(folder)
    shape = model.shape
    heldout = load_heldout(
        tokens / "heldout",
        frame_of(tokens / "tokenizer.json"),
        context=shape.context,
        at_most=ROUTING_TOKENS,
    )
    choices = {}
    for name, found in heldout.items():
        chosen = []
        for batch in found:
            model(torch.from_numpy(batch.ids.astype(np.int64)), batch.lengths)
            chosen.append(model.choices())
        choices[name] = torch.cat(chosen, 1)[:, :ROUTING_TOKENS]  # [L, T, K]
    slots = [shape.n_active, *range(4, shape.n_layers * shape.n_experts + 1, 4)]
    return {
        "shares": {n: expert_shares(c, shape.n_experts).tolist() for n, c in choices.items()},
        "repeats": {n: repeat_rate(c).tolist() for n, c in choices.items()},
        "n_active": shape.n_active,
        "slots": slots,
        "hits": {n: [hit_rate(c[:, :CACHE_TOKENS], s) for s in slots] for n, c in choices.items()},
    }


@contextmanager
def at_width(checkpoint: Path, quantized: Path, bits: int) -> Iterator[Model]:
    """The model at 16 bits from its checkpoint, or narrower from one folder."""
    if bits == 16:
        loading = lowmoe.load(checkpoint, gpu="none", dtype="bfloat16", sequences=8)
    else:
        loading = lowmoe.load(quantized, gpu="none", bits=bits, sequences=8)
    with loading as model:
        yield model


def by_width(checkpoint: Path, tokens: Path) -> list[dict[str, Any]]:
    """Perplexity beside the unquantized model, and samples, at every width."""
    rows = []
    ids = [
        np.concatenate([documents.text(i) for i in range(len(documents))])[:PERPLEXITY_TOKENS]
        for documents in (load_documents(tokens / "heldout" / f"{n}.safetensors") for n in SETS)
    ]
    with (
        tempfile.TemporaryDirectory() as work,
        lowmoe.load(checkpoint, gpu="none", dtype="float32") as plain,
    ):
        quantized = Path(work) / "demo"
        lowmoe.quantize(checkpoint, quantized, bits=max(w for w in WIDTHS if w < 16))
        for bits in WIDTHS:
            with at_width(checkpoint, quantized, bits) as model:
                found = evaluate(
                    model.logits,
                    np.concatenate(ids).tolist(),
                    window=WINDOW,
                    reference=plain.logits,
                )
                row = {"bits": bits, "perplexity": found.perplexity}
                row |= {"kl": found.kl, "top1": found.top1}
                row |= {"about": about(model), "samples": samples(model)}
            rows.append(row)
    return rows


def samples(model: Model) -> list[dict[str, Any]]:
    """One answer to each prompt, and whether it ended by itself."""
    found = []
    for prompt in PROMPTS:
        tokens = list(model.stream([{"role": "user", "content": prompt}], temperature=0.7, seed=1))
        found.append(
            {
                "prompt": prompt,
                "text": "".join(token.text for token in tokens),
                "n_tokens": sum(token.id is not None for token in tokens),
                "most_tokens": model.options().max_new_tokens,
            }
        )
    return found


def names(answer: str, subject: str) -> bool:
    """Whether it has a subject's last word, as one or as several."""
    return re.search(rf"\b{subject.split()[-1]}s?\b", answer, re.IGNORECASE) is not None


def about(model: Model) -> dict[str, float]:
    """Shares of answers that name who was asked for, and what, and that end by themselves."""
    asked = [(who, what) for who in WHO for what in WHAT]
    prompts = [
        [{"role": "user", "content": f"Tell me a story about {who} and {what}."}]
        for who, what in asked
    ]
    options = model.options(temperature=0.7, seed=1)
    answers = [""] * len(asked)
    n_tokens = [0] * len(asked)
    for which, token in model.stream_all(prompts, [options] * len(asked)):
        answers[which] += token.text
        n_tokens[which] += token.id is not None
    pairs = list(zip(asked, answers, strict=True))
    return {
        "who": np.mean([names(answer, who) for (who, _), answer in pairs]).item(),
        "what": np.mean([names(answer, what) for (_, what), answer in pairs]).item(),
        "ended": np.mean([n < options.max_new_tokens for n in n_tokens]).item(),
    }


def main() -> None:
    """Measure all and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--beside", type=Path, help="an earlier model with the same tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folders = [f for f in (arguments.model, arguments.beside) if f is not None]
    context = min(load_trained(folder).shape.context for folder in folders)
    training = arguments.model / TRAINING
    results = {
        "machine": machine_line(),
        "context": context,
        "tokens": json.loads(training.read_text("utf-8"))["tokens"] if training.exists() else None,
        "models": [losses(f, arguments.tokens, context=context) for f in folders],
        "widths": by_width(arguments.model, arguments.tokens),
        "routing": routing(arguments.model, arguments.tokens),
    }
    for found in results["models"]:
        print(f"{found['name']}: {found['bits_per_byte']:.3f} bits a byte, {found['loss']}")
    for row in results["widths"]:
        print(
            f"{row['bits']:2} bits: perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}, "
            f"answers about what was asked: {row['about']}"
        )
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
