"""When everything of a run began and ended, for chrome://tracing or ui.perfetto.dev to draw.

Source of the format: Trace Event Format, Google, complete events ("X") and metadata ("M").

Knows:        rows of spans, their JSON.
Ignorant of:  what is measured; files.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

PASSES, LAYERS, CPU_EXPERTS, GPU, COPIES = "passes", "layers", "CPU experts", "GPU", "copies"
WAITS, DISK = "waits", "disk reader"  # a row for each thread
ROWS = (PASSES, LAYERS, CPU_EXPERTS, GPU, COPIES, WAITS)  # from the top; below them, others
MOST_SPANS = 1_000_000  # some hundred bytes each; what comes later is counted and left out

T = TypeVar("T")


class Mark(Protocol):
    """A moment in the order of a GPU's work, or of its copies."""

    def time_s(self) -> float:
        """When it came, on time.perf_counter's clock; waits for it."""


class _At:
    """A moment on the host's clock."""

    def __init__(self, time_s: float) -> None:
        self._time_s = time_s

    def time_s(self) -> float:
        return self._time_s


class Timeline:
    """Any thread may add spans; those of one row lie beside or inside each other."""

    def __init__(self) -> None:
        self._begin_s = time.perf_counter()
        self._lock = threading.Lock()
        self._spans: list[tuple[str, str, Mark, Mark, dict[str, Any]]] = []
        self._threads: dict[tuple[str, int], str] = {}
        self.n_left_out = 0

    @staticmethod
    def now() -> Mark:
        """This moment, on the host."""
        return _At(time.perf_counter())

    @contextmanager
    def span(self, row: str, name: str, **facts: Any) -> Iterator[None]:
        """From here to the end of the block, however it ends."""
        begin = self.now()
        try:
            yield
        finally:
            self.add(row, name, begin, self.now(), **facts)

    def add(self, row: str, name: str, begin: Mark, end: Mark, **facts: Any) -> None:
        """One span.  facts: what else is shown of it."""
        if len(self._spans) < MOST_SPANS:
            self._spans.append((row, name, begin, end, facts))
        else:
            self.n_left_out += 1

    def in_turn(self, things: Iterable[T], /) -> Iterator[tuple[int, T]]:
        """enumerate(things), the time for each of them a layer's."""
        for layer_id, thing in enumerate(things):
            begin = self.now()
            yield layer_id, thing
            self.add(LAYERS, f"layer {layer_id}", begin, self.now(), layer=layer_id)

    def row_of_thread(self, kind: str) -> str:
        """Of several rows of a kind, that of the thread that asks."""
        key = kind, threading.get_ident()
        with self._lock:
            if key not in self._threads:
                number = 1 + sum(other == kind for other, _ in self._threads)
                self._threads[key] = kind if number == 1 else f"{kind} {number}"
            return self._threads[key]

    def to_json(self) -> bytes:
        """The whole trace; waits for a GPU where it has not come so far."""
        rows = list(dict.fromkeys([*ROWS, *self._threads.values()]))
        numbers = {row: number for number, row in enumerate(rows, start=1)}
        events = [_metadata(0, "process_name", name="lowmoe")]
        for row, number in numbers.items():
            events.append(_metadata(number, "thread_name", name=row))
            events.append(_metadata(number, "thread_sort_index", sort_index=number))
        events += sorted(
            (self._event(numbers[span[0]], *span[1:]) for span in self._spans),
            key=lambda event: (event["tid"], event["ts"], -event["dur"]),
        )
        trace = {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"spans left out": self.n_left_out},
        }
        return json.dumps(trace, separators=(",", ":")).encode() + b"\n"

    def _event(
        self, row: int, name: str, begin: Mark, end: Mark, facts: dict[str, Any]
    ) -> dict[str, Any]:
        # Whole nanoseconds, so that what lies inside something else still does in microseconds.
        first, last = (round((m.time_s() - self._begin_s) * 1e9) for m in (begin, end))
        return {
            **{"ph": "X", "pid": 1, "tid": row, "name": name},
            **{"ts": first / 1e3, "dur": max(0, last - first) / 1e3, "args": facts},
        }


def _metadata(row: int, kind: str, **facts: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": row, "ts": 0, "name": kind, "args": facts}
