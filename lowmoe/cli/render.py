"""How things look: progress, statistics, sizes.

Knows:        terminals, rich.
Ignorant of:  what is going on behind the numbers.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lowmoe.engine.statistics import PerTier, RunStatistics

PLAIN_EVERY_S = 5.0

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def size(n_bytes: float) -> str:
    """1.5 GB, 320 MB: powers of 1000, as disks and bandwidths are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}" if unit != "B" else f"{n_bytes:.0f} B"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def billions(n_parameters: int) -> str:
    """1030B, 46.7B, 0.124B: as models are called."""
    count = n_parameters / 1e9
    return f"{count:.0f}B" if count >= 1000 else f"{count:.3g}B"


def amount(count: float, unit: str) -> str:
    """Bytes as sizes; anything else in millions or as it is, the unit left to the reader."""
    if unit == "B":
        return size(count)
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:.0f}"


class TerminalReporter:
    """A bar for each stage on a terminal, a plain line every few seconds elsewhere; on stderr."""

    def __init__(self) -> None:
        self._bars = err.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said_at = 0.0

    def __enter__(self) -> "TerminalReporter":
        if self._bars:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars:  # where there are none, rich's stop would print an empty line
            self._progress.stop()

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        """So many units of a stage are done."""
        now = time.monotonic()
        since, at = self._began.setdefault(stage, (now, done))
        rate = (done - at) / (now - since) if now > since else 0.0
        # The unit once only: in 80 columns there must be room for the time left.
        what = "" if unit == "B" else f" {unit}"
        text = f"{amount(done, unit)} of {amount(total, unit)}{what}"
        if rate:  # at the first call nobody knows it
            text += f", {size(rate) if unit == 'B' else f'{rate:.3g}'}/s"
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total, amount=text)
            self._progress.update(self._tasks[stage], completed=done, total=total, amount=text)
        elif now - self._said_at >= PLAIN_EVERY_S or done >= total:
            self._said_at = now
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            err.print(f"{stage}: {text}{left}", soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """One line worth knowing."""
        self._progress.console.print(text, style="dim", soft_wrap=True, markup=False)


def print_json(values: Mapping[str, Any]) -> None:
    """One object on one line: always the last of stdout."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def statistics_line(s: RunStatistics) -> str:
    """Predicted, achieved and bound side by side, in one line."""
    parts = [
        f"{s.prompt_tokens} + {s.new_tokens} tokens",
        f"first after {s.ttft_s:.2f} s",
        f"prefill {_rate(s.prefill_tokens_per_s)}",
        f"decode {_rate(s.decode_tokens_per_s)} tokens/s",
        f"bound {_rate(s.bound_tokens_per_s)}",
        f"{s.bits} bits",
        _tiers(s.placement, s.placement.gpu, lambda tier, n: f"{tier} {size(n)}"),
        "hits " + _tiers(s.hit_rate, s.placement.gpu, lambda tier, share: f"{tier} {share:.0%}"),
        "a token reads "
        + _tiers(s.bytes_per_token, s.placement.gpu, lambda tier, n: f"{size(n)} {tier}"),
    ]
    parts += s.trades
    if s.coarse_rate:
        parts.append(f"{s.coarse_rate:.0%} of experts at fewer planes")
    if s.to_gpu_bytes:
        parts.append(f"to the GPU {size(s.to_gpu_bytes)}, {s.promoted} promoted")
    if s.predicted_tokens_per_s is not None:
        parts.insert(4, f"predicted {_rate(s.predicted_tokens_per_s)}")
    return " · ".join(parts)


def _tiers(values: PerTier, on_gpu: float, show: Callable[[str, float], str]) -> str:
    """on_gpu: bytes there; without any, nobody wants to know about it."""
    shown = [show("GPU", values.gpu)] if on_gpu else []
    return ", ".join([*shown, show("RAM", values.ram), show("disk", values.disk)])


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def print_statistics(s: RunStatistics) -> None:
    """The dim line that ends a run."""
    err.print(statistics_line(s), style="dim", soft_wrap=True, markup=False)
