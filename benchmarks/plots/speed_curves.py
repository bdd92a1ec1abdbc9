"""How does decode speed go with context, threads and model size?   tokens/s, medians, three PNGs.

Counts:      passes of one random token each, up to its logits, all weights in RAM.
Ceiling:     what as many threads read from RAM right before and after, over the bytes that a token
             moves: weights, and keys and values of its context.
Leaves out:  loading, prefill, one warm-up sample of each point.

A point waits for a quiet machine and is measured again if others took more than
--max-others-cores.

    python -m benchmarks.plots.speed_curves --work FOLDER --out FOLDER [--shape mixtral-s]
        [--bits 2 4 6] [--contexts 1 1024 4096 32768] [--threads 1 2] [--layers 4 8 16]
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

import lowmoe
from benchmarks.peers.lowmoe_folder import synthetic_folder
from benchmarks.peers.lowmoe_timing import (
    N_STATISTICS,
    LowmoeSequence,
    bytes_per_token,
    fill_ram,
)
from benchmarks.peers.machine_state import MachineProbe
from benchmarks.peers.observation import Observation, observe
from benchmarks.peers.shapes import SHAPES
from lowmoe.api import Model
from lowmoe.engine.machine import machine_line, physical_cores

MOST_BITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """x: tokens, threads or GB (1e9); ceiling: tokens/s; rates, in tokens/s: observed.result."""

    bits: int
    x: float
    ceiling: float
    observed: Observation[list[float]]

    @property
    def rates(self) -> list[float]:
        """tokens/s, one a sample."""
        return self.observed.result


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all points share.  tokens: of a sample."""

    work: Path
    shape_name: str
    bits: Sequence[int]
    tokens: int
    samples: int
    threads: int
    max_others_cores: float

    @contextmanager
    def model(
        self, bits: int, *, n_layers: int | None = None, threads: int, context: int
    ) -> Iterator[Model]:
        """A model of the shape with every expert in RAM."""
        shape, name = SHAPES[self.shape_name], self.shape_name
        if n_layers is not None:
            shape, name = replace(shape, n_layers=n_layers), f"{name}-{n_layers}layers"
        folder = synthetic_folder(self.work, name, shape, MOST_BITS)
        capacity = context + self.tokens + N_STATISTICS + 1
        with lowmoe.load(folder, gpu="none", bits=bits, threads=threads, context=capacity) as model:
            if not fill_ram(model.runtime):
                raise SystemExit(
                    f"{folder.name} at {bits} bits does not fit into RAM. Give fewer --layers."
                )
            yield model

    def point(self, model: Model, x: float, n_bytes: float, *, threads: int, context: int) -> Point:
        """Decode after `context` random tokens.  n_bytes: of weights that a token reads."""
        n_bytes += model.runtime.decoder.computation.cache_bytes(context)
        observed = observe(
            lambda: decode_rates(model, context, tokens=self.tokens, samples=self.samples),
            MachineProbe(self.work, threads),
            max_others_cores=self.max_others_cores,
        )
        ceiling, bits = observed.ceiling_bytes_s / n_bytes, model.runtime.bits
        print(
            f"  {bits} bits at {x:.3g}: {statistics.median(observed.result):.2f} tokens/s of "
            f"{ceiling:.2f}; link {observed.link}, others {observed.others_cores:.2f} cores"
            f"{', disturbed' if observed.disturbed else ''}",
            flush=True,
        )
        return Point(bits=bits, x=x, ceiling=ceiling, observed=observed)


def decode_rates(model: Model, context: int, *, tokens: int, samples: int) -> list[float]:
    """tokens/s of decoding random tokens after `context` others, one warm-up left out."""
    generator = random.Random(0)
    n_vocab = model.runtime.spec.n_vocab
    past = [generator.randrange(n_vocab) for _ in range(context)]
    sequence = LowmoeSequence(model)
    rates = []
    for _ in range(samples + 1):
        sequence.continue_after(past)
        new = [generator.randrange(n_vocab) for _ in range(tokens)]
        begin = time.perf_counter()
        for token_id in new:
            sequence.forward([token_id])
        rates.append(tokens / (time.perf_counter() - begin))
    return rates[1:]


