"""Every path of OpenAI's API that is answered here.

Knows:        which they are.
Ignorant of:  all else.
"""

from fastapi import APIRouter

from lowmoe.server.asking import Service
from lowmoe.server.openai import chat, completions, models, refused, responses


def routes(service: Service) -> APIRouter:
    """All of them, answered by this service."""
    router = APIRouter()
    for one in (chat, completions, responses, models):
        router.include_router(one.routes(service))
    router.include_router(refused.routes())
    return router
