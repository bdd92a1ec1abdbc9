"""Paths of OpenAI's API that no model here can serve, so that clients hear it from us.

Knows:        which they are.
Ignorant of:  what they would do.
"""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.exceptions import HTTPException

_PATHS = {
    "/v1/embeddings": "Embeddings",
    "/v1/moderations": "Moderation",
    "/v1/images/generations": "Making images",
    "/v1/images/edits": "Editing images",
    "/v1/audio/speech": "Speech",
    "/v1/audio/transcriptions": "Transcription",
    "/v1/audio/translations": "Translation of speech",
    "/v1/rerank": "Reranking",
}


def routes() -> APIRouter:
    """501 for each of them, whatever is sent."""
    router = APIRouter(include_in_schema=False)
    for path, what in _PATHS.items():
        router.post(path)(_refuse(what))
    return router


def _refuse(what: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise HTTPException(
            501, f"{what} is nothing a language model of this server does. It chats and completes."
        )

    return refuse
