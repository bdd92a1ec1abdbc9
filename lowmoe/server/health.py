"""Whether the server is there, and whether it answers.

Knows:        the service's model.
Ignorant of:  who asks, and what they do with it.
"""

from collections.abc import Callable, Mapping

from fastapi import APIRouter

from lowmoe.server.asking import Overloaded, Service
from lowmoe.server.numbers import Numbers


def routes(service: Service, numbers: Callable[[], Numbers] | None) -> APIRouter:
    """/health/live and /health/ready, which say nothing of the model, and /health, which does."""
    router = APIRouter(prefix="/health", tags=["machine"])

    @router.get("/live")
    async def live() -> Mapping[str, str]:
        """The server runs."""
        return {"status": "alive"}

    @router.get("/ready")
    async def ready() -> Mapping[str, str]:
        """It answers, from when it listens, which is with its model loaded, until it shuts down."""
        if numbers is not None and numbers().is_closing:
            raise Overloaded("the server shuts down. Ask again when it is back.")
        return {"status": "ready"}

    @router.get("")
    async def health() -> Mapping[str, str | int]:
        """What is served."""
        card = service.model
        return {"status": "ready", "model": card.name, "context_tokens": card.n_context}

    return router
