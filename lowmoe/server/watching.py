"""What the machine does, for who watches: where experts are, which are used, how fast it goes.

The model's thread writes down where things stand, at most every EVERY_S and only while somebody
watches or when no answer is under way any more; each watcher is told what has changed since it was
told last, so that a slow one is told less often and holds nothing up.

Knows:        the store's places and uses, the totals of steps, who watches.
Ignorant of:  HTTP, how anything is shown.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowmoe.api import Model
from lowmoe.engine.statistics import Bandwidths, Moved, PerTier, RunStatistics, hit_rate
from lowmoe.experts.lender import Lender
from lowmoe.server.asking import ModelCard
from lowmoe.server.numbers import Numbers

EVERY_S = 0.1
# Where experts are changes slowly, and looking at 15,000 of them takes 4 ms.
PLACES_EVERY_S = 1.0
# What is said of speed is said of so long: less would jump, more would lag.
WINDOW_S = 2.0
TIERS = ("gpu", "ram", "disk")  # by their numbers in frames

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What stays as it is.

    layers: experts of each, maybe 0; n_active: chosen of a layer for a token; tiers: those that
    experts may be in; counts_uses: whether it is known which experts are used; thinks: whether it
    may think before it answers.
    """

    model: str
    layers: tuple[int, ...]
    n_active: int
    tiers: tuple[str, ...]
    counts_uses: bool
    thinks: bool
    expert_bytes: int
    bits: int
    isa: str
    n_context: int
    n_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of the last WINDOW_S of decoding, with nothing under way of the answer that ended last; and
    what there is now.

    predicted_tokens_per_s, bound_tokens_per_s: None where they are not known; n_context: tokens of
    the longest conversation under way, or of the last; n_answers: under way, n_reading of them with
    a prompt that is not read yet; n_waiting: requests.
    """

    tokens_per_s: float | None = None
    predicted_tokens_per_s: float | None = None
    bound_tokens_per_s: float | None = None
    hit_rate: PerTier = field(default_factory=PerTier)
    bytes_per_token: PerTier = field(default_factory=PerTier)
    n_context: int = 0
    n_answers: int = 0
    n_reading: int = 0
    n_waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """What has changed.  Experts are numbered layer by layer.

    whole: of the first, which says of every expert where it is and how often it was used so far;
    later ones say which moved, to which of TIERS, and which were used how often more.
    """

    whole: bool
    moved_at: Integers
    moved_to: Integers
    used_at: Integers
    used_times: Integers
    rates: Rates


class Watch(Protocol):
    """Who can tell."""

    @property
    def about(self) -> About:
        """What stays as it is."""

    def frames(self) -> AsyncGenerator[Frame, None]:
        """The whole at first, then what changes; until the server ends."""


class Worked(Protocol):
    """What works on answers, as far as it is watched."""

    @property
    def model(self) -> ModelCard:
        """The one that is served."""

    def numbers(self) -> Numbers:
        """Now."""

    def on_step(self, callback: Callable[[], None]) -> None:
        """Call it after every step, on the model's thread."""


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Where things stand.  places: of each expert, in TIERS; uses: of each, since the beginning."""

    places: Integers
    uses: Integers
    rates: Rates


def difference(before: State | None, now: State) -> Frame:
    """What to tell who knows of `before`."""
    if before is None:
        everywhere = np.arange(now.places.size)
        return Frame(
            whole=True,
            moved_at=everywhere,
            moved_to=now.places,
            used_at=everywhere,
            used_times=now.uses,
            rates=now.rates,
        )
    moved = np.flatnonzero(now.places != before.places)
    more = now.uses - before.uses
    used = np.flatnonzero(more)
    return Frame(
        whole=False,
        moved_at=moved,
        moved_to=now.places[moved],
        used_at=used,
        used_times=more[used],
        rates=now.rates,
    )


class Watching:
    """Watches a model at work.  Made before the first answer; a Watch."""

    def __init__(self, model: Model, worker: Worked) -> None:
        session = model.session
        assert session is not None
        self._runtime, self._batch, self._worker = model.runtime, session.batch, worker
        self._store = self._runtime.store
        self.about = about(model, worker.model)
        self._places = _Places(self._store, self.about.layers)
        self._speed = _Speed(self._runtime.dense_bytes_per_token, self._store, session.bandwidths())
        self._wakes: list[Callable[[], None]] = []
        self._due, self._closed = 0.0, False
        self._state = State(self._places.now(), self._uses(), Rates())
        worker.on_step(self._stepped)

    # --- on the event loop

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """See Watch."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(news.set)

        self._wakes.append(wake)
        before: State | None = None
        try:
            while True:
                is_last, now = self._closed, self._state
                if now is not before:
                    yield difference(before, now)
                    before = now
                if is_last:
                    return
                await news.wait()
                news.clear()
        finally:
            self._wakes.remove(wake)

    def close(self) -> None:
        """Nobody is told any more."""
        self._closed = True
        self._wake_all()

    # --- on the model's thread

    def _stepped(self) -> None:
        """Write down where things stand; what is left at the end is always written down."""
        now, is_over = time.monotonic(), not self._batch.answers
        if not is_over and (now < self._due or not self._wakes):
            return
        self._due = now + EVERY_S
        self._state = State(self._places.now(anew=is_over), self._uses(), self._rates())
        self._wake_all()

    def _wake_all(self) -> None:
        for wake in list(self._wakes):
            wake()

    def _uses(self) -> Integers:
        uses = self._store.uses
        if uses is None:
            return np.zeros(sum(self.about.layers), np.int64)
        counts: Integers = np.array(uses.counts, np.int64)
        return counts

    def _rates(self) -> Rates:
        numbers = self._worker.numbers()
        if numbers.n_under_way:
            longest = max((len(answer.context) for answer in self._batch.answers), default=0)
            rates = replace(self._speed.of_steps(numbers, self._state.rates), n_context=longest)
        else:
            self._speed.rest()
            rates = self._state.rates if numbers.latest is None else _of_answer(numbers.latest)
        return replace(
            rates,
            n_answers=numbers.n_under_way,
            n_reading=numbers.n_reading,
            n_waiting=numbers.n_waiting,
        )


