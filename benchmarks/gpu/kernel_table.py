"""How near do the GPU kernels come to what the card allows?   % of copy bandwidth, % of fp16 FLOPS.

Counts:      decode: gate, up, activation, rounding, down and weighted sum of the experts that one
             token, or a few, goes to, two launches in a CUDA graph; bytes are those of the planes
             that are read, each once. Prefill: the same for a prompt's tokens, all experts of the
             layer; operations are those of the weights. Operands change from one round to the next,
             so that no cache holds them.
Leaves out:  attention, norm and routing; the first runs.

Ceilings (a copy within the card, a large float16 product) and peers (torch in float16, bitsandbytes
nf4) are measured in the same run.

    python -m benchmarks.gpu.kernel_table OUT.json [--shapes mixtral-8x7b ...] [--quick]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.ceilings import copy_bandwidth, half_precision_flops
from benchmarks.gpu.operands import (
    CODE,
    Layer,
    code_table,
    random_layer,
    random_plane,
    random_routing,
    rounded,
)
from benchmarks.gpu.shapes import SHAPES, ExpertShape
from benchmarks.gpu.timing import captured, median, seconds, seconds_of_each
from cuda_ext.card import Card, describe, find_card, look
from cuda_ext.launches.products import workspace_bytes
from lowmoe.kernels.cuda import kernels_home, open_card
from lowmoe.settings import read_settings
from quant.layout import PlaneLayout

PLANES = (1, 2, 3)
SWIGLU = (None, 1.0, 0.0, float("inf"))  # no biases
DECODED = (1, 2, 4, 8)  # tokens
PROMPTS = (128, 512, 2048)  # tokens
CACHES = 6  # times the L2 cache that a round's operands take, so that it holds none of them
N_ROUNDS = 12
LINEAR = ((4096, 4096), (6144, 4096), (32000, 4096))  # rows, columns: dense projections, a head


class Bench:
    """One card and what all measurements share."""

    def __init__(self, card: Card) -> None:
        self.card, self.place = card, torch.device("cuda", card.index)
        self.table = code_table(self.place)

    def workspace(self, n_tokens: int, shape: ExpertShape) -> Tensor:
        n_bytes = workspace_bytes(
            self.card.n_multiprocessors, n_tokens, shape.n_hidden, shape.n_inner, shape.n_active
        )
        return torch.zeros(n_bytes, dtype=torch.uint8, device=self.place)

    def experts(self, layer: Layer, n_tokens: int, n_rounds: int) -> list[Callable[[], None]]:
        """Rounds of a layer of experts, each with a routing of its own."""
        shape, place = layer.shape, self.place
        n_experts, n_places = layer.table.shape[0], n_tokens * shape.n_active
        codes, scales = rounded(n_tokens, shape.n_hidden, place)
        inner_codes, inner_scales = rounded(n_places, shape.n_inner, place)
        x = torch.zeros(n_tokens, shape.n_hidden, device=place)
        workspace, ops = self.workspace(n_tokens, shape), torch.ops.lowmoe
        code = (self.table, CODE.scale_unit)

        def round_of(seed: int) -> Callable[[], None]:
            torch.manual_seed(seed)
            to = random_routing(n_tokens, n_experts, shape.n_active, place)
            groups = (to.first, to.order, to.active)

            def work() -> None:
                ops.experts_inner(
                    codes, scales, layer.table, layer.n_planes, *code, *groups, layer.d_inner,
                    *SWIGLU, shape.n_hidden, shape.n_active, inner_codes, inner_scales, workspace,
                )  # fmt: skip
                ops.experts_down(
                    inner_codes, inner_scales, layer.table, layer.n_planes, *code, *groups,
                    None, to.weights, shape.n_inner, x, workspace,
                )  # fmt: skip

            work.active = to.active  # type: ignore[attr-defined]
            return work

        return [round_of(seed) for seed in range(n_rounds)]

    def decode(self, name: str, shape: ExpertShape, n_planes: int) -> Iterator[dict[str, Any]]:
        layer = random_layer(
            shape, n_planes, self._experts_beyond_caches(shape, n_planes), self.place
        )
        for n_tokens in DECODED:
            works = self.experts(layer, n_tokens, N_ROUNDS)
            n_read = sum(int(w.active[0]) for w in works) / len(works)  # type: ignore[attr-defined]
            samples = seconds_of_each(works)
            yield {
                "kernel": "experts, decode", "shape": name, "planes": n_planes,
                "tokens": n_tokens, "seconds": samples, "bytes": n_read * layer.expert_bytes,
            }  # fmt: skip

    def prefill(self, name: str, shape: ExpertShape, n_planes: int) -> Iterator[dict[str, Any]]:
        layer = random_layer(shape, n_planes, shape.n_experts, self.place)
        for n_tokens in PROMPTS:
            samples = seconds_of_each(self.experts(layer, n_tokens, 2))
            n_products = n_tokens * shape.n_active * shape.weights_of_an_expert
            yield {
                "kernel": "experts, prefill", "shape": name, "planes": n_planes,
                "tokens": n_tokens, "seconds": samples, "flops": 2 * n_products,
            }  # fmt: skip

    def linear(self, n_out: int, n_in: int, n_planes: int) -> Iterator[dict[str, Any]]:
        layout = PlaneLayout(n_out, n_in)
        n_copies = max(2, -(-CACHES * self.card.l2_bytes // (n_planes * layout.plane_bytes)))
        shape = ExpertShape(n_hidden=n_in, n_inner=n_out, n_experts=1, n_active=1)
        matrices = [
            [random_plane(layout, p, self.place) for p in range(n_planes)] for _ in range(n_copies)
        ]
        for n_tokens in (1, *PROMPTS):
            operands = (
                *rounded(n_tokens, n_in, self.place),
                torch.zeros(n_tokens, n_out, device=self.place),
                self.workspace(n_tokens, shape),
            )
            used = matrices if n_tokens == 1 else matrices[:2]
            works = [partial(self._multiply, n_out, n_in, planes, *operands) for planes in used]
            row = {
                "kernel": "linear", "shape": f"{n_out} x {n_in}", "planes": n_planes,
                "tokens": n_tokens, "seconds": seconds_of_each(works),
            }  # fmt: skip
            if n_tokens == 1:
                yield row | {"bytes": n_planes * layout.plane_bytes}
            else:
                yield row | {"flops": 2 * n_tokens * n_out * n_in}

    def _multiply(
        self,
        n_out: int,
        n_in: int,
        planes: list[Tensor],
        codes: Tensor,
        scales: Tensor,
        y: Tensor,
        workspace: Tensor,
    ) -> None:
        code = (self.table, CODE.scale_unit)
        torch.ops.lowmoe.linear(
            codes, scales, planes, *code, n_out, n_in, None, False, y, workspace
        )

    def peers(self, name: str, shape: ExpertShape) -> Iterator[dict[str, Any]]:
        """One token's experts: as many as a token goes to, operands beyond the caches."""
        x = torch.randn(1, shape.n_hidden, device=self.place).half()
        for kernel, make, bits in (
            ("torch float16", peers.half_precision, 16.0),
            ("bitsandbytes nf4", peers.nf4, 4.5),
        ):
            n_bytes = shape.weights_of_an_expert * bits / 8
            n_made = max(shape.n_active, int(CACHES * self.card.l2_bytes / n_bytes) + 1)
            works = [make(shape, x) for _ in range(n_made)]
            samples = [s * shape.n_active for s in seconds_of_each(works)]
            yield {
                "kernel": kernel, "shape": name, "tokens": 1, "seconds": samples,
                "bytes": shape.n_active * n_bytes,
            }  # fmt: skip

    def launches(self) -> dict[str, float]:
        """Seconds of one small launch: one by one from Python, and in a CUDA graph."""
        x = torch.randn(1, 4096, device=self.place)
        d = torch.ones(4096, dtype=torch.float16, device=self.place)
        codes, scales = rounded(1, 4096, self.place)

        def work() -> None:
            torch.ops.lowmoe.round_tokens(x, d, codes, scales)

        n = 200
        graph = captured([work] * n)
        return {
            "eager": median(seconds(lambda: [work() for _ in range(n)])) / n,  # type: ignore[arg-type, return-value]
            "graph": median(seconds(graph.replay)) / n,
        }

    def _experts_beyond_caches(self, shape: ExpertShape, n_planes: int) -> int:
        expert_bytes = shape.weights_of_an_expert * n_planes * 2.07 / 8
        wanted = int(CACHES * self.card.l2_bytes / expert_bytes) + 1
        return max(shape.n_active * 2, wanted)