def by_context(setting: Setting, contexts: Sequence[int]) -> list[Point]:
    """The same model after more and more tokens."""
    points, threads = [], setting.threads
    for bits in setting.bits:
        with setting.model(bits, threads=threads, context=max(contexts)) as model:
            n_bytes = bytes_per_token(model)  # before: it empties the cache
            for context in sorted(contexts):  # so that each goes on where the last one ended
                point = setting.point(model, context, n_bytes, threads=threads, context=context)
                points.append(point)
    return points


def by_threads(setting: Setting, threads: Sequence[int]) -> list[Point]:
    """The same model with more and more threads."""
    points = []
    for bits in setting.bits:
        for count in threads:
            with setting.model(bits, threads=count, context=1) as model:
                n_bytes = bytes_per_token(model)
                points.append(setting.point(model, count, n_bytes, threads=count, context=1))
    return points


def by_size(setting: Setting, layers: Sequence[int]) -> list[Point]:
    """The same layers more and more often; x: GB of all weights."""
    points, threads = [], setting.threads
    for bits in setting.bits:
        for n_layers in layers:
            with setting.model(bits, n_layers=n_layers, threads=threads, context=1) as model:
                runtime, n_bytes = model.runtime, bytes_per_token(model)
                experts = runtime.store.expert_bytes * runtime.spec.n_experts_total
                size = (runtime.dense_bytes + experts) / 1e9
                points.append(setting.point(model, size, n_bytes, threads=threads, context=1))
    return points


def draw(path: Path, title: str, x_label: str, points: Sequence[Point], *, log_x: bool) -> None:
    """One PNG: medians with their spread, the ceiling dashed in the same colour."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, bits in enumerate(sorted({point.bits for point in points})):
        own = sorted((p for p in points if p.bits == bits), key=lambda p: p.x)
        colour, xs = f"C{number}", [p.x for p in own]
        middle = [statistics.median(p.rates) for p in own]
        low = [m - min(p.rates) for m, p in zip(middle, own, strict=True)]
        high = [max(p.rates) - m for m, p in zip(middle, own, strict=True)]
        axes.errorbar(
            xs, middle, [low, high], color=colour, marker="o", capsize=3, label=f"{bits} bits"
        )
        ceilings = [p.ceiling for p in own]
        axes.plot(xs, ceilings, "--", color=colour, label=f"what RAM allows, {bits} bits")
    if log_x:
        axes.set_xscale("log", base=2)
    ticks = sorted({point.x for point in points})
    if all(x == int(x) for x in ticks):
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set(title=title, xlabel=x_label, ylabel="tokens/s of decode")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Write the PNGs and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNGs")
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-s")
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 4, 6), default=[2, 4, 6])
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[1, 1024, 2048, 4096, 8192, 16384, 32768]
    )
    all_threads = list(range(1, physical_cores() + 1))
    parser.add_argument("--threads", type=int, nargs="*", default=all_threads)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="of each sample")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--max-others-cores", type=float, default=0.2)
    arguments = parser.parse_args()
    for folder in (arguments.work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        work=arguments.work,
        shape_name=arguments.shape,
        bits=arguments.bits,
        tokens=arguments.tokens,
        samples=arguments.samples,
        threads=physical_cores(),
        max_others_cores=arguments.max_others_cores,
    )
    print(machine_line())
    curves: list[tuple[str, str, bool, Callable[[], list[Point]], Sequence[int]]] = [
        ("context", "tokens before", True, lambda: by_context(setting, arguments.contexts),
         arguments.contexts),
        ("threads", "threads", False, lambda: by_threads(setting, arguments.threads),
         arguments.threads),
        ("size", "GB of weights", False, lambda: by_size(setting, arguments.layers),
         arguments.layers),
    ]  # fmt: skip
    result = {}
    for name, x_label, log_x, measure, wanted in curves:
        if not wanted:
            continue
        print(f"{arguments.shape} by {name}")
        points = measure()
        title = f"{arguments.shape}, {machine_line().split(',')[0]}, {physical_cores()} cores"
        draw(arguments.out / f"speed_by_{name}.png", title, x_label, points, log_x=log_x)
        result[name] = [asdict(point) for point in points]
    print(json.dumps({"machine": machine_line(), "shape": arguments.shape, **result}))


if __name__ == "__main__":
    main()
