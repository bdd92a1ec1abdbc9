"""`lowmoe serve`.

Knows:        addresses and keys from the command line, what is said of a server.
Ignorant of:  requests, how they are answered.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lowmoe.cli.render import err, out, size
from lowmoe.cli.run import load_model, traced
from lowmoe.engine.load_options import LoadOptions
from lowmoe.errors import UsageError
from lowmoe.library.configs import spec_of
from lowmoe.plan.caches import advised_caches
from lowmoe.server.app import ServerOptions
from lowmoe.server.hosts import Hosts, check_exposure
from lowmoe.server.serving import bound_socket, serve
from lowmoe.server.watching import Watching
from lowmoe.server.worker import Worker
from lowmoe.settings import read_settings

MOST_WAITING = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """api_key: None for the environment's; sequences: None for as many as are advised; n_waiting:
    requests; timeline: where to write one.
    """

    host: str
    port: int
    api_key: str | None
    allow_hosts: tuple[str, ...]
    sequences: int | None
    n_waiting: int
    timeline: Path | None = None


def serve_command(name: str, asked: Asked, load: LoadOptions) -> None:
    """Everything that can be refused is, before a model is loaded."""
    settings = read_settings()
    if not 0 <= asked.port <= 65535:
        raise UsageError(f"--port is {asked.port}, but must be 0 to 65535.")
    if not 0 <= asked.n_waiting <= MOST_WAITING:
        raise UsageError(f"--queue is {asked.n_waiting}, but must be 0 to {MOST_WAITING}.")
    options = ServerOptions(
        host=asked.host,
        port=asked.port,
        api_key=settings.api_key if asked.api_key is None else asked.api_key,
        allow_hosts=asked.allow_hosts,
    )
    check_exposure(Hosts(options.host, options.allow_hosts), options.api_key)
    with bound_socket(options.host, options.port) as bound:
        options = replace(options, port=bound.getsockname()[1])
        if asked.sequences is None:
            load = replace(load, sequences=_advised(name, load))
        with traced(load, asked.timeline) as traced_load, load_model(name, traced_load) as model:
            worker = Worker(model, name=_served_name(name), n_waiting=asked.n_waiting)
            watching = Watching(model, worker)
            with _log_on_stderr():
                serve(worker, watching, options, bound, announce=lambda: _announce(worker, options))


def _advised(name: str, load: LoadOptions) -> int:
    caches = advised_caches(spec_of(name, read_settings()), load)
    err.print(
        f"{caches.n} conversations at once, {size(caches.n * caches.cache_bytes)} for their caches "
        "(--sequences, --context)",
        style="dim",
        soft_wrap=True,
    )
    return caches.n


def _served_name(name: str) -> str:
    """As clients call the model: an alias and a repository as they are, a folder by its name."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _announce(worker: Worker, options: ServerOptions) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    key = "" if options.api_key is None else ", with the key"
    out.print(
        f"{worker.model.name} answers at http://{host}:{options.port}{key}: a page for people, "
        f"OPENAI_BASE_URL=http://{host}:{options.port}/v1 and "
        f"ANTHROPIC_BASE_URL=http://{host}:{options.port} for programs. Ctrl-C ends it.",
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log = logging.getLogger("lowmoe")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