def measure(bench: Bench, names: list[str], *, quick: bool) -> Iterator[dict[str, Any]]:
    """Every row of the table."""
    planes = (2,) if quick else PLANES
    for name in names:
        shape = SHAPES[name]
        yield from bench.peers(name, shape)
        for n_planes in planes:
            yield from bench.decode(name, shape, n_planes)
            if n_planes < 3:
                yield from bench.prefill(name, shape, n_planes)
            torch.cuda.empty_cache()
    for n_out, n_in in LINEAR:
        for n_planes in planes:
            yield from bench.linear(n_out, n_in, n_planes)


def shown(row: dict[str, Any], bandwidth: float, flops: float) -> str:
    """One line of a row."""
    time = median(row["seconds"])
    if "flops" in row:
        rate = f"{row['flops'] / time / 1e12:7.1f} TFLOPS {row['flops'] / time / flops:6.1%}"
    else:
        rate = f"{row['bytes'] / time / 1e9:7.0f} GB/s   {row['bytes'] / time / bandwidth:6.1%}"
    planes = f"{row['planes']} planes" if "planes" in row else ""
    return (
        f"{row['kernel']:18} {row['shape']:16} {planes:9} {row['tokens']:5} tokens "
        f"{time * 1e6:9.1f} us {rate}"
    )


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="2 planes only")
    arguments = parser.parse_args()
    card = find_card("auto", look())
    if card is None:
        raise SystemExit("no NVIDIA card that can be used; lowmoe doctor says why")
    open_card(card, kernels=kernels_home(read_settings()), limit_bytes=None, announce=print)
    bench = Bench(card)
    bandwidth, flops = copy_bandwidth(), half_precision_flops()
    print(describe(card))
    print(f"copy {bandwidth / 1e9:.0f} GB/s, float16 {flops / 1e12:.0f} TFLOPS, measured here")
    rows = []
    for row in measure(bench, arguments.shapes, quick=arguments.quick):
        rows.append(row)
        print(shown(row, bandwidth, flops), flush=True)
    found = {
        "card": card.name, "sm": card.sm, "torch": torch.__version__, "copy_bytes_s": bandwidth,
        "half_precision_flops": flops, "launch_seconds": bench.launches(), "rows": rows,
    }  # fmt: skip
    print({name: f"{1e6 * s:.2f} us" for name, s in found["launch_seconds"].items()})
    arguments.out.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