def about(model: Model, card: ModelCard) -> About:
    """What is told of a model."""
    runtime = model.runtime
    store, spec = runtime.store, runtime.spec
    tiers: tuple[str, ...] = TIERS
    if store.tier == "ram":
        tiers = ("ram", "disk")
    elif store.is_complete:
        tiers = ("gpu",)
    return About(
        model=card.name,
        layers=tuple(spec.n_experts_by_layer),
        n_active=spec.uniform_experts().router.n_active,
        tiers=tiers,
        counts_uses=store.uses is not None,
        thinks=card.thinks,
        expert_bytes=store.expert_bytes,
        bits=runtime.bits,
        isa=runtime.isa,
        n_context=runtime.n_context,
        n_sequences=runtime.n_sequences,
    )


class _Places:
    """The tier of each expert, looked up now and then."""

    def __init__(self, store: Lender, layers: tuple[int, ...]) -> None:
        self._store = store
        self._first = [sum(layers[:i]) for i in range(len(layers))]
        self._n_experts = sum(layers)
        self._due, self._is_final = 0.0, False
        self._latest = self._look()

    def now(self, *, anew: bool = False) -> Integers:
        """In order of experts, numbers in TIERS.  anew: not those of a moment ago."""
        now = time.monotonic()
        if not self._is_final and (anew or now >= self._due):
            self._due, self._is_final = now + PLACES_EVERY_S, self._store.is_complete
            self._latest = self._look()
        return self._latest

    def _look(self) -> Integers:
        places = np.full(self._n_experts, TIERS.index("disk"), np.uint8)
        for tier, keys in self._store.in_memory().items():
            places[[self._first[layer] + expert for layer, expert in keys]] = TIERS.index(tier)
        return places


class _Speed:
    """Tokens/s and what they moved, of the last WINDOW_S of work without a pause."""

    def __init__(self, dense_bytes: int, store: Lender, bandwidths: Bandwidths) -> None:
        """dense_bytes: that a token reads beside experts."""
        self._dense = PerTier(**{store.tier: dense_bytes})
        self._bandwidths = bandwidths
        self._marks: deque[tuple[float, Numbers]] = deque()

    def rest(self) -> None:
        """Nothing is under way."""
        self._marks.clear()

    def of_steps(self, numbers: Numbers, before: Rates) -> Rates:
        """Those of now; those of before where no token has been made since."""
        now = time.monotonic()
        self._marks.append((now, numbers))
        while now - self._marks[0][0] > WINDOW_S:
            self._marks.popleft()
        began, then = self._marks[0]
        n_steps, n_tokens = numbers.steps - then.steps, numbers.new_tokens - then.new_tokens
        if not n_steps:
            return before
        traffic = numbers.of_steps - then.of_steps
        moved = Moved(traffic=traffic, n_tokens=n_steps, dense=self._dense)
        disk = traffic.disk_bytes / traffic.disk_busy_s if traffic.disk_busy_s else None
        bus = traffic.copied_bytes / traffic.copied_s if traffic.copied_s else None
        bound = moved.bound_tokens_per_s(replace(self._bandwidths, disk=disk, bus=bus))
        alone = numbers.n_under_way == 1
        return Rates(
            tokens_per_s=n_tokens / (now - began),
            predicted_tokens_per_s=numbers.predicted_tokens_per_s if alone else None,
            # A step makes a token of each answer.
            bound_tokens_per_s=None if bound is None else bound * n_tokens / n_steps,
            hit_rate=hit_rate(traffic),
            bytes_per_token=moved.per_token.divided(n_tokens / n_steps),
        )


def _of_answer(answer: RunStatistics) -> Rates:
    return Rates(
        tokens_per_s=answer.decode_tokens_per_s,
        predicted_tokens_per_s=answer.predicted_tokens_per_s,
        bound_tokens_per_s=answer.bound_tokens_per_s,
        hit_rate=answer.hit_rate,
        bytes_per_token=answer.bytes_per_token,
        n_context=answer.prompt_tokens + answer.new_tokens,
    )
