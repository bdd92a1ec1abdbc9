"""How much does each width cost?   perplexity, KL divergence (nats a token), top-1 agreement, MB.

    python benchmarks/demo_quality.py CHECKPOINT TEXT [TEXT ...]

Counts:      texts in windows of 512 tokens, each behind what the tokenizer puts in front of a text,
             the unquantized checkpoint in float32 as reference;
             every folder made here, calibrated on the text that ships with lowmoe.
Leaves out:  speed.
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path

import lowmoe
from lowmoe.engine.evaluate import evaluate
from lowmoe.engine.machine import machine_line

WINDOW = 512
FOLDERS = {  # name: how it is made, and the widths it is run at
    "bf16": ({"format": "bf16"}, ("auto",)),
    "6-bit folder": ({"bits": 6}, (6, 4, 2)),
    "4-bit folder": ({"bits": 4}, (4, 2)),
    "2-bit folder": ({"bits": 2}, (2,)),
    "6-bit folder, uncalibrated": ({"bits": 6, "calibrate": False}, (6, 4, 2)),
    "nf4": ({"format": "nf4"}, ("auto",)),
}


def main() -> None:
    """Print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    arguments = parser.parse_args()
    print(machine_line())
    rows = []
    with lowmoe.load(arguments.checkpoint, dtype="float32") as reference:
        tokenizer = reference.runtime.text.tokenizer
        ids = [
            token
            for path in arguments.texts
            for token in tokenizer.encode(path.read_text("utf-8"), add_special=False)
        ]
        logits = functools.cache(lambda tokens: reference.logits(tokens))
        plain = evaluate(
            lambda tokens: logits(tuple(tokens)), ids, window=WINDOW, prefix=tokenizer.prefix
        )
        print(f"{'unquantized':32} perplexity {plain.perplexity:.3f} over {plain.tokens} tokens")
        with tempfile.TemporaryDirectory() as work:
            for name, (making, widths) in FOLDERS.items():
                folder = Path(work) / name.replace(" ", "-")
                lowmoe.quantize(arguments.checkpoint, folder, **making)
                for bits in widths:
                    with lowmoe.load(folder, gpu="none", bits=bits) as model:
                        found = evaluate(
                            model.logits,
                            ids,
                            window=WINDOW,
                            prefix=tokenizer.prefix,
                            reference=lambda tokens: logits(tuple(tokens)),
                        )
                        n_bytes = model.runtime.dense_bytes
                        n_bytes += model.runtime.store.expert_bytes * (
                            model.runtime.spec.n_experts_total
                        )
                        row = {"folder": name, "bits": model.runtime.bits, "bytes": n_bytes}
                    row |= {"perplexity": found.perplexity, "kl": found.kl, "top1": found.top1}
                    rows.append(row)
                    print(
                        f"{name:28} at {row['bits']:2} bits  {n_bytes / 1e6:6.1f} MB  perplexity "
                        f"{found.perplexity:7.3f}  KL {found.kl:.5f}  top-1 {found.top1:.4f}",
                        flush=True,
                    )
    print(json.dumps({"machine": machine_line(), "reference": plain.perplexity, "rows": rows}))


if __name__ == "__main__":
    main()
