"""Whether the server is there, and whether it answers.

Knows:        the service's model.
Ignorant of:  who asks, and what they do with it.
"""

from collections.abc import Mapping

from fastapi import APIRouter

from lowmoe.server.asking import Service


def routes(service: Service) -> APIRouter:
    """/health/live and /health/ready, which say nothing of the model, and /health, which does."""
    router = APIRouter(prefix="/health", tags=["machine"])

    @router.get("/live")
    async def live() -> Mapping[str, str]:
        """The server runs."""
        return {"status": "alive"}

    @router.get("/ready")
    async def ready() -> Mapping[str, str]:
        """It answers: there is a server only once its model is loaded."""
        return {"status": "ready"}

    @router.get("")
    async def health() -> Mapping[str, str | int]:
        """What is served."""
        card = service.model
        return {"status": "ready", "model": card.name, "context_tokens": card.n_context}

    return router
