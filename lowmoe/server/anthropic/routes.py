"""/v1/messages and /v1/messages/count_tokens.

Knows:        whether an answer is streamed or told whole.
Ignorant of:  fields, shapes.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lowmoe.server.anthropic.answer import message_frames, whole_message
from lowmoe.server.anthropic.errors import error_frame
from lowmoe.server.anthropic.frames import PING
from lowmoe.server.anthropic.request import CountRequest, MessagesRequest
from lowmoe.server.asking import Service
from lowmoe.server.caller import caller_of
from lowmoe.server.names import require_served
from lowmoe.server.sse import STREAMED, collect, respond
from lowmoe.server.whole import whole_answers


def routes(service: Service) -> APIRouter:
    """Both, answered by this service."""
    router = APIRouter(tags=["anthropic"])

    @router.post("/v1/messages", responses=STREAMED)
    async def messages(request: Request, body: MessagesRequest) -> Response:
        require_served(body.model, service.model)
        events, name = service.ask(body.ask(caller_of(request))), service.model.name
        if body.stream:
            frames = message_frames(events, name, show_thinking=body.shows_thinking)
            return respond(frames, failed=error_frame, ping=PING)
        (answer,) = whole_answers(await collect(request, events), 1)
        return JSONResponse(whole_message(answer, name, show_thinking=body.shows_thinking))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request, body: CountRequest) -> Response:
        require_served(body.model, service.model)
        n_tokens = await service.count_tokens(body.ask(caller_of(request)))
        return JSONResponse({"input_tokens": n_tokens})

    return router
