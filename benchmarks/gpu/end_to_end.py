"""How fast are whole models that a card of 24 GB has in part?   tokens/s of prompts and answers.

    python -m benchmarks.gpu.end_to_end OUT.json [--gpu 4090] [--work FOLDER] [--only NAME ...]
                                        [--prompt 2048] [--new 128] [--peers]

Counts:      models of random weights of published shapes, whole, written to --work one after the
             other and deleted: prefill of a prompt, decode after it, beside the bound that the same
             run's bandwidths allow and what was planned, with what the card lacks computed on the
             CPU, sent to the card, or both as the run decides; and, where it fits, all on the card.
             --peers: transformers with accelerate's offload, in bfloat16 and in bitsandbytes' nf4,
             on the largest of these shapes, decode only, after one token that does not count.
Leaves out:  loading. Random weights route more evenly than text, so that a card's cache of experts
             looks worse than it is.

A larger card than --gpu is held to that card's memory. What a machine has no room for is said, and
the next is run.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lowmoe
from lowmoe.checkpoint.layout import Recipe
from lowmoe.engine.machine import machine_line
from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import LowMoeError
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.loader.synthetic import write_synthetic

MISSES = ("cpu", "page", "auto")
PEER_SHAPE, PEER_TOKENS = "mixtral-8x7b", 4
GPU_BYTES, CPU_BYTES = "22GiB", "110GiB"  # for accelerate, which leaves itself no margin


@dataclass(frozen=True, slots=True)
class Wanted:
    """A shape at so many planes."""

    shape: str
    planes: int


WANTED = (
    Wanted("qwen3-30b-a3b", 2),
    Wanted("mixtral-8x7b", 1),
    Wanted("mixtral-8x7b", 2),
    Wanted("mixtral-8x22b", 1),
    Wanted("mixtral-8x22b", 2),
)


@contextmanager
def written(config: Mapping[str, Any], planes: int, work: Path) -> Iterator[Path]:
    """A folder of random weights, gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        write_synthetic(
            folder,
            config,
            read_config(config),
            Recipe(expert_planes=planes),
            name="synthetic",
            progress=lambda done, total: None,
        )
        yield folder
    finally:
        shutil.rmtree(folder)


def run(folder: Path, planes: int, asked: argparse.Namespace, misses: str) -> dict[str, Any]:
    """One answer after one that does not count; its statistics."""
    generator = random.Random(0)
    context = asked.prompt + asked.new + 1
    with lowmoe.load(
        folder, gpu=asked.gpu, bits=2 * planes, misses=misses, context=context
    ) as model:
        session = model.session
        assert session is not None
        n_vocab = model.runtime.spec.n_vocab
        sampling = SamplingOptions(temperature=1.0, top_p=1.0, max_new_tokens=asked.new)
        for _ in range(2):
            ids = [generator.randrange(n_vocab) for _ in range(asked.prompt)]
            for _ in session.token_ids(ids, sampling, heed_ends=False):
                pass
        found: dict[str, Any] = model.statistics().to_json()
        return {**found, "isa": model.runtime.isa, "in_part": model.runtime.pool is not None}


def runs_of(
    name: str, config: Mapping[str, Any], planes: int, asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """A shape in every way, or once where the card has all of it."""
    results: list[dict[str, Any]] = []
    try:
        with written(config, planes, asked.work) as folder:
            for misses in MISSES:
                results.append({"misses": misses, **run(folder, planes, asked, misses)})
                show(name, planes, results[-1])
                if not results[-1]["in_part"]:
                    break
    except (LowMoeError, OSError) as e:
        results.append({"refused": " ".join(str(e).splitlines())})
        print(f"{name} at {2 * planes} bits: {results[-1]['refused']}", flush=True)
    return [{"shape": name, "bits": 2 * planes, **result} for result in results]


def show(name: str, planes: int, r: Mapping[str, Any]) -> None:
    bound = r["bound_tokens_per_s"]
    share = f"{r['decode_tokens_per_s'] / bound:4.0%} of the bound" if bound else ""
    print(
        f"{name:16}{2 * planes} bits {r['misses']:5} prefill {r['prefill_tokens_per_s']:8.0f}  "
        f"decode {r['decode_tokens_per_s']:7.2f}  {share}",
        flush=True,
    )


# --- transformers with accelerate


def offloaded(nf4: bool) -> torch.nn.Module:
    """A model of random weights, as much of it on the card as fits."""
    from accelerate import dispatch_model, infer_auto_device_map
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**ALIASES[PEER_SHAPE].config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if nf4:
        from transformers import BitsAndBytesConfig
        from transformers.integrations import replace_with_bnb_linear

        kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = replace_with_bnb_linear(model, quantization_config=kind)
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(-0.02, 0.02)
    places = infer_auto_device_map(
        model,
        max_memory={0: GPU_BYTES, "cpu": CPU_BYTES},
        no_split_module_classes=["MixtralDecoderLayer"],
    )
    placed: torch.nn.Module = dispatch_model(model, places)
    return placed


@torch.inference_mode()
def peer_rate(make: Callable[[], torch.nn.Module]) -> dict[str, Any]:
    """Decode of a peer, or why it does not run."""
    try:
        model, ids, cache = make(), torch.tensor([[1]], device="cuda"), None
        for token in range(PEER_TOKENS + 1):
            if token == 1:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            out = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        torch.cuda.synchronize()
        return {"decode_tokens_per_s": PEER_TOKENS / (time.perf_counter() - begin)}
    except Exception as e:  # whatever keeps somebody else's program from running is its result
        return {"refused": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpu", default="4090")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", nargs="*", help="aliases, or paths of config.json files")
    parser.add_argument("--planes", nargs="*", type=int)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--peers", action="store_true")
    asked = parser.parse_args()
    wanted = [(w.shape, ALIASES[w.shape].config, w.planes) for w in WANTED]
    if asked.only:
        wanted = [
            (
                name,
                ALIASES[name].config if name in ALIASES else json.loads(Path(name).read_text()),
                p,
            )
            for name in asked.only
            for p in asked.planes or (1, 2)
        ]
    results: list[dict[str, Any]] = []
    for name, config, planes in wanted:
        results += runs_of(name, config, planes, asked)
    peers = {}
    if asked.peers:
        peers = {
            kind: peer_rate(lambda nf4=kind == "nf4": offloaded(nf4)) for kind in ("bf16", "nf4")
        }
        print(json.dumps(peers), flush=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    values = {
        "machine": machine_line(),
        "card": card,
        "held_to": asked.gpu,
        "prompt": asked.prompt,
        "new": asked.new,
        "results": results,
        "peer_shape": PEER_SHAPE,
        "peers": peers,
    }
    asked.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
