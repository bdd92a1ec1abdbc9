"""Seconds of work on a card.

Knows:        CUDA graphs and events.
Ignorant of:  what is timed.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

REPEATS = 15
WARM_UPS = 3
LEAST_SECONDS = 2e-3  # of one measurement: an event's clock has steps of half a microsecond


def captured(works: Sequence[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    """A graph that does some works one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for work in works:
            work()
    return graph


def seconds(run: Callable[[], None]) -> list[float]:
    """Of one run, REPEATS samples of as many runs as take LEAST_SECONDS."""
    for _ in range(WARM_UPS):
        run()
    n_runs = max(1, round(LEAST_SECONDS / _timed(run, 1)))
    return [_timed(run, n_runs) / n_runs for _ in range(REPEATS)]


def seconds_of_each(works: Sequence[Callable[[], None]]) -> list[float]:
    """Of one of some works that differ in their operands only, from replays of all of them.

    So many operands that no cache holds them are the caller's to choose.
    """
    graph = captured(works)
    return [sample / len(works) for sample in seconds(graph.replay)]


def median(samples: Sequence[float]) -> float:
    """The figure that is reported; all samples are in the JSON."""
    return statistics.median(samples)


def _timed(run: Callable[[], None], n_runs: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n_runs):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
