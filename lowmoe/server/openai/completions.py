"""/v1/completions: going on with plain text.

Knows:        whether an answer is streamed or told whole.
Ignorant of:  fields, shapes.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lowmoe.server.asking import Service
from lowmoe.server.caller import caller_of
from lowmoe.server.joined import ask_all
from lowmoe.server.names import require_served
from lowmoe.server.openai.completions_answer import (
    all_as_answer,
    completion_frames,
    whole_completion,
)
from lowmoe.server.openai.completions_request import CompletionRequest
from lowmoe.server.openai.errors import error_frame
from lowmoe.server.sse import STREAMED, collect, respond
from lowmoe.server.whole import whole_answers


def routes(service: Service) -> APIRouter:
    """The one route, answered by this service."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["openai"], responses=STREAMED)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        require_served(body.model, service.model)
        asks = body.asks(caller_of(request))
        n, name = asks[0].n, service.model.name
        events = await ask_all(service, asks)
        if body.stream:
            frames = completion_frames(events, name, n=n, include_usage=body.include_usage)
            return respond(frames, failed=error_frame)
        told = map(all_as_answer, await collect(request, events))
        return JSONResponse(whole_completion(whole_answers(told, n * len(asks)), name, n=n))

    return router
