"""A stand-in for the threads that read: reads end when, and in the order that, a test says.

With it an order of events is the same at every run, and a deadlock is seen instead of waited for.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from random import Random


class DrivenReaders:
    """Takes the place of ThreadPoolExecutor.  luck: which of the reads under way ends next."""

    def __init__(self, n_readers: int, thread_name_prefix: str = "") -> None:
        self.luck = Random(0)
        self._n_readers = n_readers
        self._queue: list[tuple[DrivenFuture, Callable[[], None]]] = []

    def submit(self, work: Callable[..., None], *arguments: object) -> "DrivenFuture":
        """Queue a read; as many as there are readers are under way."""
        future = DrivenFuture(self)
        self._queue.append((future, lambda: work(*arguments)))
        self._begin()
        return future

    def _begin(self) -> None:
        """As a reader does: what was cancelled goes, what begins can be cancelled no more."""
        self._queue = [(future, work) for future, work in self._queue if not future.cancelled()]
        for future, _ in self._queue[: self._n_readers]:
            if not future.running():
                future.set_running_or_notify_cancel()

    def finish_one(self) -> bool:
        """Let one of the reads under way end; False if there is none."""
        self._begin()
        if not self._queue:
            return False
        self.finish(self.luck.randrange(min(len(self._queue), self._n_readers)))
        return True

    def finish(self, chosen: int) -> None:
        """Let one of the reads under way end, 0 being the one that began first."""
        future, work = self._queue.pop(chosen)
        try:
            work()
        except OSError as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        self._begin()

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Let all reads end."""
        while self.finish_one():
            pass


class DrivenFuture(Future[None]):
    """A future for which nobody waits in vain."""

    def __init__(self, readers: DrivenReaders) -> None:
        super().__init__()
        self.readers = readers

    def result(self, timeout: float | None = None) -> None:
        while not self.done():
            assert self.readers.finish_one(), "deadlock: waiting for a read that nobody does"
        super().result()


def wait_for_one(futures: Collection[DrivenFuture], return_when: str) -> None:
    """Takes the place of concurrent.futures.wait."""
    assert return_when == "FIRST_COMPLETED"
    while not any(future.done() for future in futures):
        reader = next(iter(futures)).readers
        assert reader.finish_one(), "deadlock: waiting for reads that nobody does"
