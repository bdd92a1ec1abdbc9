"""/v1/models: the one that is served.

Knows:        how the list of models shows it.
Ignorant of:  answers.
"""

from typing import Any

from fastapi import APIRouter

from lowmoe.server.asking import ModelCard, Service
from lowmoe.server.names import require_served


def routes(service: Service) -> APIRouter:
    """The list, and the one entry that it has."""
    router = APIRouter(prefix="/v1/models", tags=["openai"])

    @router.get("")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_entry(service.model)]}

    # A hub repository's name holds a slash.
    @router.get("/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        require_served(name, service.model)
        return _entry(service.model)

    return router


def _entry(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "lowmoe",
        # Not OpenAI's: as vLLM calls it, for clients that must know when to shorten a conversation.
        "max_model_len": card.n_context,
    }
