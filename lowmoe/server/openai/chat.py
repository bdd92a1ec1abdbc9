"""/v1/chat/completions.

Knows:        whether an answer is streamed or told whole.
Ignorant of:  fields, shapes.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lowmoe.server.asking import Service
from lowmoe.server.caller import caller_of
from lowmoe.server.names import require_served
from lowmoe.server.openai.chat_answer import chat_frames, whole_chat
from lowmoe.server.openai.chat_request import ChatRequest
from lowmoe.server.openai.errors import error_frame
from lowmoe.server.sse import STREAMED, collect, respond
from lowmoe.server.whole import whole_answers


def routes(service: Service) -> APIRouter:
    """The one route, answered by this service."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["openai"], responses=STREAMED)
    async def chat(request: Request, body: ChatRequest) -> Response:
        require_served(body.model, service.model)
        ask = body.ask(caller_of(request))
        events, name = service.ask(ask), service.model.name
        if body.stream:
            frames = chat_frames(events, name, n=ask.n, include_usage=body.include_usage)
            return respond(frames, failed=error_frame)
        answers = whole_answers(await collect(request, events), ask.n)
        return JSONResponse(whole_chat(answers, name))

    return router
